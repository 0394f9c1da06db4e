"""The replay of a plan on two clocks, by hand."""

from dataclasses import replace

import pytest
from penstock.engine.planning.device_profile import load_profile
from penstock.scheduler.cost.timeline import predict_timeline, timeline_s
from penstock.scheduler.passes.build import default_ring_bytes, lay_out_ring, make_plan
from penstock.scheduler.passes.pass_plan import Compute, GroupId, RingLayout

RATES = load_profile("h200")


def two_layers():
    """Steps and streamed groups: four groups of 1e9 bytes with a step each, then a step without weights."""
    groups = [GroupId(i // 2, ("attn", "ffn")[i % 2]) for i in range(4)]
    steps = [Compute(f"read {g}", g.layer_idx, g, ()) for g in groups] + [Compute("sample", 2, None, ())]
    return steps, [(g, 10**9) for g in groups]


def test_the_timeline_by_hand():
    """A copy takes 1 s, a step 0.25 s; the ring holds two groups, both wrapped, so that each copy waits for a release.

    compute | g0 .25 | g1 .25 |  waits to 1.25 | g2 .25 | waits to 2.25 | g3 .25 | sample .25 | joins at 4.25
    copy    | -- .25 | g2 to 1.25 | g3 to 2.25 | g0 to 3.25 | g1 to 4.25
    """
    steps, streamed = two_layers()
    plan = make_plan(steps, lay_out_ring(streamed, 2 * 10**9))
    intervals = predict_timeline(plan, lambda step: 0.25, replace(RATES, link_gb_s=1.0))
    assert len(intervals) == len(plan.instructions)
    named = {interval.name: (interval.start_s, interval.end_s) for interval in intervals}
    assert named["prefetch 1.attn"] == (0.25, 1.25)
    assert named["prefetch 1.ffn"] == (1.25, 2.25)
    assert named["prefetch 0.ffn (next pass)"] == (3.25, 4.25)
    assert named["acquire 1.attn"] == (0.5, 1.25)
    assert named["read 1.attn"] == (1.25, 1.5)
    assert named["sample"] == (2.5, 2.75)
    assert named["join"] == (2.75, 4.25)
    assert timeline_s(intervals) == intervals[-1].end_s == 4.25


def test_the_timeline_of_a_resident_pass_is_the_sum_of_its_steps():
    steps, _ = two_layers()
    intervals = predict_timeline(make_plan(steps, RingLayout(0, 0, ())), lambda step: 0.25, RATES)
    assert timeline_s(intervals) == 1.25 and {interval.lane for interval in intervals} == {"compute"}


def test_a_step_starts_no_sooner_than_it_was_launched():
    """Steps are launched at 0.3, 0.6, ... 1.5 s; each takes 0.25 s, the last one 1 s."""
    steps, _ = two_layers()
    plan = make_plan(steps, RingLayout(0, 0, ()))
    intervals = predict_timeline(plan, lambda step: 1.0 if step.step == "sample" else 0.25, RATES, launch_s=0.3)
    assert [interval.start_s for interval in intervals] == pytest.approx([0.3, 0.6, 0.9, 1.2, 1.5])
    assert timeline_s(intervals) == pytest.approx(2.5)


def test_lanes_never_overlap_themselves():
    steps, streamed = two_layers()
    plan = make_plan(steps, lay_out_ring(streamed, default_ring_bytes(streamed)))
    intervals = predict_timeline(plan, lambda step: 0.1, RATES)
    for lane in ("compute", "copy"):
        mine = [interval for interval in intervals if interval.lane == lane]
        assert all(a.end_s <= b.start_s for a, b in zip(mine, mine[1:], strict=False))
