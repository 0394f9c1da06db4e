"""Requests that want more of the KV cache than there is, of every kind of sampling, and what each is alone."""

import pytest
from penstock.engine.output import CompletionOutput, RequestOutput

from penstock import LLM, SamplingParams

OPTIONS = {"dtype": "float32", "max_model_len": 64, "max_num_batched_tokens": 32, "page_size": 4}
FEW_PAGES = {"num_pages": 20, "max_num_seqs": 6}
PROMPTS = ["Return the", "def", "class", "import os", "Return the", "for i in"]
PARAMS = [
    SamplingParams(max_tokens=30, ignore_eos=True, temperature=0),
    SamplingParams(max_tokens=40, ignore_eos=True, seed=1, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(max_tokens=36, ignore_eos=True, temperature=0, frequency_penalty=1.5, logprobs=2),
    SamplingParams(max_tokens=25, ignore_eos=True, seed=3, top_p=0.9, top_k=40),
    SamplingParams(max_tokens=40, ignore_eos=True, temperature=0, presence_penalty=2.0),
    SamplingParams(max_tokens=40, ignore_eos=True, seed=4, logprobs=0),
]


def each_alone(device: str) -> list[CompletionOutput]:
    """The output of each of PROMPTS with PARAMS, alone."""
    with LLM("demo", device=device, **OPTIONS) as llm:
        return [llm.generate(prompt, params)[0].outputs[0] for prompt, params in zip(PROMPTS, PARAMS)]


def generate_twice_each(llm: LLM) -> list[RequestOutput]:
    """Generates all of them twice, together."""
    return llm.generate(PROMPTS * 2, PARAMS * 2)


def assert_as_alone(outputs: list[RequestOutput], alone: list[CompletionOutput]) -> None:
    """Asserts equal tokens, texts and ends of `generate_twice_each`; logprobs are those of other batch shapes."""
    for (output,), expected in zip((one.outputs for one in outputs), alone * 2, strict=True):
        assert output.token_ids == expected.token_ids and output.text == expected.text
        assert (output.finish_reason, output.error) == (expected.finish_reason, None)
        if expected.logprobs is not None:
            assert len(output.logprobs) == len(expected.logprobs)
            assert output.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)


def assert_rows_gave_way(llm: LLM) -> None:
    """Asserts that rows gave way and were computed again, and that no page is lost."""
    scheduler = llm.loop.scheduler
    assert scheduler.counts.num_preemptions > 2
    assert scheduler.cache.is_on or scheduler.counts.num_recomputed_tokens > 20  # else they find their own pages
    scheduler.check_integrity()
    assert scheduler.num_free_pages == FEW_PAGES["num_pages"] - 1


def assert_each_gives_way_and_is_as_alone(llm: LLM, alone: list[CompletionOutput]) -> None:
    """Asserts both of all of them, generated twice, together."""
    assert_as_alone(generate_twice_each(llm), alone)
    assert_rows_gave_way(llm)
