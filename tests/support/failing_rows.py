"""A sequence that fails beside others: a checkpoint in which one token's embedding is NaN, so that whoever samples it
fails in the pass that computes it; and what the others must be, by the same run in which a stop ends it there."""

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from penstock.engine.output import RequestOutput
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock import LLM, SamplingParams
from tests.support.watches import keep_logits

EMBEDDING = "model.embed_tokens.weight"
NAN = "the logits are NaN: the weights hold NaN or inf, or activations overflow in this dtype"
FAILS = 0  # which prompt
WARNS = pytest.warns(UserWarning, match=r"embed_tokens\.weight has NaN")
# Fewer rows than prompts, and a budget smaller than some: chunks run beside the row that fails, and one waits for it.
OPTIONS = {"max_num_seqs": 3, "max_num_batched_tokens": 16, "max_model_len": 96, "page_size": 4}
PROMPTS = [random.Random(length).choices(range(128), k=length) for length in (5, 37, 9, 50)]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, logprobs=2, frequency_penalty=1.5),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=14, ignore_eos=True, repetition_penalty=1.2),
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3),
]


@dataclass
class Run:
    """The outputs of a call, and the logits of what each of its passes sampled from."""

    outputs: list[RequestOutput]
    logits: list[Tensor]


def run(llm: LLM, params: list[SamplingParams]) -> Run:
    logits: list[Tensor] = []
    with llm.engine.watched_by(keep_logits(logits)):
        return Run(llm.generate(PROMPTS, params), logits)


def choose_token(outputs: list[RequestOutput]) -> tuple[int, int]:
    """A token that only the failing prompt samples, once, and the one that it samples next, for the first time."""
    mine = outputs[FAILS].outputs[0].token_ids
    others = {token for output in outputs[FAILS + 1 :] for token in output.outputs[0].token_ids}
    given = {token for prompt in PROMPTS for token in prompt}
    return next(
        (token, following)
        for index, (token, following) in enumerate(zip(mine[2:], mine[3:]), 2)
        if token not in others | given | set(mine[:index]) and following not in mine[: index + 1]
    )


def ending_at(token: int) -> list[SamplingParams]:
    """Sampling parameters like PARAMS, but with a stop that ends the prompt that fails."""
    return [replace(params, stop_token_ids=[token]) if i == FAILS else params for i, params in enumerate(PARAMS)]


def poison(source: Path, directory: Path, token: int) -> str:
    """A copy of a checkpoint in which that token's embedding is NaN."""
    shutil.copytree(source, directory)
    for file in directory.glob("*.safetensors"):
        weights = load_file(file)
        if EMBEDDING in weights:
            weights[EMBEDDING][token] = torch.nan
            save_file(weights, file)
    return str(directory)


def assert_others_are_as_if_stopped(failed: list[RequestOutput], stopped: list[RequestOutput]) -> None:
    """Asserts that outputs are equal, but for the last bits of log probabilities if `stopped` comes from another number
    of ranks."""
    (one,), (other,) = failed[FAILS].outputs, stopped[FAILS].outputs
    assert (one.finish_reason, one.stop_reason, one.error) == ("error", None, NAN)
    assert (other.finish_reason, other.error) == ("stop", None)
    assert len(one.token_ids) >= 3 and one.token_ids == other.token_ids[:-1] and len(one.logprobs) == len(one.token_ids)
    for output, expected in list(zip(failed, stopped, strict=True))[FAILS + 1 :]:
        (ours,), (theirs,) = output.outputs, expected.outputs
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, "length") and ours.error is None


def assert_same_bits(failed: Run, stopped: Run) -> None:
    """Asserts equality in every pass, but for the row that fails and passes that were submitted ahead of it."""
    num_nan = 0
    for ours, theirs in zip(failed.logits, stopped.logits, strict=True):
        well = ~ours.isnan().any(-1)
        num_nan += int((~well).sum())
        assert torch.equal(ours[well], theirs[well])
    assert 1 <= num_nan <= 2
    assert failed.outputs[FAILS + 1 :] == stopped.outputs[FAILS + 1 :]


def assert_at_rest(llm: LLM) -> None:
    llm.loop.scheduler.check_integrity()
    assert llm.loop.scheduler.num_running == llm.loop.scheduler.num_waiting == 0
    assert llm.loop.scheduler.num_free_pages == llm.loop.scheduler.pool.num_usable


def fill_all_pages(llm: LLM) -> list[list[int]]:
    """Tokens of prompts that together have every page of the cache."""
    length = OPTIONS["max_model_len"] - 2
    prompts = [random.Random(row).choices(sorted(set(PROMPTS[1])), k=length) for row in range(OPTIONS["max_num_seqs"])]
    num_pages = sum(-(-(length + 1) // OPTIONS["page_size"]) for _ in prompts)
    assert num_pages == llm.loop.scheduler.pool.num_usable
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, presence_penalty=0.5)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def assert_fails_alone_twice(llm: LLM, stopped: Run, filled: list[list[int]]) -> None:
    """Asserts that the poisoned model's prompts are as in `stopped`, bit for bit. What pages hold from their last
    owner, be it NaN everywhere, does not reach the next, which gives the tokens `filled`."""
    for _ in range(2):
        failed = run(llm, PARAMS)
        assert_others_are_as_if_stopped(failed.outputs, stopped.outputs)
        assert_same_bits(failed, stopped)
        assert_at_rest(llm)
        llm.engine.worker.executor.model.kv.data.fill_(torch.nan)
        assert fill_all_pages(llm) == filled
