"""Sums through symmetric memory on several GPUs: right, counted, the same bits on all ranks, eagerly and in a graph;
and no hang at the end, where graphs have a communicator of their own."""

import json
from pathlib import Path

import pytest

from tests.support.commands import run_ranks
from tests.support.gpu.enough import needs_ranks, with_marks

pytestmark = pytest.mark.gpu
RANK_SCRIPT = Path(__file__).parents[1] / "support/gpu/symmetric_ranks.py"


@pytest.mark.parametrize("tp_size", with_marks(needs_ranks, 2, 4))
def test_sums_of_every_size(tmp_path, tp_size):
    run_ranks(tp_size, RANK_SCRIPT, tmp_path / "report.json", timeout=180)
    report = json.loads((tmp_path / "report.json").read_text())
    for row in report["rows"]:
        dtype, nbytes, ways = row["dtype"], row["bytes"], row["ways"]
        print(f"{dtype:>15} {nbytes:>9} bytes {row['microseconds']:8.1f} us in a graph, symmetric: {bool(ways)}")
        assert row["close"] and row["same_on_all"] and row["graph_is_eager"], row
        least = 4096 if "16" in dtype else 30  # of which 28 bytes are whole elements, and whole words
        assert ways == (least <= nbytes <= 16 << 20), (dtype, nbytes)
    for nbytes, microseconds in report["two_shot"].items():
        print(f" torch.bfloat16 {nbytes:>9} bytes {microseconds:8.1f} us in a graph, torch's two-shot and its copies")
