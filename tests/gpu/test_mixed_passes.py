"""Requests that come and go at random in a crowd, in graphs and eager, resident and streamed, on one rank and two, are
as each is alone."""

import pytest

from penstock import LLM
from tests.support.company import CROWDED, ROOMY, crowd, each_alone, run_in_a_crowd
from tests.support.gpu.enough import needs_ranks

pytestmark = pytest.mark.gpu
# Rates at which the link never binds and computing costs much, so that pages move.
ON_GPU = {"device": "cuda", "gpu_memory": "2GiB", "device_profile": "cpu", "link_gb_s": 1e4}
CROWD = 5


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    with LLM("demo", **ON_GPU, **ROOMY) as llm:
        return each_alone(llm, crowd(CROWD))


def run(alone: list[list[int]], tp_size: int, **options) -> None:
    with LLM("demo", tp_size, **ON_GPU, **CROWDED, **options, debug={"poison": True}) as llm:
        assert (llm.engine.worker.runner.graphs is None) == options["enforce_eager"]
        run_in_a_crowd(llm, CROWD, alone)


@pytest.mark.parametrize("resident", ["all", "none"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_in_a_crowd_a_request_is_itself_alone(alone, resident, enforce_eager):
    """Rows give way to others and to urgent ones, requests are added and aborted while passes run, prompts begin alike,
    and pages move to host memory and back."""
    run(alone, 1, resident=resident, enforce_eager=enforce_eager)


@needs_ranks(2)
def test_in_a_crowd_on_two_ranks_too(alone):
    run(alone, 2, resident="none", enforce_eager=False)
