"""The records of benchmarks/ as a page: five questions, then a table of every record. It imports no torch.

Every record is on the page: if its kind is not known here, as a table of its `rows`, or as its file name if it has
none.
"""

from penstock.scheduler.units import GB, MIB

from scripts.report.answers import NO_RECORD, answers, first_screen, tables
from scripts.report.markdown_table import Column, ms, nonzero, number, table, text
from scripts.report.records import (
    LATENCY,
    STORED,
    THROUGHPUT,
    TRAFFIC,
    Record,
    comparison_rows,
    decode_rows,
    dequantiser_rows,
    kind_rows,
    prefill_rows,
    throughput_rows,
    traffic_rows,
)

INTRODUCTION = """# Benchmarks

`python -m scripts.report.render` makes this page from the records in `benchmarks/`; do not edit it. Weights are random,
in the shapes of real models, but those of demo and SmolLM2-135M-Instruct.

A *rank* is one process with one GPU. A *pass* is one run over the model: a *decode* pass gives every sequence of its
*batch* the next token. The *link* is the PCIe connection over which weights come from host memory. The *bound* is the
least time that a rank's pass could take: the longest of bytes streamed / link rate, bytes read / memory read rate, and
FLOPs / matrix multiplication (GEMM) rate. Its rates are measured in the same run, beside the passes, so bound / time
may be a percent or two above 1.
"""
BEHIND = """## Every record

Times of passes are medians. From here on times are in ms, and rates are a rank's; "by" says which term of the bound is
the longest, "fraction" is bound / time, "graph alone" is the time of a decode pass whose CUDA graph is replayed back to
back, without the host. Predictions are the time model's, from the rates that the plan had before anything was measured.

![fraction of the bound](benchmarks/fraction.png)

![time of a decode pass](benchmarks/pass_time.png)
"""
GENERIC = {  # kind of record: its section
    "kernels": "Kernels",
    STORED: "Kernels of quantised weights",
    "link": "Link",
    "collectives": "Collectives",
    "codec": "Lossless compression",
    "startup": "Start-up",
    "serve_startup": "Start-up of a server",
    "endless": "Sequences without an end",
    "sink_perplexity": "Attention sinks",
    "split": "Split execution",
    "permutation_attack": "Attack on permuted execution",
    "tests/gpu": "Tests on GPUs",
}


def render(records: list[Record]) -> str:
    """The page."""
    answered = answers(records)
    sections = [INTRODUCTION, first_screen(answered), tables(answered), BEHIND]
    return "\n".join([*sections, *measured(records), *of_other_kinds(records)])


def measured(records: list[Record]) -> list[str]:
    """Sections of the records that measure passes and runs of the engine."""
    decodes = decode_rows(records)
    streamed = [row for row in decodes if row["streamed_bytes"]]
    resident = [row for row in decodes if not row["streamed_bytes"]]
    return [
        section(title, [table(rows, columns)] if rows else [])
        for title, rows, columns in (
            ("Streamed decode", streamed, DECODE),
            ("Resident decode", resident, DECODE),
            ("Prefill", prefill_rows(records), PREFILL),
            ("Throughput", throughput_rows(records), THROUGHPUTS),
            ("Real traffic", traffic_rows(records), TRAFFICS),
            ("Passes of jobs, by kind", kind_rows(records), KINDS),
            ("Against others", comparison_rows(records), COMPARISONS),
        )
    ]


def of_other_kinds(records: list[Record]) -> list[str]:
    """A section for each kind of GENERIC, and one of what is left."""
    sections = [
        section(title, [generic(record) for record in records if record.kind == kind])
        for kind, title in GENERIC.items()
    ]
    others = [record for record in records if record.kind not in (LATENCY, THROUGHPUT, TRAFFIC, *GENERIC)]
    shown = [generic(record) for record in others if has_rows(record)]
    names = [f"- {record.link}: {record.kind or 'no benchmark'}" for record in others if not has_rows(record)]
    return [*sections, section("Other records", [*shown, "\n".join(names) + "\n"])]


def section(title: str, parts: list[str]) -> str:
    return f"## {title}\n\n" + ("\n".join(parts) or f"{NO_RECORD}\n")


