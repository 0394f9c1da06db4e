"""An LLM whose ranks are on two hosts, two on each: what they compute, count and write."""

import json
from pathlib import Path

import pytest
from penstock.engine.runtime.trace import read_intervals

from penstock import LLM
from tests.support.forked_ranks import fork_ranks
from tests.support.host_runs import ON, PARAMS, PROMPT

RANKS, HOSTS = 4, 2
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    done = fork_ranks(RANKS, "-m", "tests.support.host_runs", folder, "cpu", timeout=100, hosts=HOSTS)
    assert done.all_ended, done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


def test_tokens_are_those_of_one_rank(ranks):
    with LLM("demo", **ON["cpu"]) as llm:
        (output,) = llm.generate(PROMPT, PARAMS)
    assert [rank["num_hosts"] for rank in ranks] == [HOSTS] * RANKS
    assert [rank["tokens"] for rank in ranks] == [output.outputs[0].token_ids] * RANKS


def test_what_a_host_has_is_shared_by_its_own_ranks(ranks):
    """Its memory, and what its links get at once: two ranks of an assumed CPU copy at 5 GB/s each, four at 2.5."""
    assert [rank["ranks_that_share_memory"] for rank in ranks] == [[RANKS // HOSTS]] * RANKS
    assert {rank["link_gb_s"] for rank in ranks} == {5.0}


def test_the_trace_of_all_ranks_is_on_rank_0s_host_alone(folder):
    intervals = read_intervals(str(folder / "host0" / "trace.json"))
    assert {rank for rank, _ in intervals} == set(range(RANKS))
    numbers = {len(intervals[rank, predicted]) for rank, predicted in intervals if not predicted}
    assert len(numbers) == 1 and numbers.pop() > 0
    assert [path.name for path in folder.glob("host*/*")] == ["trace.json"]
