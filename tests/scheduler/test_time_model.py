"""Time model: profiles, the bounds of a pass by hand, and the replay of a plan on two clocks."""

import json

import pytest

from scheduler.pass_work import PassShape, PassWork
from scheduler.plan_build import default_ring_bytes, lay_out_ring, make_plan
from scheduler.step_plan import Compute, GroupId, RingLayout
from scheduler.time_model import (
    Rates,
    free_tokens,
    load_profile,
    predict_pass,
    predict_timeline,
    timeline_s,
)

RATES = Rates(link_gb_s=50.0, memory_gb_s=4000.0, gemm_tflops=800.0, reduce_latency_s=0.0, reduce_gb_s=1.0, source="x")
WORK = PassWork(
    streamed_bytes=10 * 10**9,
    resident_bytes=6 * 10**9,
    token_flops=16 * 10**9,
    row_flops=10**9,
    attention_flops=0,
    kv_token_bytes=10**5,
    num_reduces=0,
    reduce_token_bytes=0,
    num_steps=0,
)


def work(**changes) -> PassWork:
    return PassWork(**{**WORK.__dict__, **changes})


def rates(**changes) -> Rates:
    return Rates(**{**RATES.__dict__, **changes})


def test_h200_link_is_shared_by_the_ranks():
    assert [load_profile("h200", n).link_gb_s for n in (1, 2, 3, 4)] == [55.1, 53.1, 48.1, 40.4]
    assert load_profile("h200", 8).link_gb_s == pytest.approx(40.4 / 2)
    assert load_profile("h200").source == "assumed: h200"
    assert load_profile("cpu").memory_bytes is None


def test_a_given_link_wins_and_is_said():
    given = load_profile("h200", 4, link_gb_s=25.0)
    assert given.link_gb_s == 25.0 and "as given" in given.source


