"""The benchmarks scripts.bench.latency and .throughput on the demo model: fields, counts and bounds of their
records."""

import importlib.util
import json

import pytest
from penstock.engine.runtime.bucket_sizes import bucket_sizes

from scripts.bench import comparison
from scripts.bench import latency as benchmark_latency
from scripts.bench import throughput as benchmark_throughput
from scripts.bench.job_run import shrinking
from scripts.bench.workload import random_jobs
from tests.support.forked_ranks import fork_ranks
from tests.support.scripts import refused, run

ENGINE = ("--model", "demo", "--device", "cpu", "--dtype", "float32", "--load-format", "dummy", "--resident", "none")
LATENCY = (*ENGINE, "--input-len", "10", "--output-len", "5", "--num-iters-warmup", "1", "--num-iters", "2")
THROUGHPUT = (*ENGINE, "--input-len", "10", "--output-len", "6", "--num-prompts", "9", "--max-num-seqs", "4")


def check_bound(fields: dict, time_s: float) -> None:
    assert fields["bound"] in ("link", "memory", "compute")
    assert fields["fraction_of_bound"] == pytest.approx(fields["bound_s"] / time_s)
    assert fields["predicted_over_measured"] == pytest.approx(fields["predicted_s"] / time_s)


def test_latency(monkeypatch, capsys, tmp_path):
    file = tmp_path / "record.json"
    record = run(monkeypatch, capsys, benchmark_latency, *LATENCY, "--batch-size", "1", "3", "--output-json", str(file))
    assert json.loads(file.read_text()) == record and record["benchmark"] == "latency"
    assert {"hardware", "versions", "commit", "model_shape", "link_gb_s"} <= record.keys()
    assert record["rates"] == "measured" and record["max_num_seqs"] == 3
    (transfers,) = record["transfers"]
    num_passes = record["num_passes"]  # since the rates were measured; the ring is full
    assert num_passes == (1 + 2) * 5, "the batch was not warmed up again, to be filled by these rates"
    assert record["predicted_by"] == "assumed: cpu" and record["collectives"] == "Solo"
    assert transfers["weights"]["total"] == {
        "num_calls": num_passes * (4 * 2 + 1),
        "sent_bytes": num_passes * record["streamed_bytes_per_pass_and_rank"],
        "received_bytes": 0,
    }
    assert transfers["weights"].keys() == {"total", "operations"} and num_passes > 0
    one, three = record["passes"]
    assert {name: record[name] for name in benchmark_latency.VLLM_FIELDS} == {
        name: one[name] for name in benchmark_latency.VLLM_FIELDS
    }
    for num_seqs, row in ((1, one), (3, three)):
        assert row["batch_size"] == num_seqs and len(row["latencies"]) == 2
        assert row["num_timed_passes"] == 2 * 4  # the fifth token comes from the prompt's pass
        assert row["achieved_link_gb_s"] == pytest.approx(
            record["streamed_bytes_per_pass_and_rank"] / row["decode_pass_s"] / 1e9
        )
        check_bound(row, row["decode_pass_s"])
        assert 0 < row["host_s"] <= row["host_p99_s"]
        assert "graph_s" not in row  # there are no graphs on a CPU
        first = row["first_token"]
        assert (first["num_passes"], first["num_tokens"], first["start_s"]) == (1, 10 * num_seqs, 0.0)
        (by_pass,) = first["by_pass"]
        assert (by_pass["num_tokens"], by_pass["num_rows"]) == (10 * num_seqs, num_seqs)
        assert by_pass["measured_s"] > 0 and by_pass["predicted_s"] > 0
        check_bound(first, first["first_token_s"])
        assert first["first_token_s"] + 4 * row["decode_pass_best_s"] < max(row["latencies"])


def test_a_pass_beside_its_graph_alone(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(benchmark_latency, "graph_alone_s", lambda llm, num_rows: asked.append(num_rows) or 1e-3)
    (row,) = run(monkeypatch, capsys, benchmark_latency, *LATENCY, "--batch-size", "2", "--n", "2")["passes"]
    assert asked == [4] and row["graph_s"] == 1e-3
    assert row["pass_over_graph"] == pytest.approx(row["decode_pass_s"] / 1e-3)


def test_a_prompt_in_chunks_and_nothing_but_a_first_token(monkeypatch, capsys):
    options = ("--batch-size", "2", "--output-len", "1", "--max-num-batched-tokens", "8")
    (row,) = run(monkeypatch, capsys, benchmark_latency, *LATENCY, *options)["passes"]
    assert row["first_token"]["num_passes"] == 3 and "decode_pass_s" not in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--compare", "vllm"), "--compare vllm: expected some of accelerate, transformers, transformers-cb"),
        (("--compare", "transformers", "-tp", "2"), "compare with one rank"),
        (("--compare", "transformers", "--model", "m.gguf"), "the others read a directory of safetensors, and m.gguf"),
        (("--compare", "transformers", "--compare-tokens", "1"), "--compare-tokens 1: expected at least 2"),
        (("--batch-size", "8", "--max-num-seqs", "4"), "--max-num-seqs 4: the largest batch has 8 sequences"),
        (("--batch-size", "0"), "'0': expected a positive integer"),
    ],
)
def test_latency_refuses(monkeypatch, capsys, arguments, message):
    assert message in refused(monkeypatch, capsys, benchmark_latency, *LATENCY, *arguments)


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(comparison.BASELINES, "accelerate", ("no_such_library",))
    error = refused(monkeypatch, capsys, benchmark_latency, *LATENCY, "--compare", "accelerate")
    assert "--compare accelerate: no_such_library is not installed (pip install 'penstock[compare]')" in error


