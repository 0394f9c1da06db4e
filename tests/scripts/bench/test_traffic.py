"""Traffic on the demo model: requests that arrive, rows of real traffic, and the same requests in (a fake) vLLM."""

import os
import sys
from types import SimpleNamespace

import pytest

from scripts.bench import call_time, job_run, throughput, traffic
from scripts.bench.traffic_rows import ENDING, FIRST_TOKEN, FULL, JOB, ROWS, TOKEN, URGENT, Row
from scripts.report.page import Record, render
from tests.support.commands import ROOT
from tests.support.fake_vllm import STEP_S, VERSION, FakeVllm
from tests.support.scripts import refused, run

ENGINE = ("--model", "demo", "--device", "cpu", "--dtype", "float32", "--load-format", "dummy", "--max-num-seqs", "4")
JOBS = (*ENGINE, "--num-prompts", "7", "--input-len", "8", "--output-len", "4")


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> FakeVllm:
    return FakeVllm(tmp_path, monkeypatch)


@pytest.fixture
def timed(monkeypatch) -> None:
    """A run of the engine takes a hundredth of a second for each token of its longest output, whatever the machine
    does: what is measured as a difference of runs is known, and a call takes nothing beside its passes."""

    def run(llm, jobs, params):
        _, outputs = job_run.run(llm, jobs, params)
        return 0.01 * max(job.output_len for job in jobs), outputs

    for module in (traffic, call_time):
        monkeypatch.setattr(module, "run", run)


def check_kinds(record: dict) -> None:
    kinds = {row["kind"]: row for row in record["by_kind"]}
    assert kinds.keys() == {"decode", "mixed", "prefill"}
    for name in ("bound_s", "predicted_s"):
        assert sum(row[name] for row in kinds.values()) == pytest.approx(record[name])
    for row in kinds.values():
        assert row["predicted_over_measured"] == pytest.approx(row["predicted_s"] / row["measured_s"])
        assert row["fraction_of_bound"] == pytest.approx(row["bound_s"] / row["measured_s"])


def test_requests_that_arrive(monkeypatch, capsys, vllm):
    options = ("--random-sigma", "0.7", "--random-prefix-len", "3", "--request-rate", "200", "--burstiness", "0.5")
    beside = ("--compare", "vllm", "--vllm", str(vllm.site), "--vllm-options", '{"block_size": 32}')
    record = run(monkeypatch, capsys, throughput, *JOBS, *options, *beside)
    assert record["num_requests"] == 7 and record["random_sigma"] == 0.7 and record["burstiness"] == 0.5
    assert sum(row["num_passes"] for row in record["by_kind"]) == record["num_timed_passes"]
    assert sum(row["measured_s"] for row in record["by_kind"]) == pytest.approx(record["passes_s"])
    assert 0 < record["median_ttft_ms"] <= record["p99_ttft_ms"] < record["p99_e2el_ms"]
    assert record["p99_e2el_ms"] <= 1e3 * record["elapsed_time"]
    (theirs,) = record["comparisons"]
    assert theirs["baseline"] == "vllm" and theirs["versions"] == {"vllm": VERSION}
    assert theirs["total_num_tokens"] == record["total_num_tokens"] and theirs["p99_e2el_ms"] > 0
    assert theirs["speedup"] == pytest.approx(theirs["elapsed_time"] / record["elapsed_time"])
    (options,), requests = vllm.asked("options"), vllm.asked("add")
    assert options["is_there"] and options["block_size"] == 32 and options["skip_tokenizer_init"]
    assert {options[name] for name in ("max_num_seqs", "max_model_len")} == {4, 512}
    assert len({tuple(prompt[:3]) for prompt, _ in requests}) == 1 and len({len(prompt) for prompt, _ in requests}) > 2
    assert sum(len(prompt) + said["max_tokens"] for prompt, said in requests) == record["total_num_tokens"]
    assert all(said["ignore_eos"] and said["temperature"] == 0 for _, said in requests)


SMALL = (
    Row("first", FIRST_TOKEN, 1, 9, 1),
    Row("token", TOKEN, 4, 6, 3, first_len=20, fourth={"logprobs": 2}),
    Row("job", JOB, 9, 10, 4, {"range_ratio": 0.5}, all={"temperature": 1.0, "top_p": 0.9, "seed": 1}),
    Row("too-long", JOB, 1, 600, 4),
    Row("too-many", TOKEN, 5, 4, 4),
)


