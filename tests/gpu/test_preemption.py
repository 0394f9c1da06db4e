"""Rows that give way and come back, and prompts that begin alike: in graphs and eager, resident and streamed."""

import pytest

from penstock import LLM
from tests.support import rows_giving_way
from tests.support.rows_giving_way import FEW_PAGES, PARAMS, PROMPTS, assert_each_gives_way_and_is_as_alone

pytestmark = pytest.mark.gpu
ON_GPU = rows_giving_way.OPTIONS | {"device": "cuda", "gpu_memory": "2GiB"}
PADDING = "def add(a, b):\n    return a + b\n\n\n"


@pytest.fixture(scope="module")
def alone():
    return rows_giving_way.each_alone("cuda")


@pytest.mark.parametrize("resident", ["all", "none"])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_each_request_is_as_alone(alone, resident, shares, enforce_eager):
    options = {"resident": resident, "enable_prefix_caching": shares, "enforce_eager": enforce_eager}
    with LLM("demo", **ON_GPU, **FEW_PAGES, **options) as llm:
        assert_each_gives_way_and_is_as_alone(llm, alone)


@pytest.mark.parametrize("resident", ["all", "none"])
def test_what_is_cached_changes_no_token(resident):
    prompts = [PADDING + prompt for prompt in PROMPTS]
    with LLM("demo", **ON_GPU | {"max_model_len": 128}, resident=resident) as llm:
        first = llm.generate(prompts, PARAMS)
        again = llm.generate(prompts, PARAMS)
    assert all(output.num_cached_tokens >= 8 for output in again)
    assert [one.outputs[0].token_ids for one in again] == [one.outputs[0].token_ids for one in first]


def generate_in_one_pass(**options):
    """The outputs of prompts that begin alike and in one pass."""
    roomy = ON_GPU | {"max_model_len": 128, "max_num_batched_tokens": 512, "max_num_seqs": 16}
    with LLM("demo", **roomy | options) as llm:
        outputs = llm.generate([PADDING + prompt for prompt in PROMPTS] * 2, PARAMS * 2)
        assert llm.loop.scheduler.counts.num_passes == max(params.max_tokens for params in PARAMS)
        llm.loop.scheduler.check_integrity()
    return outputs


def cached(outputs):
    """The tokens that requests did not compute, in ascending order: one computes for all."""
    return sorted(output.num_cached_tokens for output in outputs)


@pytest.mark.parametrize("resident", ["all", "none"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_what_one_row_of_a_pass_computes_for_others_changes_no_token(resident, enforce_eager):
    options = {"resident": resident, "enforce_eager": enforce_eager}
    shared, expected = generate_in_one_pass(**options), generate_in_one_pass(**options, enable_prefix_caching=False)
    assert cached(shared)[0] == 0 and cached(shared)[1] >= 8
    assert [one.outputs[0].token_ids for one in shared] == [one.outputs[0].token_ids for one in expected]


def test_graphs_and_eager_passes_agree_on_it_in_bf16():
    """There chunks read the pages that others of the pass write where they lie."""
    graphs, eager = (generate_in_one_pass(dtype="bfloat16", enforce_eager=is_eager) for is_eager in (False, True))
    assert cached(graphs)[1] >= 8
    assert [one.outputs[0].token_ids for one in graphs] == [one.outputs[0].token_ids for one in eager]
