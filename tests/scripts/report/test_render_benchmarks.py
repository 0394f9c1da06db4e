"""The page of the records: all records are on it, and docs/ has the page that they make."""

import json
import re
import sys

import pytest

from scripts.report.page import render
from scripts.report.records import Record, read_records
from tests.support.commands import ROOT

ROW = {"batch_size": 4, "bound": "link", "bound_s": 0.09, "fraction_of_bound": 0.9, "predicted_s": 0.11}
ROW |= {"predicted_over_measured": 1.1, "tokens_per_second": 40.0, "achieved_tflops": 1.5}
GRAPH = {"graph_s": 0.08, "pass_over_graph": 1.25}
LATENCY = {
    "benchmark": "latency", "hardware": "1 x H200", "commit": "abc1234", "model": "Tiny", "dtype": "bfloat16",
    "tp_size": 1, "resident": "none", "input_len": 8, "output_len": 3, "streamed_bytes_per_pass_and_rank": 5,
    "passes": [ROW | GRAPH | {"decode_pass_s": 0.1, "first_token": ROW | {"first_token_s": 0.2, "num_passes": 2}}],
    "comparisons": [
        {"baseline": "accelerate", "batch_size": 4, "token_s": 0.8, "our_token_s": 0.1, "speedup": 8.0},
        {"baseline": "transformers", "error": "MemoryError: none | left"},
    ],
}  # fmt: skip


