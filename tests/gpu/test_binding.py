"""An engine on the first GPU while the user's thread is on the second one."""

from collections.abc import Iterator

import pytest
import torch
from penstock.engine.llm import LLM
from penstock.scheduler.batching.request import SamplingParams

from tests.support.commands import run_ranks
from tests.support.gpu.enough import needs_gpus

pytestmark = [
    pytest.mark.gpu,
    needs_gpus(2),
]
OPTIONS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "gpu_memory": "4GiB", "resident": "none"}
PROMPTS = [[5, 17, 3, 99], [7] * 20]
WAYS = [
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    SamplingParams(
        temperature=1.0, top_p=0.9, seed=3, repetition_penalty=1.2, logprobs=1, max_tokens=8, ignore_eos=True
    ),
]


@pytest.fixture
def on_the_second() -> Iterator[None]:
    torch.cuda.set_device(1)
    yield
    torch.cuda.set_device(0)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for params in WAYS for output in llm.generate(PROMPTS, params)]


@pytest.fixture(scope="module", params=[True, False], ids=["eager", "graphs"])
def expected(request) -> tuple[bool, list[list[int]]]:
    with LLM("demo", enforce_eager=request.param, **OPTIONS) as llm:
        return request.param, tokens_of(llm)


def test_an_engine_is_used_from_there(expected, on_the_second):
    """Built, run, measured and closed there; and the user's own choice stays."""
    enforce_eager, tokens = expected
    with LLM("demo", enforce_eager=enforce_eager, **OPTIONS) as llm:
        assert tokens_of(llm) == tokens
        llm.measure()
        assert tokens_of(llm) == tokens
        assert torch.cuda.current_device() == 1
    assert torch.cuda.memory_allocated(1) == 0, "something of the engine's lay on the second"


def test_each_of_two_ranks_is_used_from_the_others_gpu():
    """And by another thread, also on local rank 1, whose GPU is no thread's first one."""
    run_ranks(2, "-m", "tests.support.gpu.binding_ranks", timeout=120)


def test_the_user_changes_over_between_calls(expected):
    enforce_eager, tokens = expected
    with LLM("demo", enforce_eager=enforce_eager, **OPTIONS) as llm:
        try:
            for device in (0, 1, 0):
                torch.cuda.set_device(device)
                assert tokens_of(llm) == tokens
        finally:
            torch.cuda.set_device(0)
