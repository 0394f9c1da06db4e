"""The benchmark scripts.bench.serve_startup: what its record has, and what it says where a process cannot start."""

import json
import sys

import pytest
from penstock.parallel.topology import device_name, resolve_topology

from scripts.bench import serve_startup
from scripts.report.page import Record, generic, has_rows

ENGINE = ("--model", "demo", "--device", "cpu", "--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "2")


def test_a_server_is_timed_beside_generate(monkeypatch, capsys, tmp_path):
    kept = tmp_path / "record.json"
    arguments = [*ENGINE, "--num-iters-warmup", "0", "--num-iters", "1", "--output-json", str(kept)]
    monkeypatch.setattr(sys, "argv", ["serve_startup.py", *arguments])
    serve_startup.main()
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(kept.read_text()) == record and record["benchmark"] == "serve_startup"
    (row,) = record["rows"]
    assert set(row) == set(serve_startup.KINDS) and all(seconds >= 0 for seconds in row.values())
    assert (record["first_token_s"], record["healthy_s"]) == (row["generate"], row["serve"])
    assert record["allowed_s"] == pytest.approx(1.3 * row["generate"] + row["import"])
    page = Record("serve_startup.json", record)
    assert has_rows(page) and "allowed_s" in generic(page)


def test_a_device_that_is_not_named_is_found(monkeypatch, capsys):
    for way in ("first_token_s", "healthy_s", "import_s"):
        monkeypatch.setattr(serve_startup, way, lambda flags: 1.0)
    monkeypatch.setattr(sys, "argv", ["serve_startup.py", "--model", "demo", "--num-iters", "1"])
    serve_startup.main()
    found = device_name(resolve_topology(0, 1, 0).device)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["hardware"] == f"1 x {found}"


def test_a_server_is_held_to_medians():
    rows = [{"generate": g, "serve": s, "import": i} for g, s, i in ((1, 9, 0.5), (2, 2, 0.25), (3, 3, 1))]
    told = serve_startup.summarise(rows)
    assert (told["healthy_s"], told["allowed_s"], told["is_within"]) == (3, pytest.approx(1.3 * 2 + 0.5), True)
    assert not serve_startup.summarise([row | {"serve": 9} for row in rows])["is_within"]


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(RuntimeError, match="no-such-model"):
        serve_startup.healthy_s(["--model", "no-such-model"])
