"""Fused and plain pushed sums over real ranks: right, the same bits everywhere and in each of many replays, fast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.model.fusion import MOST_FUSED_WIDTH

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_real_ranks(tmp_path):
    ranks, out = min(torch.cuda.device_count(), 4), tmp_path / "report.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [*launcher, "-m", "gpu.push_reduce_ranks", str(out)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, timeout=180)
    report = json.loads(out.read_text())
    assert report["right"] and all(report["right"].values()), report["right"]
    assert report["wrong_replays"] == 0
    small = [row for row in report["latencies"] if row["nbytes"] <= 65536]
    assert all(row["push_us"] < row["one_shot_us"] for row in small)
    narrow = [row for row in small if row["width"] <= MOST_FUSED_WIDTH]
    assert all(row["fused_us"] < 1.05 * row["push_then_norm_us"] for row in narrow)
