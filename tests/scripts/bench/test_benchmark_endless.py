"""The benchmark scripts.bench.endless on the demo model: stretches, ratios, and refusals."""

import json
import sys

import pytest
import torch
from penstock.engine.runtime.pass_times import Timed
from penstock.scheduler.cost.pass_work import PassShape

from scripts.bench import endless as benchmark_endless
from scripts.bench.endless import Stretches
from scripts.bench.entry import run_script
from scripts.report.page import Record, render

ENGINE = ("--model", "demo", "--device", "cpu", "--dtype", "float32", "--load-format", "dummy")
SINKS = ("--attention-sinks", "4", "--attention-window", "28")


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark_endless", *ENGINE, *arguments])
    return run_script(benchmark_endless.main)


def test_a_record(monkeypatch, capsys):
    assert run(monkeypatch, *SINKS, "--input-len", "8", "--output-len", "131", "--every", "26") == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = record["rows"]
    assert [row["output_tokens"] for row in rows] == [26, 52, 78, 104, 130]  # the prefill gives the first token
    assert all(row["decode_pass_s"] > 0 and row["resident_set_bytes"] > 2**26 for row in rows)
    assert all(row["device_bytes"] is None for row in rows) and record["device_growth_bytes"] is None
    first, last = rows[1], rows[-1]  # the first stretch begins before all of the cache is full
    assert record["last_pass_over_first"] == pytest.approx(last["decode_pass_s"] / first["decode_pass_s"])
    assert record["resident_set_growth_bytes"] == last["resident_set_bytes"] - first["resident_set_bytes"]
    assert (record["attention_sinks"], record["attention_window"], record["eviction_tokens"]) == (4, 28, 16)
    assert (
        record["kv_bytes_per_rank"] == 4 * 2 * 4 * 16 * 4 * 32 * 4
    )  # layers, K and V, pages with page 0, S, K, E, fp32
    assert record["fraction_of_bound"] == pytest.approx(record["bound_s"] / record["decode_pass_s"])
    assert "| 26 |" in render([Record("endless.json", record)])


def test_only_decode_passes_count():
    stretches = Stretches(2, torch.device("cpu"))
    prefill, short, long = PassShape(9, 1, 0), PassShape(1, 1, 9), PassShape(1, 1, 30)
    for shape, measured_s in ((prefill, 9.0), (short, 1.0), (long, 3.0), (short, 7.0)):
        stretches.append(Timed(shape, measured_s, None, 0.0))
    assert [row["decode_pass_s"] for row in stretches.rows] == [2.0]
    assert stretches.shape is long


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "--attention-window: without one a sequence ends where the KV cache does"),
        ((*SINKS, "--output-len", "40", "--every", "30"), "--output-len 40: expected two stretches of 30 tokens"),
    ],
)
def test_what_it_refuses(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
