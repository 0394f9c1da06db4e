"""The h200 profile against what H200s measured: linears in a graph, all-reduces, decode passes, streamed passes.

Figures without a file are those of docs/log.md; the others are records of benchmarks/.
"""

import json
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.model.families import read_config, read_spec
from engine.planning import EnginePlan, decode_time, make_engine_plan, pass_work, step_seconds
from scheduler.pass_work import PassShape
from scheduler.time_model import load_profile, reduce_s, step_s
from scheduler.timeline import predict_timeline, timeline_s

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LINEARS = {"attn_qkv", "attn_output", "ffn_up", "ffn_down", "head"}
KIB, MIB = 2**10, 2**20


def plan_of(model: str, tp_size: int, resident: str | float = "all") -> EnginePlan:
    path = BENCHMARKS / "shapes" / f"{model}.json"
    config = EngineConfig(model=str(path), resident=resident)
    return make_engine_plan(config, read_spec(read_config(path), str(path)), tp_size, 141 * 10**9, rates(tp_size))


def rates(tp_size: int):
    return load_profile("h200", tp_size)


@pytest.mark.parametrize(
    "model, tp_size, num_tokens, measured_ms",
    [
        ("Llama-3-8B", 1, 1, 3.84),  # one token: the engine's own linear; more: cuBLAS
        ("Llama-3-8B", 1, 64, 4.29),
        ("Llama-3-8B", 1, 256, 6.50),
        ("Llama-3-8B", 1, 2000, 41.7),
        ("Llama-3-8B", 4, 1, 1.20),
        ("Llama-3-70B", 4, 1, 8.55),
    ],
)
def test_linears_of_a_pass_in_a_graph(model, tp_size, num_tokens, measured_ms):
    shape = PassShape(num_tokens, num_tokens, 0)
    steps = [(step, count) for step, count in plan_of(model, tp_size).steps if step.step.split("+")[0] in LINEARS]
    predicted_s = sum(count * step_s(step, shape, rates(tp_size)) for step, count in steps)
    assert predicted_s * 1e3 == pytest.approx(measured_ms, rel=0.07)


@pytest.mark.parametrize("batch, measured_ms", [(1, (4.38, 4.52)), (64, (5.26, 5.88)), (256, (8.09, 8.31))])
def test_resident_decode_passes_of_one_rank(batch, measured_ms):
    """What two versions of the host's loop measured: the better one within a tenth."""
    predicted_s = decode_time(pass_work(plan_of("Llama-3-8B", 1)), batch, 49, rates(1)).total_s
    assert predicted_s * 1e3 == pytest.approx(min(measured_ms), rel=0.1)


@pytest.mark.parametrize(
    "nbytes, measured_us",
    [(4 * KIB, 8.0), (16 * KIB, 8.7), (64 * KIB, 9.6), (MIB, 13.6), (4 * MIB, 30), (16 * MIB, 93), (64 * MIB, 325)],
)
def test_reduces_of_four_ranks(nbytes, measured_us):
    """256 KiB, the last that goes one-shot, takes 11.8 us: 17 % more than this line."""
    assert reduce_s(nbytes, rates(4)) * 1e6 == pytest.approx(measured_us, rel=0.1)


@pytest.mark.parametrize(
    "record, resident", [("streamed_1rank", "none"), ("half_1rank", 0.5), ("streamed_2ranks", "none")]
)
def test_streamed_passes_are_the_records(record, resident):
    record = json.loads((BENCHMARKS / f"decode_llama3_8b_{record}.json").read_text())
    work = pass_work(plan_of(record["model"], record["tp_size"], resident))
    for row in record["passes"]:
        predicted = decode_time(work, row["batch_size"], record["input_len"], rates(record["tp_size"]))
        assert predicted.bound == "link"
        assert predicted.total_s == pytest.approx(row["decode_pass_s"], rel=0.02)


@pytest.mark.parametrize("tp_size, batch", [(1, 1), (1, 256), (4, 64)])
def test_the_replayed_plan_is_the_pass(tp_size, batch):
    """Where nothing streams both are the sum of the same steps."""
    plan = plan_of("Llama-3-8B", tp_size)
    shape = PassShape(batch, batch, 49 * batch)
    replayed = timeline_s(predict_timeline(plan.step_plan, step_seconds(plan, shape), plan.rates))
    whole = decode_time(pass_work(plan), batch, 49, plan.rates).total_s
    assert replayed + plan.rates.pass_latency_s == pytest.approx(whole)