def test_a_profile_from_a_file(tmp_path):
    file = tmp_path / "mine.json"
    values = {"memory_gb_s": 900, "gemm_tflops": 150, "reduce_latency_s": 0, "reduce_gb_s": 20}
    file.write_text(json.dumps({**values, "link_gb_s": [25, 20], "source": "measured on a desk"}))
    assert load_profile(str(file), 2).link_gb_s == 20
    assert load_profile(str(file), 1).source == "measured on a desk"


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"link_gb_s": 1}', "gemm_tflops|memory_gb_s|reduce_gb_s|reduce_latency_s"),
        ('{"link_gbs": 1}', "unknown field 'link_gbs'"),
    ],
)
def test_a_bad_profile_names_file_and_field(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_profile(str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize("field", ["link_gb_s", "memory_gb_s", "gemm_tflops", "reduce_latency_s", "reduce_gb_s"])
@pytest.mark.parametrize("value", [-1, "fast", True, None, [], [1, -1], float("inf")])
def test_a_bad_value_is_named(tmp_path, field, value):
    good = dict.fromkeys(("link_gb_s", "memory_gb_s", "gemm_tflops", "reduce_latency_s", "reduce_gb_s"), 1)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(good | {field: value}))
    with pytest.raises(ValueError, match=field):
        load_profile(str(file))


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(ValueError, match="h200, cpu"):
        load_profile("h2000")


def test_a_streamed_pass_is_as_long_as_its_copies():
    time = predict_pass(WORK, PassShape(1, 1, 1000), RATES)
    assert time.bound == "link"
    assert time.total_s == time.link_s == pytest.approx(10 / 50)
    assert time.memory_s == pytest.approx((16e9 + 1001 * 1e5) / 4e12)
    assert time.compute_s == pytest.approx(17e9 / 8e14)


def test_a_resident_pass_is_bound_by_memory_then_by_compute():
    still = work(streamed_bytes=0)
    few = predict_pass(still, PassShape(1, 1, 0), RATES)
    many = predict_pass(still, PassShape(4000, 1, 0), RATES)
    assert (few.bound, many.bound) == ("memory", "compute")
    assert many.total_s == pytest.approx((4000 * 16e9 + 1e9) / 8e14)


def test_reduces_add_to_the_compute_lane_only():
    reducing = work(num_reduces=10, reduce_token_bytes=1000)
    slow = rates(reduce_latency_s=1e-3)
    streamed = predict_pass(reducing, PassShape(1, 1, 0), slow)
    resident = predict_pass(work(streamed_bytes=0, num_reduces=10, reduce_token_bytes=1000), PassShape(1, 1, 0), slow)
    assert streamed.total_s == streamed.link_s
    assert resident.reduce_s == pytest.approx(10 * (1e-3 + 1e-6))
    assert resident.total_s == pytest.approx(resident.memory_s + resident.reduce_s)


def test_attention_flops_grow_with_queries_and_context():
    attention = work(attention_flops=1000)
    one = (
        predict_pass(attention, PassShape(1, 1, 500), RATES).compute_s
        - predict_pass(WORK, PassShape(1, 1, 500), RATES).compute_s
    )
    assert one == pytest.approx(501 * 1000 / 8e14)


def test_nothing_hides_the_latency_of_a_pass():
    base = predict_pass(WORK, PassShape(1, 1, 0), RATES).total_s
    assert predict_pass(WORK, PassShape(1, 1, 0), rates(pass_latency_s=0.5)).total_s == pytest.approx(base + 0.5)


def test_free_tokens_end_where_compute_reaches_the_link():
    assert free_tokens(WORK, RATES) == int((0.2 * 8e14 - 1e9) / 16e9)
    assert free_tokens(work(streamed_bytes=0), RATES) == 0
    more = free_tokens(WORK, RATES) + 1
    assert predict_pass(WORK, PassShape(more, 1, 0), RATES).bound == "compute"


def two_layers():
    """Four groups of 1e9 bytes, a step each, then a step without weights: (steps, streamed)."""
    groups = [GroupId(i // 2, ("attn", "ffn")[i % 2]) for i in range(4)]
    steps = [Compute(f"read {g}", g.layer_idx, g, ()) for g in groups] + [Compute("sample", 2, None, ())]
    return steps, [(g, 10**9) for g in groups]


def test_the_timeline_by_hand():
    """1 s a copy, 0.25 s a step; the ring holds two, both wrapped, so that each copy waits for one release.

    compute | g0 .25 | g1 .25 |  waits to 1.25 | g2 .25 | waits to 2.25 | g3 .25 | sample .25 | joins at 4.25
    copy    | -- .25 | g2 to 1.25 | g3 to 2.25 | g0 to 3.25 | g1 to 4.25
    """
    steps, streamed = two_layers()
    plan = make_plan(steps, lay_out_ring(streamed, 2 * 10**9))
    spans = predict_timeline(plan, lambda step: 0.25, rates(link_gb_s=1.0))
    assert len(spans) == len(plan.instructions)
    named = {span.name: (span.start_s, span.end_s) for span in spans}
    assert named["prefetch 1.attn"] == (0.25, 1.25)
    assert named["prefetch 1.ffn"] == (1.25, 2.25)
    assert named["prefetch 0.ffn (next pass)"] == (3.25, 4.25)
    assert named["acquire 1.attn"] == (0.5, 1.25)
    assert named["read 1.attn"] == (1.25, 1.5)
    assert named["sample"] == (2.5, 2.75)
    assert named["join"] == (2.75, 4.25)
    assert timeline_s(spans) == spans[-1].end_s == 4.25


def test_the_timeline_of_a_resident_pass_is_the_sum_of_its_steps():
    steps, _ = two_layers()
    spans = predict_timeline(make_plan(steps, RingLayout(0, 0, ())), lambda step: 0.25, RATES)
    assert timeline_s(spans) == 1.25 and {span.lane for span in spans} == {"compute"}


def test_lanes_never_overlap_themselves():
    steps, streamed = two_layers()
    plan = make_plan(steps, lay_out_ring(streamed, default_ring_bytes(streamed)))
    spans = predict_timeline(plan, lambda step: 0.1, RATES)
    for lane in ("compute", "copy"):
        mine = [span for span in spans if span.lane == lane]
        assert all(a.end_s <= b.start_s for a, b in zip(mine, mine[1:], strict=False))