SPANS = [("embedding -1", 0, 0, 0), ("prefetch 1.attn", 0, 1, 5), ("prefetch 1.attn", 1, 1, 6)]  # name, pid, tid, ms
TRACE = {"hardware": "1 x H200", "model": "Tiny", "pass": "decode, 4 rows, all weights streamed"}
TRACE["traceEvents"] = [
    {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": 0.0, "dur": 1e3 * (ms + 1), "args": {"pass": 3}}
    for name, pid, tid, ms in SPANS
]


def section(page: str, title: str) -> str:
    return page.split(f"## {title}\n")[1].split("\n## ")[0]


def cells(page: str, title: str) -> list[dict[str, str]]:
    """Reads the rows of a section's table, by column."""
    lines = [line[2:-2].split(" | ") for line in section(page, title).splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_page_in_docs_is_that_of_the_records():
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert page == render(read_records(ROOT / "benchmarks")), "run python -m scripts.report.render"


def test_every_record_is_there():
    records = read_records(ROOT / "benchmarks")
    page = render(records)
    assert len(records) >= 10
    assert [record.name for record in records if f"[{record.name}](../benchmarks/{record.name})" not in page] == []
    passes = [row for record in records if record.kind == "latency" for row in record.content["passes"]]
    num_passes = sum("decode_pass_s" in row for row in passes)
    assert len(cells(page, "Streamed decode") + cells(page, "Resident decode")) >= num_passes > 0


def test_a_latency_record_answers_three_questions():
    page = render([Record("tiny.json", LATENCY)])
    (decode,), (prefill,) = cells(page, "Streamed decode"), cells(page, "Prefill")
    assert (decode["pass"], decode["bound"], decode["by"], decode["fraction"]) == ("100.00", "90.00", "link", "0.900")
    assert (decode["graph alone"], decode["pass / graph"]) == ("80.00", "1.250")
    assert (decode["hardware"], decode["commit"]) == ("1 x H200", "abc1234")
    assert (prefill["first token"], prefill["passes"], prefill["TFLOP/s"]) == ("200.00", "2", "1.50")
    ours, failed = cells(page, "Against others")
    assert (ours["theirs"], ours["ours"], ours["times faster"], ours["fraction"]) == (
        "800.00",
        "100.00",
        "8.00",
        "0.900",
    )
    assert failed["error"] == "MemoryError: none \\| left"
    assert "No record yet" in section(page, "Resident decode")


def first_screen(page: str) -> list[str]:
    """The answers above the first heading."""
    return re.findall(r"^\d\. .*$", page.split("\n## ")[0], flags=re.MULTILINE)


def test_five_questions_are_answered_on_the_first_screen():
    slower = LATENCY["passes"][0] | {"batch_size": 8, "decode_pass_s": 0.2, "fraction_of_bound": 0.45}
    slower |= {"predicted_over_measured": 0.95, "first_token": ROW | {"predicted_over_measured": 1.25}}
    bits = {"tests": "tests/gpu", "gpus": 2, "passed": 7, "failed": 1, "what": "logits bit by bit"}
    records = [Record("tiny.json", LATENCY | {"passes": [*LATENCY["passes"], slower]})]
    records.append(Record("tests.json", {"benchmark": "tests/gpu", "rows": [bits, bits | {"what": "probe"}]}))
    page = render(records)
    assert page.index("5. **") < 2500
    streamed, resident, others, predictions, equal = first_screen(page)
    assert "2 recorded decode passes reach 0.45 to 0.90 of their bound (link), the median 0.68" in streamed
    assert "Tiny, 1 rank, plain weights, batch 4 to 8: 100 to 200 ms a pass" in streamed
    assert resident.endswith("** No record yet.")
    assert "accelerate's `cpu_offload` 8.0." in others and "MemoryError" not in others
    assert "Of 4 predictions 1 are within 10 %" in predictions and "0.95 to 1.25, the median 1.10" in predictions
    assert "on GPUs, on up to 2 at once: 7 passed and 1 failed" in equal


def test_each_answer_leads_to_its_table():
    page = render(read_records(ROOT / "benchmarks"))
    answered = first_screen(page)
    headings = {line[3:].lower().replace("?", "").replace(" ", "-") for line in page.splitlines() if line[:3] == "## "}
    links = [re.findall(r"\(#(.*?)\)", line) for line in answered]
    assert len(answered) == 5 and all(len(link) == 1 and link[0] in headings for link in links)
    behind = re.findall(r"^One by one: .*\(#(.*)\)", page, flags=re.MULTILINE)
    assert len(behind) == 4 and set(behind) <= headings


def test_passes_that_are_alike_are_one_row():
    plain = Record("plain.json", LATENCY)
    more = LATENCY | {"streamed_bytes_per_pass_and_rank": 4 * 10**9}
    page = render([plain, Record("again.json", LATENCY), Record("more.json", more)])
    first, second = cells(page, "How fast is it when weights stream?")
    assert (first["streamed GB a rank"], second["streamed GB a rank"]) == ("0.00", "4.00")
    assert (second["batch"], second["a decode pass, ms"], second["bound / time"]) == ("4", "100", "0.90")
    whats = [row["what"] for row in cells(page, "Are the predictions right?")]
    assert whats == ["decode, weights stream, 1 rank", "first token, 1 rank"]


def test_ranks_that_sum_by_nccl_alone_are_a_row_apart():
    two = LATENCY | {"tp_size": 2}
    near, far = (Record(name, two | {"collectives": name}) for name in ("Symmetric", "Nccl"))
    page = render([near, far])
    for title in ("How fast is it when weights stream?", "Streamed decode"):
        assert [row["ranks"] for row in cells(page, title)] == ["2", "2, NCCL alone"]


def test_nothing_streamed_is_resident_decode():
    page = render([Record("tiny.json", LATENCY | {"streamed_bytes_per_pass_and_rank": 0})])
    assert len(cells(page, "Resident decode")) == 1 and "No record yet" in section(page, "Streamed decode")


@pytest.mark.parametrize(
    ("kind", "title"),
    [("link", "Link"), ("collectives", "Collectives"), ("new", "Other records"), (None, "Other records")],
)
def test_any_record_with_rows_is_a_table_of_their_keys(kind, title):
    rows = [{"bytes": 1024, "gb_s": 1 / 3}, {"bytes": 2048, "note": "a|b", "gb_s": None}]
    page = render([Record("some.json", {"benchmark": kind, "hardware": "2 x H200", "rows": rows})])
    first, second = cells(page, title)
    assert first == {"bytes": "1024", "gb_s": "0.33333", "note": ""}
    assert second == {"bytes": "2048", "gb_s": "", "note": "a\\|b"}
    assert "hardware 2 x H200" in section(page, title)


CODEC = {"benchmark": "codec", "hardware": "1 x H200", "decompressor": "kernel, in a graph", "link_gb_s": 55.4}
CODEC["rows"] = [
    {"source": "gaussian", "shape": "4096 x 4096", "bits": 10.893, "floor_bits": 10.546, "raw_share": 0.0}
    | {"compress_gb_s": 5.12, "decompress_gb_s": 1987.654, "effective_link_gb_s": 81.4},
    {"source": "demo", "shape": "checkpoint", "bits": 10.89, "floor_bits": 10.534, "raw_share": 0.0007}
    | {"compress_gb_s": 0.1, "decompress_gb_s": 0.114, "effective_link_gb_s": None},
]
STARTUP = {
    "benchmark": "startup",
    "model": "Tiny",
    "tp_size": 2,
    "compressed_groups": [1, 2],
    "model_shape": {"num_layers": 3},
}
STARTUP |= {"avg_cold_startup_time": 11.6281, "cold_capture_cost_s": 2.504, "cold_startup_percentiles": {"50": 11.6281}}
STARTUP["rows"] = [
    {"start": "cold", "phase": "plan", "seconds": 0.2209, "since_start_s": 2.4128},
    {
        "start": "cold",
        "phase": "weights",
        "seconds": 7.51,
        "since_start_s": 9.9276,
        "bytes": 11180699392,
        "gb_s": 1.4887,
    },
    {"start": "cold", "phase": "captures", "seconds": 3.8031, "num_graphs": 16},
]


def test_the_codec_has_a_table_of_bits_and_rates():
    page = render([Record("codec.json", CODEC)])
    first, second = cells(page, "Lossless compression")
    assert (first["weights"], first["shape"]) == ("gaussian", "4096 x 4096")
    assert (first["bits a weight"], first["entropy floor"], first["kept raw, %"]) == ("10.89", "10.55", "0.00")
    assert (first["compress GB/s"], first["decompress GB/s"], first["link, plain GB/s"]) == ("5.12", "1987.7", "81.4")
    assert (second["kept raw, %"], second["link, plain GB/s"]) == ("0.07", "")
    assert "1 x H200, decompressor kernel, in a graph, link GB/s 55.4\n" in section(page, "Lossless compression")


def test_dequantisers_have_a_table_of_their_rates():
    """The second record timed linears alone."""
    record = {"benchmark": "stored_kernels", "commit": "abc1234", "copy_gb_s": 4000.0, "linear": {}}
    record["dequantise"] = {"Q4_0": {"(8, 4)": {"written": 2500.4, "moved": 3000.0, "us": 74.56}}}
    page = render([Record("floats.json", record), Record("linears.json", {"benchmark": "stored_kernels"})])
    title = "Kernels of quantised weights"
    (row,) = cells(page, title)
    assert (row["dequantiser"], row["matrix"]) == ("Q4_0", "(8, 4)")
    assert (row["us"], row["written GB/s"], row["moved GB/s"], row["moved / copy"]) == ("74.6", "2500", "3000", "0.750")
    assert "commit abc1234, copy GB/s 4000\n" in section(page, title) and "linears.json" in section(page, title)


def test_a_start_has_a_table_of_its_phases():
    page = render([Record("startup.json", STARTUP)])
    plan, weights, captures = cells(page, "Start-up")
    assert (plan["start"], plan["phase"], plan["s"], plan["since start, s"]) == ("cold", "plan", "0.22", "2.41")
    assert (weights["GB"], weights["GB/s"], plan["GB"]) == ("11.18", "1.49", "")
    assert (captures["s"], captures["since start, s"], captures["graphs"]) == ("3.80", "", "16")
    text = section(page, "Start-up")
    assert "model Tiny, ranks 2, weights compressed, cold start-up s 11.63, capturing costs cold, s 2.50\n" in text
    assert "percentiles" not in text and "num_layers" not in text


KIND = {"kind": "mixed", "num_passes": 3, "num_tokens": 700, "measured_s": 0.5} | ROW
TRAFFIC = {key: LATENCY[key] for key in ("hardware", "commit", "model", "dtype", "tp_size", "resident")}
TRAFFIC |= {"benchmark": "traffic", "vllm": {"version": "0.23.0", "load_s": 40.0}}
TRAFFIC["rows"] = [
    {
        "row": "uneven",
        "measures": "job",
        "measured_s": 0.9,
        "vllm_measured_s": 1.035,
        "speedup": 1.15,
        "by_kind": [KIND],
    }
    | ROW,
    {"row": "token-batch-8", "measures": "token", "measured_s": 0.004} | ROW,
]


def test_real_traffic_has_a_table_of_its_rows_and_one_by_kind_of_pass():
    page = render([Record("traffic.json", TRAFFIC)])
    uneven, token = cells(page, "Real traffic")
    assert (uneven["row"], uneven["time"], uneven["vLLM"], uneven["vLLM's time"]) == (
        "uneven",
        "900.00",
        "0.23.0",
        "1035.00",
    )
    assert (uneven["times faster"], token["times faster"], token["bound"]) == ("1.15", "", "90.00")
    (kind,) = cells(page, "Passes of jobs, by kind")
    assert (kind["row"], kind["kind"], kind["passes"], kind["time"]) == ("uneven", "mixed", "3", "500.00")
    (compared,) = cells(page, "How does it compare?")
    assert (compared["against"], compared["row"], compared["times faster"]) == ("vLLM", "uneven", "1.15")
    assert "vLLM 1.15." in page and "real traffic" in section(page, "Are the predictions right?")
    assert "traffic.json" not in section(page, "Other records")


def test_offloaded_weights_are_compared_apart():
    offloaded = TRAFFIC | {"vllm": {"version": "0.23.0", "offloaded_bytes": 5}}
    page = render([Record("traffic.json", TRAFFIC), Record("offload.json", offloaded)])
    assert [row["against"] for row in cells(page, "How does it compare?")] == ["vLLM", "vLLM's weight offload"]


def test_a_server_is_compared_by_what_clients_felt():
    fed = [("in process", 9.0, 20.0, 5.0), ("by HTTP", 8.0, 24.0, 6.0), ("vLLM by HTTP", 4.0, 30.0, 5.4)]
    names = ("fed", "tokens_per_second", "median_ttft_ms", "median_tpot_ms")
    alone = TRAFFIC | {"benchmark": "serving", "rows": [dict(zip(names, one)) for one in fed[:2]]}
    beside = alone | {"rows": [dict(zip(names, one)) for one in fed], "vllm_ratios": {"tokens_per_second": 2.0}}
    page = render([Record("alone.json", alone), Record("beside.json", beside)])
    rows = cells(page, "How does it compare?")
    assert [(row["row"], row["their ms"], row["ours"], row["times faster"]) for row in rows] == [
        ("served requests", "", "", "2.00"),
        ("first token, served", "30.00", "24.00", "1.25"),
        ("token, served", "5.40", "6.00", "0.90"),
    ]
    assert {row["against"] for row in rows} == {"vLLM's server"} and "vLLM's server 0.90 to 2.0." in page


def test_a_job_that_arrives_has_its_latencies():
    job = TRAFFIC | ROW | {"benchmark": "throughput", "elapsed_time": 2.0, "num_requests": 9, "by_kind": [KIND]}
    job |= {"random_range_ratio": 0.8, "random_sigma": 0.0, "request_rate": 4.0, "burstiness": 0.5}
    job |= {f"{what}_{name}_ms": 7.0 for what in ("median", "p99") for name in ("ttft", "itl", "e2el")}
    page = render([Record("job.json", job)])
    (row,) = cells(page, "Throughput")
    assert (row["lengths +-"], row["arrive a second"], row["first token p50"], row["request p99"]) == (
        "0.8",
        "4",
        "7.00",
        "7.00",
    )
    assert "sigma" not in row and len(cells(page, "Passes of jobs, by kind")) == 1


@pytest.mark.parametrize("content", [{"benchmark": "new", "rows": []}, {"rows": [1, 2]}, [1, 2], 3, {}])
def test_a_record_of_an_unknown_kind_is_listed(content):
    assert "[some.json](../benchmarks/some.json)" in section(render([Record("some.json", content)]), "Other records")


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json: is not JSON"):
        read_records(tmp_path)


def test_the_command_writes_page_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from scripts.report import render as render_benchmarks

    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "tiny.json").write_text(json.dumps(LATENCY))
    (tmp_path / "records" / "trace_tiny.json").write_text(json.dumps(TRACE))
    folders = ("--records", str(tmp_path / "records"), "--output", str(tmp_path / "docs"))
    monkeypatch.setattr(sys, "argv", ["render.py", *folders])
    render_benchmarks.main()
    assert "tiny.json" in (tmp_path / "docs/benchmarks.md").read_text()
    for name in ("fraction", "pass_time", "trace_tiny", "lanes"):
        assert (tmp_path / f"docs/benchmarks/{name}.png").stat().st_size > 1000