def test_rows_of_traffic(monkeypatch, capsys, vllm, timed):
    monkeypatch.setattr(traffic, "ROWS", SMALL)
    record = run(monkeypatch, capsys, traffic, *ENGINE, "--compare", "vllm", "--vllm", str(vllm.site))
    assert record["benchmark"] == "traffic" and record["vllm"]["version"] == VERSION
    first, token, job = record["rows"]
    assert [(row["row"], row["measures"]) for row in record["rows"]] == [(one.name, one.measures) for one in SMALL[:3]]
    assert (first["num_passes"], token["num_passes"]) == (1, 3 + 1)  # the first of five tokens is the prompts'
    for row in record["rows"]:
        assert row["bound_s"] > 0 and row["fraction_of_bound"] == pytest.approx(row["bound_s"] / row["measured_s"])
        assert row["predicted_over_measured"] == pytest.approx(row["predicted_s"] / row["measured_s"])
        assert row["speedup"] == pytest.approx(row["vllm_measured_s"] / row["measured_s"])
    assert token["measured_s"] == pytest.approx(0.01) and token["vllm_measured_s"] == pytest.approx(STEP_S)
    assert token["tokens_per_second"] == pytest.approx(4 / token["measured_s"])
    (prefill,) = first["by_kind"]
    assert first["predicted_s"] == pytest.approx(prefill["predicted_s"]) and first["call_s"] == pytest.approx(0.0)
    assert "call_s" not in token and "call_s" not in job
    check_kinds(job)
    *_, job_asked = vllm.asked("generate")
    assert sum(len(prompt) + said["max_tokens"] for prompt, said in job_asked) == pytest.approx(
        job["tokens_per_second"] * job["measured_s"]
    )
    assert {said["top_p"] for _, said in job_asked} == {0.9}
    longer = next(asked for asked in vllm.asked("generate") if len(asked) == 4 and asked[0][1]["max_tokens"] == 5)
    assert [len(prompt) for prompt, _ in longer] == [20, 6, 6, 6]
    assert [said.get("logprobs") for _, said in longer] == [None, None, None, 2]


def test_a_batch_that_never_decodes_together_is_said(monkeypatch, capsys, vllm, timed):
    monkeypatch.setattr(traffic, "ROWS", SMALL[1:2])
    options = ("--num-pages", "3", "--max-model-len", "32", "--compare", "vllm", "--vllm", str(vllm.site))
    (row,) = run(monkeypatch, capsys, traffic, *ENGINE, *options)["rows"]
    assert row["error"] == "the KV cache is too small for its 4 sequences at once"
    assert row["vllm_measured_s"] == pytest.approx(STEP_S) and "speedup" not in row


@pytest.mark.parametrize("short_s", [0.5, 0.6])
def test_a_longer_run_that_takes_no_longer_is_said(short_s):
    """It has neither a time of a token nor anything that would follow from one; ours or theirs."""
    row, runs = SMALL[1], [[], []]
    error = {"error": "its run of 3 more tokens took no longer than the one without them"}
    assert traffic.time_fields(row, runs, [short_s, 0.5]) == error
    report = {"rows": [{"measured_s": 0.1}]}
    result = {"offloaded_bytes": 7, "runs": [{"elapsed_s": short_s}, {"elapsed_s": 0.5}]}
    traffic.compare_rows(report, [row], [runs], SimpleNamespace(options={}), result)
    assert report["rows"] == [{"measured_s": 0.1, "vllm_error": error["error"]}]


@pytest.mark.parametrize("option", ["cpu_offload_gb", "offload_group_size"])
def test_weights_that_vllm_offloads_are_counted(monkeypatch, capsys, vllm, timed, option):
    monkeypatch.setattr(traffic, "ROWS", SMALL[:2])
    options = ("--compare", "vllm", "--vllm", str(vllm.site), "--vllm-options", f'{{"{option}": 7}}')
    record = run(monkeypatch, capsys, traffic, *ENGINE, "--resident", "none", *options)
    assert record["vllm"]["options"] == {option: 7} and vllm.asked("options")[0][option] == 7
    assert record["vllm"]["offloaded_bytes"] == 7000
    first, token = record["rows"]
    assert token["vllm_link_gb_s"] * 1e9 * token["vllm_measured_s"] == pytest.approx(7000)
    assert "vllm_link_gb_s" not in first
    assert record["streamed_bytes_per_pass_and_rank"] > 0 and record["link_gb_s"] > 0


def test_weights_that_vllm_should_offload_and_does_not_are_an_error(monkeypatch, capfd, vllm):
    monkeypatch.setattr(traffic, "ROWS", SMALL[:1])
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    options = ("--compare", "vllm", "--vllm", str(vllm.site), "--vllm-options", '{"cpu_offload_gb": 7}')
    record = run(monkeypatch, capfd, traffic, *ENGINE, "--resident", "none", *options)
    assert "vLLM left no weights in host memory" in record["vllm"]["error"]


def test_vllm_that_fails_keeps_what_was_measured(monkeypatch, capfd, vllm):
    monkeypatch.setenv("FAKE_VLLM_FAILS", "1")
    record = run(monkeypatch, capfd, throughput, *JOBS, "--compare", "vllm", "--vllm", str(vllm.site))
    (row,) = record["comparisons"]
    assert row["error"] == "ended with status 1: RuntimeError: no kernel image" and record["elapsed_time"] > 0


