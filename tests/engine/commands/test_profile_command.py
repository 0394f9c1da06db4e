"""`penstock profile`: shares that add up, Amdahl's bound, rates by hand, and the command on the demo model."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from penstock.engine.commands import cli
from penstock.engine.commands.profile import between, describe_decode, table
from penstock.engine.config import EngineConfig
from penstock.engine.model.families import read_config, read_spec
from penstock.engine.planning.device_profile import load_profile
from penstock.engine.planning.engine_plan import make_engine_plan
from penstock.engine.planning.find_model import find_model
from penstock.engine.profile.pass_profile import profile_pass
from penstock.engine.profile.traced_run import TracedRun
from penstock.engine.runtime.trace import Interval, label
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY

SHAPE = PassShape(2, 2, 100)
STEP_S, COPY_S = 1e-3, 4e-3


@pytest.fixture(scope="module")
def plan():
    path = find_model("demo")
    config = EngineConfig(resident="none", max_num_seqs=4)
    return make_engine_plan(config, read_spec(read_config(path), str(path)), 2, None, load_profile("cpu", 2))


def intervals_of(plan, slower: float = 1.0) -> list[Interval]:
    """Every instruction of the compute lane takes STEP_S, every copy COPY_S, each lane without a gap."""
    clocks, intervals = {}, []
    for instruction in plan.pass_plan.instructions:
        start_s = clocks.get(instruction.lane, 0.5)
        end_s = start_s + (STEP_S if instruction.lane == COMPUTE else COPY_S) * slower
        clocks[instruction.lane] = end_s
        intervals.append(Interval(7, instruction.lane, label(instruction), start_s, end_s))
    return intervals


def test_shares_bounds_and_rates_by_hand(plan):
    measured, predicted = intervals_of(plan), intervals_of(plan, slower=0.5)
    profiled = profile_pass(plan, SHAPE, [measured, intervals_of(plan, slower=1.5)], predicted)
    num_compute = sum(interval.lane == COMPUTE for interval in measured)
    assert profiled.pass_s == pytest.approx(num_compute * STEP_S)
    assert sum(step.share for step in profiled.steps) == pytest.approx(1)
    assert [s.seconds for s in profiled.steps] == sorted((s.seconds for s in profiled.steps), reverse=True)
    steps = {step.step: step for step in profiled.steps}
    up, layers = steps["ffn_up"], plan.spec.num_layers
    assert (up.num_calls, up.seconds) == (layers, pytest.approx(layers * STEP_S))
    assert up.share == pytest.approx(layers / num_compute)
    assert up.at_most == pytest.approx(num_compute / (num_compute - layers))
    assert up.predicted_s == pytest.approx(up.seconds / 2)
    weight_bytes = next(work.weight_bytes for work, _ in plan.steps if work.step == "ffn_up")
    assert up.tflops == pytest.approx(SHAPE.num_tokens * 2 * (weight_bytes / 2) / STEP_S / 1e12)  # bfloat16
    assert weight_bytes / STEP_S / 1e9 < up.gb_s < 1.2 * weight_bytes / STEP_S / 1e9
    assert steps["acquire"].gb_s is None and steps["rope"].tflops is None and steps["rope"].gb_s > 0


def test_the_copy_lane_and_the_slowest_rank(plan):
    profiled = profile_pass(plan, SHAPE, [intervals_of(plan), intervals_of(plan, slower=1.5)], intervals_of(plan))
    num_copies = len(plan.pass_plan.ring.slots)
    lane = profiled.copy_lane
    assert lane.copied_bytes == plan.residency.streamed_bytes > 0
    assert lane.busy_s == pytest.approx(num_copies * COPY_S)
    assert lane.idle_s == pytest.approx(profiled.pass_s - lane.busy_s)
    assert lane.gb_s == pytest.approx(lane.copied_bytes / lane.busy_s / 1e9)
    assert profiled.slowest_rank == 1 and "the slowest, rank 1:" in table("a pass", profiled)


def test_the_command_on_the_demo_model(capsys, tmp_path):
    trace = str(tmp_path / "trace.json")
    options = ("--device", "cpu", "--resident", "0.5", "--trace", trace, "--input-len", "40", "--batch-size", "3")
    assert cli.main(["profile", "demo", *options, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for kind, tokens in (("decode", 3), ("prefill", 120)):
        profiled = shown[kind]
        assert profiled["shape"]["num_tokens"] == tokens and profiled["shape"]["num_rows"] == 3
        assert 0 < sum(step["share"] for step in profiled["steps"]) <= 1 + 1e-9
        assert {"attention", "ffn_down", "head", "sample"} <= {step["step"] for step in profiled["steps"]}
        assert profiled["copy_lane"]["copied_bytes"] > 0 and profiled["predicted_s"] > 0
        assert len(profiled["rank_s"]) == 1 and profiled["slowest_rank"] == 0
    assert 0 < shown["graph_s"] <= shown["period_s"]
    assert 0 <= shown["copy_gap_s"]["median"] <= shown["copy_gap_s"]["largest"]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_table_is_for_people(capsys, tmp_path):
    options = ("--device", "cpu", "--resident", "all", "--trace", str(tmp_path / "t.json"), "--output-len", "3")
    assert cli.main(["profile", "demo", *options]) == 0
    shown = capsys.readouterr().out
    for words in (
        "decode pass of 1 row",
        "prefill pass of 128 tokens",
        "at most",
        "ffn_up",
        " x ",
        "measured rates",
        "the one before",
    ):
        assert words in shown, words
    assert "copy lane" not in shown  # nothing streams


def traced_by_hand() -> TracedRun:
    """A prefill pass, a cold decode pass, a prefill pass, three decode passes of two rows and one of a single row. On
    rank 0 a pass takes 10 ms, its copies the first 8; it starts 1, 2, ... ms after the one before, by its index. Rank 1
    takes twice as long for everything."""
    shapes = [PassShape(n, rows, 9) for n, rows in ((8, 2), (2, 2), (8, 2), (2, 2), (2, 2), (2, 2), (1, 1))]
    intervals, start_ms = [], 5.0
    for index in range(len(shapes)):
        start_ms += index
        for lane, begin, end in ((COMPUTE, 0, 6), (COPY, 1, 4), (COPY, 4, 8), (COMPUTE, 6, 10)):
            intervals.append(Interval(index, lane, "x", (start_ms + begin) / 1e3, (start_ms + end) / 1e3))
        start_ms += 10
    slower = [replace(interval, start_s=2 * interval.start_s, end_s=2 * interval.end_s) for interval in intervals]
    return TracedRun(SimpleNamespace(tp_size=2), shapes, 2, {(0, False): intervals, (1, False): slower})


def test_what_lies_between_decode_passes():
    traced = traced_by_hand()
    times = traced.decode_times(rank=0)
    assert times.graph_s == pytest.approx(10e-3) and times.period_s == pytest.approx((14 + 15) / 2 * 1e-3)
    assert times.copy_gaps_s == pytest.approx([7e-3, 8e-3])  # the copies start 1 ms late and end 2 ms early
    assert between(traced) == {
        "graph_s": pytest.approx(10e-3),
        "period_s": pytest.approx(14.5e-3),
        "copy_gap_s": {"median": pytest.approx(15e-3), "largest": pytest.approx(16e-3)},
    }
    assert traced.describe_gaps() == [
        "rank 0: the copy lane idles 7.500 ms between consecutive decode passes (median of 2)",
        "rank 1: the copy lane idles 15.000 ms between consecutive decode passes (median of 2)",
    ]
    (line,) = describe_decode(traced)
    assert "starts 14.500 ms after" in line and "takes 10.000 ms" in line


def test_a_last_pass_that_takes_long_makes_no_pass_longer_than_its_period():
    """It is in no period: both medians are those of the same passes."""
    traced = traced_by_hand()
    lane = [replace(one, end_s=one.end_s + 1.0) if one.pass_index == 4 else one for one in traced.intervals[0, False]]
    two = replace(traced, shapes=traced.shapes[:5], intervals=traced.intervals | {(0, False): lane})
    times = two.decode_times(rank=0)
    assert times.graph_s == pytest.approx(10e-3) and times.period_s == pytest.approx(14e-3)


def test_a_single_decode_pass_has_nothing_behind_it():
    traced = traced_by_hand()
    alone = replace(traced, shapes=traced.shapes[:4])
    assert describe_decode(alone) == alone.describe_gaps() == []
    assert between(alone) == {"graph_s": pytest.approx(10e-3), "period_s": None, "copy_gap_s": None}


@pytest.mark.parametrize(
    "flag, value", [("input-len", "1"), ("output-len", "1"), ("batch-size", "0"), ("batch-size", "65537")]
)
def test_a_workload_without_both_kinds_of_pass_is_refused(capsys, tmp_path, monkeypatch, flag, value):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "demo", "--device", "cpu", f"--{flag}", value]) == 2
    assert f"{flag.replace('-', '_')}={value}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
