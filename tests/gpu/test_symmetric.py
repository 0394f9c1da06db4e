"""Sums through symmetric memory on several GPUs: right, counted, the same bits on all ranks, eagerly and in a graph;
those that its buffer does not hold in pieces; and no hang at the end, where graphs have a communicator of their own."""

import json
from pathlib import Path

import pytest
import torch

from tests.support.commands import run_ranks

pytestmark = pytest.mark.gpu
RANK_SCRIPT = Path(__file__).parents[1] / "support/gpu/symmetric_ranks.py"


@pytest.mark.parametrize("tp_size", [2, 4])
def test_sums_of_every_size(tmp_path, tp_size):
    if torch.cuda.device_count() < tp_size:
        pytest.skip(f"needs {tp_size} CUDA devices")
    run_ranks(tp_size, RANK_SCRIPT, tmp_path / "report.json", timeout=180)
    report = json.loads((tmp_path / "report.json").read_text())
    for row in report["rows"]:
        dtype, nbytes, ways = row["dtype"], row["bytes"], row["ways"]
        print(f"{dtype:>15} {nbytes:>9} bytes {row['microseconds']:8.1f} us in a graph, symmetric: {bool(ways)}")
        assert row["close"] and row["same_on_all"] and row["graph_is_eager"], row
        least = 4096 if "16" in dtype else 30  # of which 28 bytes are whole elements, and whole words
        most = 1 << 20 if dtype == "torch.float16" else 16 << 20
        assert ways == (least <= nbytes <= most), (dtype, nbytes)
    pieces = report["pieces"]
    print(f" torch.bfloat16  67108864 bytes {pieces['microseconds']:8.1f} us in a graph, in pieces")
    assert pieces["close"] and pieces["same_on_all"] and pieces["graph_is_eager"] and pieces["whole_is_cut"]
    assert pieces["ways"] == 5  # 64 MiB eagerly, in a warm-up and in a capture; 16 MiB whole and cut
