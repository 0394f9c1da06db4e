"""Fused and plain pushed sums over real ranks: right, the same bits everywhere and in each of many replays, fast."""

import json

import pytest
import torch
from penstock.engine.model.fusion import MOST_FUSED_WIDTH

from tests.support.commands import run_ranks
from tests.support.gpu.enough import needs_gpus

pytestmark = pytest.mark.gpu


@needs_gpus(2)
def test_real_ranks(tmp_path):
    ranks, out = min(torch.cuda.device_count(), 4), tmp_path / "report.json"
    run_ranks(ranks, "-m", "tests.support.gpu.push_reduce_ranks", out, timeout=180)
    report = json.loads(out.read_text())
    assert report["right"] and all(report["right"].values()), report["right"]
    assert report["wrong_replays"] == 0
    small = [row for row in report["latencies"] if row["nbytes"] <= 65536]
    assert all(row["push_us"] < row["one_shot_us"] for row in small)
    narrow = [row for row in small if row["width"] <= MOST_FUSED_WIDTH]
    assert all(row["fused_us"] < 1.05 * row["push_then_norm_us"] for row in narrow)