LIMITS = (
    Row("full", FULL, 0, 40, 3),
    Row("urgent", URGENT, 1, 40, 1),
    Row("ending", ENDING, 8, 10, 40, {"range_ratio": 0.8}, most_len=100),
)


@pytest.mark.parametrize("options", [("--resident", "all"), ("--resident", "none", "--max-num-batched-tokens", "64")])
def test_rows_that_take_an_engine_to_its_limits(monkeypatch, capsys, options):
    monkeypatch.setattr(traffic, "ROWS", LIMITS)
    options += ("--num-pages", "10", "--page-size", "16", "--max-model-len", "144", "--scheduling-policy", "priority")
    record = run(monkeypatch, capsys, traffic, *ENGINE, *options, "--rows", "full", "urgent", "ending")
    full, urgent, ending = record["rows"]
    assert full["num_requests"] == 2 == int(0.98 * 9 * 16 / (40 + 1 + 8)) and full["num_passes"] == 3
    assert 38 <= full["live_tokens"] <= 43 and full["num_preemptions"] == 0
    assert full["tokens_per_second"] == pytest.approx(2 / full["measured_s"])
    assert full["filling"]["num_passes"] >= 1 and full["filling"]["predicted_s"] > 0
    assert urgent["num_passes"] <= 2 and urgent["num_preemptions"] >= 1
    assert ending["num_preemptions"] > 0 and 1 < ending["mean_rows"] <= 4
    assert sum(row["num_passes"] for row in ending["by_kind"]) == ending["num_passes"]
    drawn = LIMITS[2].jobs(40, 512, 0, 144)
    assert ending["tokens_per_second"] * ending["measured_s"] == pytest.approx(
        sum(len(job.prompt) + job.output_len for job in drawn)
    )
    for row in record["rows"]:
        assert row["fraction_of_bound"] == pytest.approx(row["bound_s"] / row["measured_s"])
    assert "| urgent |" in render([Record("traffic.json", record)])


def test_nobody_is_urgent_without_priorities(monkeypatch, capsys):
    monkeypatch.setattr(traffic, "ROWS", LIMITS)
    error = refused(monkeypatch, capsys, traffic, *ENGINE, "--rows", "urgent")
    assert "--rows urgent: nobody is urgent without --scheduling-policy priority" in error


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (throughput, ("--compare", "vllm", "--vllm", sys.executable), f"--compare vllm: no vLLM at {sys.executable};"),
        (throughput, ("--compare", "vllm", "--vllm", os.devnull), f"--vllm {os.devnull}: Permission denied"),
        (throughput, ("--compare", "vllm", "--vllm-options", "[1]"), "--vllm-options [1]: expected a JSON object"),
        (throughput, ("--compare", "vllm", "--n", "2"), "--compare vllm: expected --n 1, got 2"),
        (throughput, ("--compare", "transformers-cb", "--request-rate", "2"), "all requests come at once"),
        (throughput, ("--request-rate", "2", "--n", "2"), "--n 2: expected 1 with --request-rate"),
        (throughput, ("--request-rate", "0"), "--request-rate: '0': expected a number above 0"),
        (throughput, ("--burstiness", "nan"), "--burstiness: 'nan': expected a number above 0"),
        (throughput, ("--random-sigma", "4"), "--random-sigma: '4': expected a number from 0 to 3"),
        (throughput, ("--random-sigma", "1", "--random-range-ratio", "0.5"), "not by both"),
        (throughput, ("--random-prefix-len", "-1"), "expected an integer of at least 0"),
        (traffic, ("--rows", "uneven", "other"), "--rows other: expected some of first-token-128, "),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(monkeypatch, capsys, script, arguments, message):
    assert message in refused(monkeypatch, capsys, script, *ENGINE, *arguments)


def test_what_does_not_fit_is_refused_by_name(monkeypatch, capsys):
    error = refused(monkeypatch, capsys, traffic, *ENGINE, "--rows", "token-batch-8")
    assert "--rows token-batch-8: it decodes 8 sequences at once, more than max_num_seqs 4" in error
    error = refused(monkeypatch, capsys, throughput, *JOBS, "--random-prefix-len", "600")
    assert "a request has 612 tokens, more than max_model_len 512" in error


def test_every_row_is_a_command_in_the_docs():
    page = (ROOT / "docs/measuring.md").read_text()
    assert len({row.name for row in ROWS}) == len(ROWS) == 24
    assert [row.name for row in ROWS if f"`{row.name}`" not in page] == []


def test_rows_of_a_long_context_have_the_same_tokens():
    *_, long, even = ROWS
    sizes = [sum(len(job.prompt) for job in row.jobs(2, 100, 0, 10**6)) for row in (long, even)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.001)
