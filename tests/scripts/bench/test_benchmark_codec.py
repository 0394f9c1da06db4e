"""The benchmark of the lossless compression on few rows: every source is measured, recorded and rendered."""

import json
import math
import sys

import pytest
import torch
from penstock.engine.measure import rates as measure
from penstock.engine.weights.checkpoint import FILE_DTYPES
from penstock.engine.weights.gguf_file import read_gguf

from scripts.bench import codec as benchmark_codec
from scripts.report.page import Record, render
from tests.support.gguf_models import FLOATS_BESIDE, SMALL, write_model

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments: str) -> dict:
        monkeypatch.setattr(sys, "argv", ["codec.py", "--device", "cpu", *arguments])
        benchmark_codec.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_every_source_is_measured(run, monkeypatch):
    monkeypatch.setattr(benchmark_codec, "SHAPES", ((64, 2048), (128, 2048), (32, 4096)))
    record = run("--rows", "32", "--link-gb-s", "50")
    rows = {(row["source"], row["shape"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) == 2 * 5 + 1
    for (source, _), row in rows.items():
        assert row["compress_gb_s"] > 0 and row["decompress_gb_s"] > 0
        assert row["effective_link_gb_s"] == pytest.approx(50 * 16 / row["bits"], abs=0.1)
        assert row["raw_share"] == (1 if source == "random_bits" else pytest.approx(0, abs=0.01))
        assert row["floor_bits"] <= row["bits"] < row["floor_bits"] + 0.5
    page = render([Record("codec.json", record)])
    assert "scaled_rows" in page.split("## Lossless compression\n")[1].split("\n## ")[0]


def test_without_a_link_there_is_no_effective_rate(run, monkeypatch):
    monkeypatch.setattr(benchmark_codec, "SOURCES", ())
    (row,) = run()["rows"]
    assert row["source"] == "demo" and row["effective_link_gb_s"] is None


def test_quantised_checkpoints_are_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(ValueError, match="w is F8_E4M3"):
        next(benchmark_codec.checkpoint_tensors(str(tmp_path), CPU))


def test_of_a_gguf_file_its_floats_are_compressed(tmp_path, run, monkeypatch):
    monkeypatch.setattr(benchmark_codec, "SOURCES", ())
    beside, quantised = tmp_path / "beside.gguf", tmp_path / "quantised.gguf"
    write_model(beside, "llama", sizes=FLOATS_BESIDE)
    write_model(quantised, "llama", sizes=SMALL)
    found = read_gguf(beside).tensors.values()
    floats = [entry for entry in found if entry.dtype in FILE_DTYPES]
    assert 0 < len(floats) < len(found)
    shapes = [tuple(tensor.shape) for tensor in benchmark_codec.checkpoint_tensors(str(beside), CPU)]
    assert shapes == [(entry.shape[0], entry.num_cols) for entry in floats]
    (row,) = run("--model", str(beside))["rows"]
    assert row["source"] == str(beside) and row["bits"] > 0
    with pytest.raises(ValueError, match=r"quantised\.gguf: all matrices are quantised, and only floats are"):
        next(benchmark_codec.checkpoint_tensors(str(quantised), CPU))


def test_the_floor_is_the_entropy():
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(4, 4096).bfloat16()
    assert benchmark_codec.floor_bits(weights) / weights.numel() == pytest.approx(10, abs=1e-3)
    weights = torch.exp2(torch.arange(8.0))[:, None].repeat(1, 4096).bfloat16()  # each row has one exponent
    assert benchmark_codec.floor_bits(weights) / weights.numel() == 8
    assert math.isclose(
        benchmark_codec.floor_bits(benchmark_codec.random_bits((9, 4096), CPU)) / 9 / 4096, 16, abs_tol=0.02
    )


def test_a_wrong_decompressor_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "decompress", lambda layout, blob, out: out.zero_())
    layout, blob = benchmark_codec.compress(torch.ones(2, 2048).bfloat16())
    with pytest.raises(RuntimeError, match="does not decompress"):
        benchmark_codec.proved_decompress_s(layout, blob, torch.ones(2, 2048).bfloat16())
