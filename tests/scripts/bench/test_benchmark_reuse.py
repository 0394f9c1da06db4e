"""The benchmark scripts.bench.reuse on the demo model: what moves, what does not, and refusals."""

import json
import sys

import pytest

from scripts.bench import reuse
from scripts.bench.entry import run_script
from scripts.report.page import Record, render

ENGINE = ("--model", "demo", "--device", "cpu", "--dtype", "float32", "--load-format", "dummy", "--kv-host-memory")
SMALL = ("--prefix-gb", "0.002", "--prefix-len", "64", "--own-len", "4", "--rounds", "1", "--share", "0.5")


def run(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark_reuse", *ENGINE, *arguments])
    return run_script(reuse.main)


def test_a_record(monkeypatch, capsys):
    assert run(monkeypatch, "8MiB", *SMALL) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    off, on = record["rows"]
    page_bytes = 4 * 2 * 16 * 4 * 32 * 4  # layers, K and V, S, K, E, fp32
    assert record["num_prefixes"] == int(0.002 * 1e9 / (4 * page_bytes)) == 7 and record["num_pages"] == 1 + 14
    assert (off["num_out"], off["num_in"], off["num_hit_tokens"]) == (0, 0, 64)  # the warm-up's
    assert on["num_in"] == 7 * 4 and on["num_saved_tokens"] == 7 * 64 and on["in_bytes"] == 28 * page_bytes
    assert on["num_hit_tokens"] == 64 + 7 * 64
    assert record["speedup"] == pytest.approx(off["reused_first_token_s"] / on["reused_first_token_s"])
    assert "| on |" in render([Record("reuse.json", record)])


def test_where_the_link_binds_no_byte_moves(monkeypatch, capsys):
    assert run(monkeypatch, "8MiB", *SMALL, "--resident", "none", "--link-gb-s", "0.01") == 0
    _, on = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert on["out_bytes"] == on["in_bytes"] == 0 and on["num_not_moved"] > 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("8MiB", "--prefix-gb", "0.0001"), "--prefix-gb 0.0001: expected two prefixes of 8000 tokens at least"),
        (("8MiB", *SMALL[:-1], "0.1"), "--share 0.1: 3 KV pages are too few for a prompt of 5"),
    ],
)
def test_what_it_refuses(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
