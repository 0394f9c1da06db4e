"""Log probabilities of prompts on a GPU, beside graphs and in eager passes, streamed and resident: as on a CPU."""

import pytest
from penstock.engine.kernels import logprobs

from penstock import LLM, SamplingParams
from tests.support.llm_runs import LONG
from tests.support.rounding import assert_apart, logprobs_apart, model_apart
from tests.support.watches import EndPass

pytestmark = pytest.mark.gpu
OPTIONS = {"dtype": "float32", "max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 16, "page_size": 4}
PROMPTS = [LONG, "def", "Return the"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=5),
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0, logprobs=2),
]


@pytest.fixture(scope="module")
def on_cpu():
    """The outputs of a CPU, and how far another order of sums may be from them."""
    sizes = []
    with LLM("demo", device="cpu", **OPTIONS) as llm:
        note = EndPass(lambda batch, logits: sizes.append(float(logits.abs().max())) if len(logits) else None)
        with llm.engine.watched_by(note):
            outputs = llm.generate(PROMPTS, PARAMS)
        spec = llm.engine.plan.spec
    return outputs, logprobs_apart(max(sizes), spec.vocab_size, model_apart(spec, OPTIONS["max_model_len"]))


@pytest.mark.parametrize("resident", ["all", "none"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_they_are_those_of_a_cpu(on_cpu, resident, enforce_eager):
    expected, bound = on_cpu
    before = logprobs.calls["triton"]
    own = {"device": "cuda", "gpu_memory": "2GiB", "resident": resident, "enforce_eager": enforce_eager}
    with LLM("demo", **OPTIONS, **own) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
    assert logprobs.calls["triton"] > before
    for output, other in zip(outputs, expected, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert (output.prompt_logprobs is None) == (other.prompt_logprobs is None)
        for ours, theirs in list(zip(output.prompt_logprobs or (), other.prompt_logprobs or ()))[1:]:
            assert ours.keys() == theirs.keys()
            for token, one in ours.items():
                assert_apart(abs(one.logprob - theirs[token].logprob), bound)
