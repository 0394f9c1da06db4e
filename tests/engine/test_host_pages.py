"""KV pages that move to host memory and back, through the loop: each request is as it would be alone."""

import pytest
from penstock.engine.config import EngineConfig

from penstock import LLM, SamplingParams
from tests.support.rows_giving_way import (
    FEW_PAGES,
    OPTIONS,
    assert_as_alone,
    assert_rows_gave_way,
    each_alone,
    generate_twice_each,
)

ON_CPU = OPTIONS | {"device": "cpu", "kv_host_memory": "4MiB"}


@pytest.fixture(scope="module")
def alone():
    return each_alone("cpu")


def assert_moved(llm) -> None:
    """Asserts that pages moved both ways, as many as every rank counted, and that none is lost."""
    scheduler, transfers = llm.loop.scheduler, llm.engine.transfers
    moves = scheduler.counts.to_dict()["moves"]
    assert moves["num_out"] > 20 and moves["num_in"] > 2
    for rank in transfers:
        operations = rank["kv_pages"]["operations"]
        assert operations["kv_out"] == {
            "num_calls": moves["num_out"],
            "sent_bytes": 0,
            "received_bytes": moves["out_bytes"],
        }
        assert operations["kv_in"] == {
            "num_calls": moves["num_in"],
            "sent_bytes": moves["in_bytes"],
            "received_bytes": 0,
        }
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("lookahead", "options"),
    [
        (0, {"debug": {"lanes": "latest", "poison": True}}),
        (1, {"debug": {"as_on_gpu": True, "page_order_seed": 3, "lanes": "random", "poison": True}}),
        (1, {"resident": "none", "link_gb_s": 1e4, "debug": {"lanes": "random", "poison": True}}),
        (1, {"kv_host_memory": "40KiB"}),
    ],
)
def test_each_request_is_as_alone(alone, lookahead, options):
    """Passes are submitted one by one, ahead of the tokens, or announced, by rates at which the link never binds; host
    memory has room for all, or little."""
    debug = options.get("debug", {}) | {"lookahead": lookahead}
    with LLM("demo", **ON_CPU | options | {"debug": debug}, **FEW_PAGES) as llm:
        assert_as_alone(generate_twice_each(llm), alone)
        assert_rows_gave_way(llm)
        assert_moved(llm)


@pytest.mark.timeout(120)
def test_each_request_is_as_alone_on_two_ranks(alone):
    with LLM("demo", **ON_CPU, tensor_parallel_size=2, **FEW_PAGES) as llm:
        assert_as_alone(generate_twice_each(llm), alone)
        assert_rows_gave_way(llm)
        assert_moved(llm)


def test_where_the_link_binds_nothing_moves_and_is_counted(alone):
    with LLM("demo", **ON_CPU, **FEW_PAGES, resident="none", link_gb_s=0.001) as llm:
        assert llm.engine.worker.runner.mover is None
        assert_as_alone(generate_twice_each(llm), alone)
        moves = llm.loop.scheduler.counts.moves
        assert moves.num_out == moves.num_in == 0 and moves.num_not_moved > 20
        assert moves.describe()


def test_it_needs_the_prefix_cache():
    with pytest.raises(ValueError, match="kv_host_memory=1048576 with enable_prefix_caching=False: pages there"):
        EngineConfig(kv_host_memory="1MiB", enable_prefix_caching=False)


def test_measured_rates_decide_what_moves_and_how_passes_are_filled():
    with LLM("demo", **ON_CPU, **FEW_PAGES, resident="none") as llm:
        host, composer = llm.loop.scheduler.cache.host, llm.loop.scheduler.composer
        assumed = llm.engine.rates
        assert host.pays.__self__.rates == composer.filling.rates == assumed and assumed.source.startswith("assumed")
        llm.measure(link_bytes=2**20)
        measured = llm.engine.rates
        assert host.pays.__self__.rates == composer.filling.rates == measured and measured.source.startswith("measured")


def test_a_reset_forgets_both_tiers():
    params = SamplingParams(max_tokens=1)
    with LLM("demo", **ON_CPU, **FEW_PAGES) as llm:
        prompts = [[id] * 41 for id in range(3, 6)]
        llm.generate(prompts, params)
        assert [one.num_cached_tokens for one in llm.generate(prompts, params)] == [40] * 3
        llm.reset_prefix_cache()
        assert [one.num_cached_tokens for one in llm.generate(prompts, params)] == [0] * 3