MODEL: list[Column] = [(name, text(name)) for name in ("model", "ranks")]
MODEL += [
    ("resident", text("resident")),
    ("weights", text("weights")),
    ("batch", text("batch_size")),
    ("prompt", text("input_len")),
    ("attention window", text("attention_window")),
]
BOUND: list[Column] = [("bound", ms("bound_s")), ("by", text("bound")), ("fraction", number("fraction_of_bound"))]
BOUND += [("predicted", ms("predicted_s")), ("predicted / time", number("predicted_over_measured", 2))]
RATES: list[Column] = [("tokens/s", number("tokens_per_second", 1)), ("link GB/s", number("achieved_link_gb_s", 2))]
RATES += [("read GB/s", number("achieved_memory_gb_s", 0)), ("TFLOP/s", number("achieved_tflops", 2))]
SOURCE: list[Column] = [(name, text(name)) for name in ("hardware", "commit", "record")]
GRAPH: list[Column] = [("graph alone", ms("graph_s")), ("pass / graph", number("pass_over_graph"))]
DECODE = [
    *MODEL,
    ("pass", ms("decode_pass_s")),
    *GRAPH,
    *BOUND,
    *RATES,
    ("plain GB/s", number("plain_gb_s", 2)),
    *SOURCE,
]
PREFILL = [*MODEL, ("passes", text("num_passes")), ("first token", ms("first_token_s")), *BOUND, *RATES, *SOURCE]
THROUGHPUTS: list[Column] = [
    *(column for column in MODEL if column[0] != "batch"),
    *(
        ("output", text("output_len")),
        ("lengths +-", nonzero("random_range_ratio")),
        ("sigma", nonzero("random_sigma")),
    ),
    *(("shared prefix", nonzero("random_prefix_len")), ("requests", text("num_requests"))),
    *(("arrive a second", text("request_rate")), ("burstiness", text("burstiness")), ("time", ms("elapsed_time"))),
    *BOUND,
    *(("first token p50", number("median_ttft_ms", 2)), ("first token p99", number("p99_ttft_ms", 2))),
    *(("between tokens p50", number("median_itl_ms", 2)), ("between tokens p99", number("p99_itl_ms", 2))),
    *(("request p50", number("median_e2el_ms", 2)), ("request p99", number("p99_e2el_ms", 2))),
    *(("requests/s", number("requests_per_second", 2)), ("output tokens/s", number("output_tokens_per_second", 1))),
    *RATES,
    *SOURCE,
]
TRAFFICS: list[Column] = [
    *(column for column in MODEL if column[0] not in ("batch", "prompt")),
    *(("row", text("row")), ("measures", text("measures")), ("time", ms("measured_s"))),
    *BOUND,
    *(("tokens/s", number("tokens_per_second", 1)), ("vLLM", text("vllm_version"))),
    *(("vLLM's time", ms("vllm_measured_s")), ("times faster", number("speedup", 2)), ("error", text("error"))),
    *SOURCE,
]
KINDS: list[Column] = [
    *(column for column in MODEL if column[0] != "batch"),
    *(("row", text("job")), ("kind", text("kind")), ("passes", text("num_passes")), ("tokens", text("num_tokens"))),
    ("time", ms("measured_s")),
    *BOUND,
    *SOURCE,
]
COMPARISONS: list[Column] = [
    *MODEL,
    *(("row", text("row")), ("against", text("baseline")), ("theirs", ms("theirs_s")), ("ours", ms("ours_s"))),
    *(("times faster", number("speedup", 2)), ("first token, times faster", number("first_token_speedup", 2))),
    *(("equal tokens", text("equal_tokens")), ("of", text("num_tokens")), ("error", text("error"))),
    *(("ours bound by", text("bound")), ("fraction", number("fraction_of_bound"))),
    *SOURCE,
]

