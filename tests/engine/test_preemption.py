"""Rows that give way and come back, through the loop: each request is as it would be alone, with room for all."""

from dataclasses import replace

import pytest

from penstock import LLM
from tests.support import rows_giving_way
from tests.support.rows_giving_way import FEW_PAGES, PARAMS, PROMPTS, assert_each_gives_way_and_is_as_alone

ON_CPU = rows_giving_way.OPTIONS | {"device": "cpu"}


@pytest.fixture(scope="module")
def alone():
    return rows_giving_way.each_alone("cpu")


@pytest.mark.parametrize(
    ("debug", "options"),
    [
        ({}, {"resident": "all"}),
        ({"lookahead": 1}, {"resident": "all", "enable_prefix_caching": False}),
        ({"lookahead": 1}, {"resident": "none", "enable_prefix_caching": False}),
        ({"lookahead": 1, "as_on_gpu": True, "page_order_seed": 3}, {}),
    ],
)
def test_each_request_is_as_alone(alone, debug, options):
    """Passes are submitted one by one, ahead of the tokens, or announced."""
    with LLM("demo", **ON_CPU, **options, **FEW_PAGES, debug=debug) as llm:
        assert_each_gives_way_and_is_as_alone(llm, alone)


@pytest.mark.timeout(120)
def test_each_request_is_as_alone_on_two_ranks(alone):
    """The other rank hears of it by what changed in the rows."""
    with LLM("demo", **ON_CPU, tensor_parallel_size=2, **FEW_PAGES, enable_prefix_caching=False) as llm:
        assert_each_gives_way_and_is_as_alone(llm, alone)


def test_priorities_are_for_the_policy_of_that_name(alone):
    """The first of them runs when the others come, and gives way to the most urgent."""
    params = [replace(own, priority=priority) for own, priority in zip(PARAMS, (3, 2, 1, 0, -1, 2), strict=True)]
    with (
        LLM("demo", **ON_CPU, max_num_seqs=1) as llm,
        pytest.raises(ValueError, match="^prompt 0: priority=3: .*--scheduling-policy priority"),
    ):
        llm.generate(PROMPTS, params)
    with LLM("demo", **ON_CPU, max_num_seqs=1, scheduling_policy="priority") as llm:
        ended, sequences = [], [llm.sequences(*one)[0] for one in zip(PROMPTS, params, strict=True)]
        llm.loop.add(sequences[0])
        llm.loop.advance()
        for sequence in sequences[1:]:
            llm.loop.add(sequence)
        while llm.loop.has_unfinished:
            ended += [sequences.index(event.sequence) for event in llm.loop.advance() if event.is_last]
        assert ended == [4, 3, 2, 1, 5, 0] and llm.loop.scheduler.counts.num_preemptions == 1
        assert [sequence.output().token_ids for sequence in sequences] == [one.token_ids for one in alone]
