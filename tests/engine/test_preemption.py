"""Rows that give way and come back, through the loop: each request is as it would be alone, with room for all."""

import pytest
from penstock.engine.runtime.engine import Engine

from penstock import LLM, SamplingParams

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 64, "max_num_batched_tokens": 32, "page_size": 4}
PROMPTS = ["Return the", "def", "class", "import os", "Return the", "for i in"]
PARAMS = [
    SamplingParams(max_tokens=30, ignore_eos=True, temperature=0),
    SamplingParams(max_tokens=40, ignore_eos=True, seed=1, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(max_tokens=36, ignore_eos=True, temperature=0, frequency_penalty=1.5, logprobs=2),
    SamplingParams(max_tokens=25, ignore_eos=True, seed=3, top_p=0.9, top_k=40),
    SamplingParams(max_tokens=40, ignore_eos=True, temperature=0, presence_penalty=2.0),
    SamplingParams(max_tokens=40, ignore_eos=True, seed=4, logprobs=0),
]


@pytest.fixture(scope="module")
def alone():
    with LLM("demo", **OPTIONS) as llm:
        return [llm.generate(prompt, params)[0].outputs[0] for prompt, params in zip(PROMPTS, PARAMS)]


def assert_as_alone(outputs, alone) -> None:
    for (output,), expected in zip((one.outputs for one in outputs), alone, strict=True):
        assert output.token_ids == expected.token_ids and output.text == expected.text
        assert (output.finish_reason, output.error) == (expected.finish_reason, None)
        if expected.logprobs is not None:
            assert len(output.logprobs) == len(expected.logprobs)
            assert output.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)


@pytest.mark.parametrize(
    ("lookahead", "options"),
    [
        (0, {"resident": "all"}),
        (1, {"resident": "all"}),
        (1, {"resident": "none"}),
        (1, {"debug": {"as_on_gpu": True, "page_order_seed": 3}}),
    ],
)
def test_each_request_is_as_alone(monkeypatch, alone, lookahead, options):
    """Passes are submitted one by one, ahead of the tokens, or announced."""
    monkeypatch.setattr(Engine, "lookahead", lookahead)
    with LLM("demo", **OPTIONS, **options, num_pages=18, max_num_seqs=5) as llm:
        assert_as_alone(llm.generate(PROMPTS, PARAMS), alone)
        counts = llm.loop.scheduler.counts
        assert counts.num_preemptions > 2 and counts.num_recomputed_tokens > 50
        llm.loop.scheduler.check_integrity()
        assert llm.loop.scheduler.num_free_pages == 17


@pytest.mark.timeout(120)
def test_each_request_is_as_alone_on_two_ranks(alone):
    """The other rank hears of it by what changed in the rows."""
    with LLM("demo", **OPTIONS, tensor_parallel_size=2, num_pages=18, max_num_seqs=5) as llm:
        assert_as_alone(llm.generate(PROMPTS, PARAMS), alone)
        assert llm.loop.scheduler.counts.num_preemptions > 2
