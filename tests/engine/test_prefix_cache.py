"""Prompts that begin alike, through the loop: computed once, and as they would be alone."""

import pytest

from penstock import LLM, SamplingParams

OPTIONS = {"device": "cpu", "dtype": "float32", "max_model_len": 128, "max_num_batched_tokens": 32, "page_size": 4}
SHARED = "def add(a, b):\n    return a + b\n\n\ndef "
PROMPTS = [SHARED + end for end in ("mul(a, b):", "sub(a", "add_all(numbers):\n    total = 0", "mul(a, b):")]
PARAMS = [
    SamplingParams(max_tokens=20, ignore_eos=True, temperature=0, logprobs=1),
    SamplingParams(max_tokens=20, ignore_eos=True, seed=1, repetition_penalty=1.4, frequency_penalty=0.5),
    SamplingParams(max_tokens=20, ignore_eos=True, seed=2, top_p=0.9),
    SamplingParams(max_tokens=20, ignore_eos=True, temperature=0, presence_penalty=1.5),
]


@pytest.fixture(scope="module")
def alone():
    with LLM("demo", **OPTIONS, enable_prefix_caching=False) as llm:
        return [ask(llm, *one) for one in zip(PROMPTS, PARAMS)]


def ask(llm, prompt: str, params: SamplingParams):
    """The output of a prompt, with the number of tokens that were computed for it."""
    counters = llm.engine.worker.executor.counters
    before = counters.num_tokens
    (output,) = llm.generate(prompt, params)
    return output, counters.num_tokens - before


def assert_equal(output, expected) -> None:
    assert output == expected or output.outputs[0].logprobs  # whose last bits are those of another batch shape
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.parametrize("options", [{}, {"debug": {"as_on_gpu": True}}, {"resident": "none"}])
def test_what_is_cached_is_not_computed_and_changes_no_token(alone, options):
    with LLM("demo", **OPTIONS, **options) as llm:
        for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS)):
            output, num_computed = ask(llm, prompt, params)
            expected, num_all = alone[index]
            assert_equal(output, expected)
            assert output.num_cached_tokens == num_all - num_computed and expected.num_cached_tokens == 0
            assert (output.num_cached_tokens >= 12) == (index > 0)
        llm.reset_prefix_cache()
        together = llm.generate(PROMPTS * 2, PARAMS * 2)
        for output, (expected, _) in zip(together, alone * 2, strict=True):
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        llm.loop.scheduler.check_integrity()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"debug": {"as_on_gpu": True, "lookahead": 1, "page_order_seed": 3}},
        {"resident": "none", "debug": {"lanes": "random", "poison": True}},
        {"resident": "none", "debug": {"as_on_gpu": True, "lookahead": 1}},
        {"tensor_parallel_size": 2},
    ],
    ids=["resident", "padded", "streamed", "prepared", "ranks"],
)
def test_what_begins_in_one_pass_is_computed_once_and_changes_no_token(alone, options):
    """One of them has a single token of its own, which reads pages as rows that decode do."""
    with LLM("demo", **OPTIONS | {"max_num_batched_tokens": 256}, **options) as llm:
        tokens = llm.tokenizer.encode(PROMPTS[0])
        single = tokens[: len(tokens) // 4 * 4 - 3]
        counters = llm.engine.worker.executor.counters
        before = counters.num_tokens
        together = llm.generate([*PROMPTS * 2, single, single], [*PARAMS * 2, PARAMS[0], PARAMS[0]])
        num_computed, counts = counters.num_tokens - before, llm.loop.scheduler.counts
        for output, (expected, _) in zip(together, alone * 2):
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert together[8].outputs[0].token_ids == together[9].outputs[0].token_ids
        llm.loop.scheduler.check_integrity()
    assert counts.num_passes == 20, "they did not all begin in the first pass"
    cached = [output.num_cached_tokens for output in together]
    assert cached[0] == 0 and min(cached[1:]) >= 12 and sum(cached) == counts.num_hit_tokens
    assert cached[9] == len(single) - 1
    assert num_computed == sum(len(output.prompt_token_ids) + 19 for output in together) - sum(cached)


def test_a_reset_and_a_salt_find_nothing(alone):
    with LLM("demo", **OPTIONS) as llm:
        for salt, num_cached in ((None, 0), ("a", 0), ("a", 1)):
            output, _ = ask(llm, PROMPTS[0], SamplingParams(max_tokens=1, cache_salt=salt))
            assert (output.num_cached_tokens > 0) == num_cached
        llm.reset_prefix_cache()
        assert ask(llm, *next(zip(PROMPTS, PARAMS)))[0].num_cached_tokens == 0


@pytest.mark.timeout(120)
def test_two_ranks_share_pages_too(alone):
    """The other rank hears which tokens were cached where penalties ask for them."""
    with LLM("demo", **OPTIONS, tensor_parallel_size=2) as llm:
        llm.generate(SHARED, PARAMS[0])
        outputs = llm.generate(PROMPTS, PARAMS)
    assert all(output.num_cached_tokens >= 12 for output in outputs)
    assert [one.outputs[0].token_ids for one in outputs] == [one.outputs[0].token_ids for one, _ in alone]