@pytest.mark.parametrize("name", comparison.BASELINES)
def test_the_others_generate_the_same_tokens(monkeypatch, capsys, name):
    for library in comparison.BASELINES[name]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    options = ("--batch-size", "2", "--compare", name)
    record = run(monkeypatch, capsys, benchmark_latency, *LATENCY, *options)
    (row,) = record["comparisons"]
    assert "error" not in row and row["baseline"] == name and set(row["versions"]) == set(comparison.BASELINES[name])
    assert (row["equal_tokens"], row["num_tokens"]) == (2 * 4, 2 * 4)
    assert row["our_token_s"] == record["passes"][0]["decode_pass_s"]
    assert row["speedup"] == pytest.approx(row["token_s"] / row["our_token_s"]) and row["token_s"] > 0


def test_an_error_of_the_others_keeps_what_was_measured(monkeypatch, capsys):
    pytest.importorskip("transformers")
    from scripts.bench import baselines

    def load(*_):
        raise MemoryError("none left")

    monkeypatch.setattr(baselines, "load", load)
    record = run(monkeypatch, capsys, benchmark_latency, *LATENCY, "--batch-size", "1", "--compare", "transformers")
    assert record["comparisons"] == [{"baseline": "transformers", "error": "MemoryError: none left"}]
    assert len(record["passes"]) == 1


def test_throughput(monkeypatch, capsys):
    record = run(monkeypatch, capsys, benchmark_throughput, *THROUGHPUT, "--n", "2")
    assert record["num_requests"] == 9 and record["total_num_tokens"] == 9 * (10 + 2 * 6)
    assert record["requests_per_second"] == pytest.approx(9 / record["elapsed_time"])
    assert record["tokens_per_second"] == pytest.approx(record["total_num_tokens"] / record["elapsed_time"])
    assert record["output_tokens_per_second"] == pytest.approx(9 * 2 * 6 / record["elapsed_time"])
    assert 0 < record["passes_s"] < record["elapsed_time"]
    assert record["requests"]["num_passes"] >= record["num_timed_passes"] and record["requests"]["moves"]["num_in"] == 0
    moved = record["num_timed_passes"] * record["streamed_bytes_per_pass_and_rank"]
    assert record["achieved_link_gb_s"] == pytest.approx(moved / record["elapsed_time"] / 1e9)
    check_bound(record, record["elapsed_time"])


def test_throughput_of_a_text(monkeypatch, capsys, tmp_path):
    file, prompts = tmp_path / "text.md", []
    file.write_text(" ".join(f"word{number}" for number in range(500)))

    def note(llm, jobs):
        prompts.extend(llm.tokenizer.decode(job.prompt) for job in jobs)

    monkeypatch.setattr(benchmark_throughput, "warm_up", note)
    record = run(monkeypatch, capsys, benchmark_throughput, *THROUGHPUT, "--text", str(file))
    assert record["text"] == "text.md" and record["total_num_tokens"] == 9 * (10 + 6)
    assert len(set(prompts)) > 1 and all(prompt in 2 * file.read_text() for prompt in prompts)


def test_throughput_against_continuous_batching(monkeypatch, capsys):
    pytest.importorskip("transformers")
    record = run(monkeypatch, capsys, benchmark_throughput, *THROUGHPUT, "--compare", "transformers-cb")
    (row,) = record["comparisons"]
    assert row["speedup"] == pytest.approx(row["elapsed_time"] / record["elapsed_time"])


def test_throughput_refuses(monkeypatch, capsys):
    for arguments, message in (
        (("--compare", "accelerate"), "--compare accelerate: expected some of transformers-cb, vllm"),
        (("--compare", "transformers-cb", "--random-range-ratio", "0.5"), "one length"),
        (("--dataset-name", "sharegpt"), "invalid choice"),
        (("--random-range-ratio", "1.5"), "--random-range-ratio: '1.5': expected a number from 0, below 1"),
    ):
        assert message in refused(monkeypatch, capsys, benchmark_throughput, *THROUGHPUT, *arguments)


def test_throughput_of_two_ranks():
    """The warm-up's requests come all at once, the others at a rate."""
    done = fork_ranks(2, "-m", "scripts.bench.throughput", *THROUGHPUT, "--request-rate", "100", timeout=120)
    assert done.all_ended, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["tp_size"] == 2 and record["hardware"].startswith("2 x ") and record["median_ttft_ms"] > 0


def test_the_warm_up_comes_by_every_size_of_a_decode_pass():
    jobs = shrinking(random_jobs(40, 4, 9, 100, seed=0), 24)
    alive = [sum(job.output_len > num_passes for job in jobs) for num_passes in range(1, 30)]
    assert [number for number in alive if number] == bucket_sizes(24)[::-1]
