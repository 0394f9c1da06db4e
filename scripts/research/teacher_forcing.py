"""Log probabilities of a given text by the engine itself: chunk by chunk, through the plan that generates.

A chunk is the row that the scheduler would make of it, by the engine's own retention, except that every one of its
tokens is sampled from and scored against the one that follows. What is evicted by then depends on the index in the
sequence alone, so these are the log probabilities that the engine reports when it generates the same tokens one by one.
One rank, one sequence at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from penstock.engine.compute.inputs import PassInputs
from penstock.engine.compute.sampler import NAN_LOGITS, Asked, SampleOutput
from penstock.engine.kernels.logprobs import Logprobs
from penstock.engine.llm import LLM
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.retention import Retention, SinksAndWindow
from torch import Tensor

FIRST_PAGE = 1  # page 0 is reserved


def logprobs_of(llm: LLM, tokens: Sequence[int], row_of: Callable[..., BatchRow]) -> Tensor:
    """Computes log probabilities (T - 1,) float32 on the host, of each token but the first, given those before it.
    `row_of(retention, tokens, start, end)` is `cached_row` or `recomputed_row`; its rows, all of whose tokens may be
    sampled from, are as long as the engine's passes can be."""
    retention = llm.engine.plan.retention
    chunk_tokens = min(llm.engine.plan.max_num_batched_tokens, llm.engine.plan.max_num_seqs)
    parts, start, last = [], 0, len(tokens) - 1
    while start < last:
        end = retention.pass_end(start, min(start + chunk_tokens, last))
        parts.append(_score(llm, row_of(retention, tokens, start, end), tokens[start + 1 : end + 1]))
        start = end
    return torch.cat(parts)


def cached_row(retention: Retention, tokens: Sequence[int], start: int, end: int) -> BatchRow:
    """Makes the row as in generation: all tokens before it are cached, except those that were evicted."""
    return _row(retention, tokens, start, end, retention.num_evicted(end))


def recomputed_row(retention: SinksAndWindow, tokens: Sequence[int], start: int, end: int) -> BatchRow:
    """Makes a new sequence of the tokens that would be cached; it is computed anew, so that none has seen an evicted
    one."""
    num_sinks = retention.num_sinks
    held = [*tokens[:num_sinks], *tokens[num_sinks + retention.num_evicted(end) : end]]
    return _row(retention, held, 0, len(held), 0)


def _row(retention: Retention, tokens: Sequence[int], start: int, end: int, num_evicted: int) -> BatchRow:
    pages = range(FIRST_PAGE, FIRST_PAGE + retention.num_pages(end))
    table = retention.page_table(pages, end)
    return BatchRow(0, tuple(tokens[start:end]), start, table, samples=True, sampling=None, num_evicted=num_evicted)


@torch.inference_mode()
def _score(llm: LLM, row: BatchRow, following: Sequence[int]) -> Tensor:
    """Log probabilities of the tokens that follow the row's last ones."""
    runner = llm.engine.worker.runner
    executor, sampler = runner.executor, runner.model.sampler
    inputs = runner.binder.bind(Batch((row,)))
    targets = torch.tensor(following, device=sampler.device)
    scored: list[Tensor] = []

    def score(output: SampleOutput) -> None:
        if (output.tokens < 0).any():
            raise ValueError(NAN_LOGITS)
        logits = executor.arena.cut(len(row.tokens), len(following))["logits"]
        scores = sampler.score(logits, targets, wanted=torch.zeros_like(targets))
        scored.append(Logprobs.of(scores).sampled_logprob.cpu())

    executor.fill_ring()
    executor.run(_with_selected(inputs, len(following), sampler.pad_row), Asked(), score)
    return scored[0]


def _with_selected(inputs: PassInputs, num_rows: int, pad_row: int) -> PassInputs:
    """Changes the inputs so that the last `num_rows` tokens are sampled from, into the sampler's unused row."""
    device, num_tokens = inputs.tokens.device, len(inputs.tokens)
    select = torch.arange(num_tokens - num_rows, num_tokens, device=device)
    return replace(
        inputs,
        select=select,
        sampled_rows=(pad_row,) * num_rows,
        sampled_rows_device=torch.full_like(select, pad_row),
        sampled_positions=inputs.positions[select] + 1,
    )
