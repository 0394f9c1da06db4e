"""The benchmark scripts.bench.startup: phases in order, in fresh processes; a checkpoint that equals the dummy weights;
captures."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from penstock.engine.config import EngineConfig
from penstock.engine.model.shard import Piece
from penstock.engine.runtime.bucket_sizes import bucket_sizes
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.dummy import DummyWeights

from scripts.bench import startup as benchmark_startup
from scripts.bench import startup_phases
from scripts.bench.entry import run_script
from scripts.report.page import Record, generic, has_rows
from tests.support.commands import ROOT, TORCHRUN

ENGINE = ("--model", "demo", "--device", "cpu", "--dtype", "float32", "--max-num-seqs", "6", "--resident", "none")
PHASES = ["imports", "plan", "device", "weights", "engine", "captures", "first token"]


def run(monkeypatch, capsys, *arguments: str) -> dict:
    """Runs the script and returns its record, the last line that it prints."""
    monkeypatch.setattr(sys, "argv", ["startup.py", *arguments])
    benchmark_startup.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def check_phases(rows: list[dict]) -> None:
    assert [row["phase"] for row in rows] == PHASES and all(row["seconds"] >= 0 for row in rows)
    since_start = [row["since_start_s"] for row in rows]
    assert since_start == pytest.approx([sum(row["seconds"] for row in rows[: n + 1]) for n in range(len(rows))])


def test_a_checkpoint_from_cold_and_warm(monkeypatch, capsys, tmp_path):
    pytest.importorskip("safetensors")
    options = ("--checkpoint", "--checkpoint-dir", str(tmp_path), "--num-iters-warmup", "0")
    before = time.perf_counter()
    record = run(monkeypatch, capsys, *ENGINE, *options, "--num-iters-cold", "1", "--num-iters-warm", "1")
    elapsed_s = time.perf_counter() - before
    assert list(tmp_path.iterdir()) == []
    assert (record["benchmark"], record["model"], record["checkpoint"]) == ("startup", "demo", True)
    assert record["num_passes"] == 1 and record["bytes_read_per_rank"] * 2 <= record["host_bytes_per_rank"]
    for kind, rows in (("cold", record["rows"][:7]), ("warm", record["rows"][7:])):
        check_phases(rows)
        imports, *constructing, first_token = rows
        assert {row["start"] for row in rows} == {kind} and imports["seconds"] > 0.2  # torch alone takes longer
        assert record[f"{kind}_startup_times"] == pytest.approx([sum(row["seconds"] for row in constructing)])
        weights = rows[PHASES.index("weights")]
        assert weights["bytes"] == record["host_bytes_per_rank"] > 0
        assert weights["peak_host_bytes"] > 0.9 * weights["bytes"], "what is resident may be counted a few pages late"
        assert weights["gb_s"] == pytest.approx(weights["bytes"] / weights["seconds"] / 1e9)
    assert record["rows"][5]["since_start_s"] + record["rows"][-1]["since_start_s"] < elapsed_s
    page = Record("startup.json", record)
    assert has_rows(page) and "| cold | weights | " in generic(page)


def test_by_torchrun():
    command = [sys.executable, *TORCHRUN, "-m", "scripts.bench.startup", *ENGINE, "--load-format", "dummy"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["tp_size"], record["bytes_read_per_rank"], record["checkpoint"]) == (2, 0, False)
    check_phases(record["rows"])


@pytest.mark.parametrize(
    ("launcher", "arguments", "message"),
    [
        ("torchrun", ("--num-iters-cold", "1"), "--num-iters-cold: by torchrun there is one start"),
        ("torchrun", ("--checkpoint",), "--checkpoint: by torchrun there is one start"),
        ("torchrun", ("--against-lazy",), "--against-lazy: by torchrun there is one start"),
        ("none", ("--against-lazy", "--capture", "lazy"), "--against-lazy: expected an engine that captures at start"),
        ("none", ("--num-iters-cold", "0", "--num-iters-warm", "0"), "expected at least one start"),
        ("none", ("--num-iters-warmup", "-1"), "expected at least one start"),
        ("none", ("--checkpoint", "--load-format", "dummy"), "which one?"),
        ("none", ("--checkpoint-dir", "."), "--checkpoint-dir .: expected --checkpoint"),
        ("none", ("--checkpoint", "--checkpoint-dir", "nowhere"), "--checkpoint-dir nowhere"),
    ],
)
def test_refuses(monkeypatch, capsys, launcher, arguments, message):
    if launcher == "torchrun":
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 1)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(sys, "argv", ["startup.py", *ENGINE, *arguments])
    assert run_script(benchmark_startup.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_start_that_fails_ends_the_benchmark(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit, match="exit code 1"):
        benchmark_startup.start(EngineConfig(), 4, {})


def test_cold_starts_have_caches_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark_startup, "start", lambda config, input_len, environment: seen.append(environment))
    args = SimpleNamespace(num_iters_cold=2, num_iters_warmup=1, num_iters_warm=2, input_len=4, against_lazy=False)
    starts = benchmark_startup.start_all(EngineConfig(), args)
    assert {kind: len(records) for kind, records in starts.items()} == {"cold": 2, "warm": 2}
    first, second, *others = seen
    assert first.keys() == second.keys() == set(benchmark_startup.CACHES) and others == [{}] * 3
    assert not set(first.values()) & set(second.values())


def test_what_capturing_at_start_costs(monkeypatch):
    def started(config, input_len, environment):
        seconds = {"start": 7.0, "lazy": 4.5}[config.capture] + (10.0 if environment else 0.0)
        return {"startup_s": seconds, "phases": {"captures": {"seconds": seconds - 4.5}}}

    monkeypatch.setattr(benchmark_startup, "start", started)
    args = SimpleNamespace(num_iters_cold=1, num_iters_warmup=1, num_iters_warm=2, input_len=4, against_lazy=True)
    report = benchmark_startup.summarise(benchmark_startup.start_all(EngineConfig(), args))
    assert [(row["start"], row["seconds"]) for row in report["rows"]] == [
        ("cold", 12.5),
        ("warm", 2.5),
        ("cold_lazy", 10.0),
        ("warm_lazy", 0.0),
    ]
    assert (report["cold_capture_cost_s"], report["warm_capture_cost_s"]) == (2.5, 2.5)


def test_the_checkpoint_has_the_dummy_weights(tmp_path):
    pytest.importorskip("safetensors")
    from scripts.bench.dummy_checkpoint import write_checkpoint

    total = write_checkpoint("demo", 3, tmp_path, file_bytes=2 * 10**6)
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 2 and sum(sizes) > total > 0.8 * sum(sizes) and max(sizes) < 2.1 * 10**6
    with Checkpoint.open(tmp_path) as checkpoint:
        shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
        assert total == sum(entry.nbytes for entry in checkpoint.entries.values())
        source = DummyWeights(shapes, seed=3)
        for name, entry in checkpoint.entries.items():
            ours, theirs = torch.empty(2, entry.shape[0], entry.num_cols, dtype=torch.bfloat16)
            piece = Piece(name, row=0, num_rows=entry.shape[0], col=0, num_cols=entry.num_cols, to_row=0)
            checkpoint.read_piece(piece, ours)
            source.read_piece(piece, theirs)
            assert entry.dtype == "BF16" and torch.equal(ours, theirs) and ours.any()


@pytest.mark.gpu
def test_captures_of_all_buckets(monkeypatch, capsys):
    options = ("--device", "cuda", "--num-iters-cold", "0", "--num-iters-warmup", "0", "--num-iters-warm", "1")
    rows = run(monkeypatch, capsys, *ENGINE, *options)["rows"]
    check_phases(rows)
    captures = rows[PHASES.index("captures")]
    assert captures["seconds"] > 0 and captures["num_graphs"] >= len(bucket_sizes(6))


def test_the_process_began_before_now():
    """To a clock tick; another one began between the moment before it was started and the one behind its end."""
    began_s = startup_phases.process_start_s()
    command = [sys.executable, "-c", "from scripts.bench.startup_phases import process_start_s as s; print(repr(s()))"]
    before = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert began_s < before and before - 0.05 < float(done.stdout) < time.perf_counter()