RUN: list[Column] = [(name, text(name)) for name in ("hardware", "versions", "commit")]
COMPRESSED: list[Column] = [
    *(("weights", text("source")), ("shape", text("shape"))),
    *(("bits a weight", number("bits", 2)), ("entropy floor", number("floor_bits", 2))),
    *(("kept raw, %", number("raw_share", 2, 100)), ("compress GB/s", text("compress_gb_s"))),
    *(("decompress GB/s", text("decompress_gb_s")), ("link, plain GB/s", text("effective_link_gb_s"))),
]
STARTS: list[Column] = [
    *(("start", text("start")), ("phase", text("phase"))),
    *(("s", number("seconds", 2)), ("since start, s", number("since_start_s", 2))),
    *(("GB", number("bytes", 2, 1 / GB)), ("GB/s", number("gb_s", 2))),
    *(("peak of host memory, GB", number("peak_host_bytes", 2, 1 / GB)), ("graphs", text("num_graphs"))),
]
STARTED: list[Column] = [
    *(("model", text("model")), ("load format", text("load_format")), ("from a checkpoint", text("checkpoint"))),
    *(("dtype", text("dtype")), ("ranks", text("tp_size"))),
    *(("resident", text("resident")), ("weights", text("weights")), ("prompt", text("input_len"))),
    *(("cold start-up s", number("avg_cold_startup_time", 2)), ("warm s", number("avg_warm_startup_time", 2))),
    *((f"capturing costs {kind}, s", number(f"{kind}_capture_cost_s", 2)) for kind in ("cold", "warm")),
]
ENDLESS: list[Column] = [
    *(("model", text("model")), ("dtype", text("dtype")), ("ranks", text("tp_size")), ("resident", text("resident"))),
    *(("weights", text("weights")), ("sinks", text("attention_sinks")), ("window", text("attention_window"))),
    *(("evicted at a time", text("eviction_tokens")), ("KV MiB a rank", number("kv_bytes_per_rank", 1, 1 / MIB))),
    *(("a token, ms", ms("decode_pass_s")), ("last over first", number("last_pass_over_first"))),
    *(("process grew by MiB", number("resident_set_growth_bytes", 1, 1 / MIB)),),
    *(("device grew by MiB", number("device_growth_bytes", 1, 1 / MIB)), *BOUND),
]
STRETCHES: list[Column] = [
    *(("output tokens", text("output_tokens")), ("a token, ms", ms("decode_pass_s"))),
    *(("mean", ms("mean_decode_pass_s")), ("process MiB", number("resident_set_bytes", 1, 1 / MIB))),
    ("device MiB", number("device_bytes", 1, 1 / MIB)),
]
SINKS: list[Column] = [
    *(("attends by", text("variant")), ("first tokens", text("sinks")), ("recent tokens", text("window"))),
    *(("evicted at a time", text("evicted_at_a_time")), ("perplexity, trained length", number("perplexity_within", 2))),
    *(("past it", number("perplexity_past", 2)), ("s", number("seconds", 1))),
]
SINKS_RUN: list[Column] = [
    *(("model", text("model")), ("dtype", text("dtype")), ("text", text("text"))),
    *(("trained length", text("trained_length")), ("attention", text("attention"))),
]
SPLIT: list[Column] = [
    *(("wire", text("wire_dtype")), ("attention", text("attention")), ("own process", text("process"))),
    *(("permuted", text("permute")), ("calls", text("num_calls")), ("sent MiB", number("sent_bytes", 2, 1 / MIB))),
    *(("received MiB", number("received_bytes", 2, 1 / MIB)), ("ms a call", ms("call_s"))),
    *(("times the plain engine's time", number("over_plain", 2)), ("same texts", text("same_texts"))),
    *(("of", text("num_texts")), ("log probability off by", text("logprob_difference"))),
]
SPLIT_RUN: list[Column] = [("model", text("model")), ("dtype", text("dtype")), ("tokens a text", text("output_len"))]
COPIED: list[Column] = [("copy GB/s", number("copy_gb_s", 0)), ("read GB/s", number("read_gb_s", 0))]
DEQUANTISERS: list[Column] = [
    *(("dequantiser", text("type")), ("matrix", text("matrix")), ("us", number("us", 1))),
    *(("written GB/s", number("written", 0)), ("moved GB/s", number("moved", 0))),
    ("moved / copy", number("share_of_copy")),
]
# Kinds of GENERIC records with names and decimals of their own: what stands above the table, and its columns.
SHOWN: dict[str, tuple[list[Column], list[Column]]] = {
    "codec": ([*RUN, ("decompressor", text("decompressor")), ("link GB/s", text("link_gb_s"))], COMPRESSED),
    STORED: ([*RUN, *COPIED], DEQUANTISERS),
    "startup": ([*RUN, *STARTED], STARTS),
    "endless": ([*RUN, *ENDLESS], STRETCHES),
    "sink_perplexity": ([*RUN, *SINKS_RUN], SINKS),
    "split": ([*RUN, *SPLIT_RUN], SPLIT),
}


def has_rows(record: Record) -> bool:
    rows = record.content.get("rows") if isinstance(record.content, dict) else None
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def generic(record: Record) -> str:
    """Shows any record: its facts in a line, and its `rows`, if it has any, as a table. SHOWN says which facts and
    columns; else it shows all."""
    rows = dequantiser_rows(record.content) if record.kind == STORED else record.content.get("rows", ())
    stated = [(key, text(key)) for key in record.content if key not in ("benchmark", "rows")]
    columns = [(key, text(key)) for key in dict.fromkeys(key for row in rows for key in row)]
    stated, columns = SHOWN.get(record.kind, (stated, columns))
    facts = record.facts() | record.content
    said = ", ".join(f"{name} {show(facts)}" for name, show in stated if show(facts))
    return f"{record.link}: {said}\n" + f"\n{table(rows, columns)}" * bool(rows)
