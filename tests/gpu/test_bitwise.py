"""Streamed == resident and graph == eager, bit by bit, with poisoned slots, in every family, on one, two and four GPUs;
and the tokens of several ranks are those of one."""

import json
from pathlib import Path

import pytest

from tests.support.commands import run_ranks
from tests.support.gpu.bitwise_ranks import HUNDREDS, LENGTHS, SINKS, logits_of
from tests.support.gpu.enough import needs_ranks, with_marks
from tests.support.oracle.checkpoints import write_checkpoint

pytestmark = pytest.mark.gpu
FAMILIES = ("llama_gqa", "llama_tied", "mistral_window", "qwen2", "qwen3", "neox_parallel")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in FAMILIES:
        write_checkpoint(folder / name, name, "float32", hidden_size=256, intermediate_size=384)
    return folder


def reports(checkpoints: Path, out: Path, num_ranks: int) -> list[dict]:
    """The findings of each rank."""
    run_ranks(num_ranks, "-m", "tests.support.gpu.bitwise_ranks", checkpoints, out, timeout=280)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def assert_same_bits(report: dict) -> None:
    assert {name.split()[0] for name in report} == {*FAMILIES, "buckets", "hundreds"}
    for case, found in report.items():
        assert all(found["same"].values()), (case, found["same"])
        assert found["num_passes"] >= (HUNDREDS if case == "hundreds" else max(LENGTHS))


def test_one_rank(checkpoints, tmp_path):
    assert_same_bits(reports(checkpoints, tmp_path, 1)[0])


def tokens_of_one_rank(checkpoint: Path, **options) -> list[list[int]]:
    _, tokens = logits_of(str(checkpoint), LENGTHS, dtype="float32", resident="all", **options)
    return tokens


@pytest.mark.parametrize("num_ranks", with_marks(needs_ranks, 2, 4))
def test_several_ranks(checkpoints, tmp_path, num_ranks):
    found = reports(checkpoints, tmp_path, num_ranks)
    for report in found:
        assert_same_bits(report)
    for name in FAMILIES:
        tokens = tokens_of_one_rank(checkpoints / name)
        assert [report[f"{name} float32"]["tokens"] for report in found] == [tokens] * num_ranks, name
    tokens = tokens_of_one_rank(checkpoints / "neox_parallel", **SINKS)
    assert [report["neox_parallel sinks float32"]["tokens"] for report in found] == [tokens] * num_ranks
