"""The choice between moving KV over the link and computing it again: by hand, and for an 8B model on an H200."""

import dataclasses

import pytest
from penstock.engine.commands.plan import plan_of
from penstock.engine.config import EngineConfig
from penstock.engine.planning.kv_tier import describe_host_pages, moving, num_host_pages
from penstock.scheduler.cost.moving import Moving
from penstock.scheduler.cost.pass_work import PassWork, StepWork
from penstock.scheduler.cost.time_model import Rates

RATES = Rates(link_gb_s=50.0, memory_gb_s=4000.0, gemm_tflops=800.0, reduce_latency_s=0.0, reduce_gb_s=1.0, source="x")
STEP = StepWork("step", token_flops=8 * 10**9, kv_token_bytes=10**5)  # 10 us a token, and 2 us over the link
WORK = PassWork(streamed_bytes=0, resident_bytes=0, steps=((STEP, 1),))
SHAPE_8B = "benchmarks/shapes/Llama-3-8B.json"


def test_a_token_moves_where_that_is_faster():
    cost = Moving(WORK, RATES, most_tokens=1000)
    assert cost.move_s(100) == pytest.approx(100 * 2e-6)
    assert cost.compute_s(128, beside=128) == pytest.approx(128 * 10e-6, rel=0.01)
    assert cost.pays(100, beside=1) and cost.pays(10**6, beside=1) and cost.pays_both_ways(1)
    for link_gb_s, one_way, both_ways in ((50.0, True, True), (15.0, True, False), (7.0, False, False)):
        slower = dataclasses.replace(cost, rates=dataclasses.replace(RATES, link_gb_s=link_gb_s))
        assert (slower.pays(100, 1), slower.pays_both_ways(1)) == (one_way, both_ways)


def test_where_the_link_binds_nothing_moves():
    """The copies of a pass take 10 ms, in which 1000 tokens are computed, or 896 with their padding."""
    cost = Moving(dataclasses.replace(WORK, streamed_bytes=5 * 10**8), RATES, most_tokens=10**4)
    assert cost.free_tokens == 896
    assert cost.link_binds(800) and not cost.pays(5000, beside=800) and not cost.pays_both_ways(800)
    assert not cost.link_binds(1000) and cost.pays(5000, beside=1000) and cost.pays_both_ways(1000)


@pytest.mark.parametrize(
    ("options", "num_pages", "said"),
    [
        ({"resident": "all"}, 10240, "20.00 GiB   10240 pages of 16 tokens"),
        ({"resident": "none"}, 0, "0 bytes   no page will move: the link is what binds"),
        ({"resident": 0.5}, 0, "the link is what binds"),
        ({"resident": "all", "link_gb_s": 5.0}, 0, "no page will move: to compute them again is as fast"),
    ],
)
def test_an_8b_model_on_an_h200(options, num_pages, said):
    config = EngineConfig(SHAPE_8B, device_profile="h200", kv_host_memory="20GiB", **options)
    plan = plan_of(config)
    cost = moving(config, plan)
    assert num_host_pages(config, plan) == num_pages
    assert said in describe_host_pages(config, plan)
    if num_pages:
        assert cost.move_s(10**6) == pytest.approx(2.4, rel=0.02)  # us a token
        assert cost.compute_s(8000, 100) / 8000 == pytest.approx(23e-6, rel=0.15)
        assert cost.pays(2000, beside=100)
