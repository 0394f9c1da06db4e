"""Runs cases on the real engine and keeps tokens and logits: in this process, or on the ranks of one launch, each with

    -m tests.support.oracle.engine_runs FOLDER CASE_ID...

A rank goes over all cases, one LLM after another; rank 0 writes FOLDER/CASE_ID.safetensors after each.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from penstock.engine.llm import LLM
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.request import SamplingParams
from safetensors.torch import save_file
from torch import Tensor

from tests.support.forked_ranks import fork_ranks
from tests.support.oracle.cases import Case, fp32_cases, half_cases, prompts
from tests.support.watches import EndPass

_LAUNCH_TIMEOUT_S = 540


def run_case(case: Case, checkpoint: str | Path, max_tokens: int | None = None) -> dict[str, Tensor]:
    """Generates greedily for all prompts at once, as many tokens as the case says, or `max_tokens`. Returns tokens
    (prompts, n), logits (prompts, n, vocab) and what the counters and the ledger say: num_passes, copied_bytes."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens or case.max_tokens, ignore_eos=True)
    with LLM(str(checkpoint), **case.options) as llm:
        logits = capture_logits(llm)
        outputs = llm.generate(prompts(), params)
        executor = llm.engine.worker.executor
        return {
            "tokens": torch.tensor([output.outputs[0].token_ids for output in outputs]),
            "logits": torch.stack([torch.stack(logits[row]) for row in sorted(logits)]),
            "num_passes": torch.tensor(executor.counters.num_passes),
            "copied_bytes": torch.tensor(executor.copied.total.sent_bytes),
        }


def capture_logits(llm: LLM) -> dict[int, list[Tensor]]:
    """Logits of each row, position after position, as the sampler sees them. Row i runs prompt i, since there are as
    many rows as prompts."""
    vocab_size, logits = llm.engine.plan.spec.vocab_size, {row: [] for row in range(len(prompts()))}

    def capture(batch: Batch, gathered: Tensor) -> None:
        rows = [row for row in batch.rows if row.samples]
        for row, row_logits in zip(rows, gathered[:, :vocab_size].to("cpu", copy=True), strict=True):
            position = row.start + len(row.tokens)
            assert position == len(prompts()[row.index]) + len(logits[row.index]), (
                "a position was skipped or sampled twice"
            )
            logits[row.index].append(row_logits)

    llm.engine.watches.add(EndPass(capture))
    return logits


def launch_cases(cases: Iterable[Case], folder: Path) -> str:
    """Runs all cases, of one tp_size, on one launch of ranks, and returns what it wrote to stderr. FOLDER holds their
    checkpoints and receives their results, those of the cases that finished."""
    cases = list(cases)
    (tp_size,) = {case.tp_size for case in cases}
    ids = (case.id for case in cases)
    return fork_ranks(tp_size, "-m", __name__, folder, *ids, timeout=_LAUNCH_TIMEOUT_S).stderr


def main() -> None:
    folder, *ids = sys.argv[1:]
    cases = {case.id: case for case in (*fp32_cases(), *half_cases())}
    for case_id in ids:
        case = cases[case_id]
        result = run_case(case, Path(folder) / case.checkpoint)
        if os.environ["RANK"] == "0":
            save_file(result, Path(folder) / f"{case_id}.safetensors")


if __name__ == "__main__":
    main()
