"""The records of benchmarks/ as a page of tables, grouped by the question that they answer. PURE: text from records.

Every record is on the page: one of a kind that is not known here is a table of its `rows`, or else its file name.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]

INTRODUCTION = """# Benchmarks

Rendered by `python scripts/render_benchmarks.py` from the records in `benchmarks/`; do not edit. Times of passes are
medians, in ms. The bound is that of one rank, max(bytes streamed / link, bytes read / read rate, FLOPs / GEMM rate), at
rates measured in the same run; "by" says which term binds, the fraction is bound / time. Predictions are the time
model's, from the rates which the plan had before anything was measured. Rates are a rank's.

![fraction of the bound](benchmarks/fraction.png)

![time of a decode pass](benchmarks/pass_time.png)
"""
GENERIC = {  # kind of record: its section
    "kernels": "Kernels",
    "link": "Link",
    "collectives": "Collectives",
    "codec": "Lossless code",
    "startup": "Start-up",
    "tests/gpu": "Tests on GPUs",
}
LATENCY, THROUGHPUT = "latency", "throughput"
DECIMALS = 3


@dataclass(frozen=True)
class Record:
    """One file of benchmarks/; `kind` is what its `benchmark` field says, None where it has none."""

    name: str
    content: Any

    @property
    def kind(self) -> str | None:
        return self.content.get("benchmark") if isinstance(self.content, dict) else None

    @property
    def link(self) -> str:
        return f"[{self.name}](../benchmarks/{self.name})"

    def facts(self) -> Row:
        """What each of its rows states beside its own figures."""
        names = ("hardware", "commit", "model", "dtype", "tp_size", "resident", "input_len", "output_len")
        weights = "coded" if any(self.content.get("coded_groups", ())) else "plain"
        return {name: self.content.get(name) for name in names} | {"weights": weights, "record": self.link}


def read_records(folder: Path) -> list[Record]:
    """All records of a folder by name. Raises ValueError naming a file that is not JSON."""
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(Record(path.name, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise ValueError(f"{path}: is not JSON: {error}") from None
    return records


def render(records: list[Record]) -> str:
    """The page."""
    decodes, sections = decode_rows(records), []
    streamed = [row for row in decodes if row["streamed_bytes"]]
    resident = [row for row in decodes if not row["streamed_bytes"]]
    for title, rows, columns in (
        ("Streamed decode", streamed, DECODE),
        ("Resident decode", resident, DECODE),
        ("Prefill", prefill_rows(records), PREFILL),
        ("Throughput", throughput_rows(records), THROUGHPUTS),
        ("Against others", comparison_rows(records), COMPARISONS),
    ):
        sections.append(f"## {title}\n\n" + (table(rows, columns) if rows else "No record yet.\n"))
    for kind, title in GENERIC.items():
        tables = [generic(record) for record in records if record.kind == kind]
        sections.append(f"## {title}\n\n" + ("\n".join(tables) or "No record yet.\n"))
    others = [record for record in records if record.kind not in (LATENCY, THROUGHPUT, *GENERIC)]
    tables = [generic(record) for record in others if has_rows(record)]
    names = [f"- {record.link}: {record.kind or 'no benchmark'}" for record in others if not has_rows(record)]
    sections.append("## Other records\n\n" + "\n".join([*tables, "\n".join(names)]) + "\n")
    return "\n".join([INTRODUCTION, *sections])


def decode_rows(records: list[Record]) -> list[Row]:
    """A row for each batch size of a record: its fields, those of the record, the bytes that a pass streams, and the
    rate at which plain weights would have had to come."""
    rows = [
        record.facts()
        | {"streamed_bytes": record.content["streamed_bytes_per_pass_and_rank"]}
        | {"plain_gb_s": plain_gb_s(record.content, row["decode_pass_s"])}
        | row
        for record in records
        if record.kind == LATENCY
        for row in record.content["passes"]
        if "decode_pass_s" in row
    ]
    return sorted(rows, key=lambda row: (row["model"], row["tp_size"], str(row["resident"]), row["batch_size"]))


def plain_gb_s(content: Row, seconds: float) -> float | None:
    """None where nothing is coded."""
    coded = any(content.get("coded_groups", ()))
    return content["plain_streamed_bytes_per_pass_and_rank"] / seconds / 1e9 if coded else None


def prefill_rows(records: list[Record]) -> list[Row]:
    return [
        record.facts() | {"batch_size": row["batch_size"]} | row["first_token"]
        for record in records
        if record.kind == LATENCY
        for row in record.content["passes"]
        if "first_token" in row
    ]


def throughput_rows(records: list[Record]) -> list[Row]:
    return [record.content | record.facts() for record in records if record.kind == THROUGHPUT]


def comparison_rows(records: list[Record]) -> list[Row]:
    """With the bound of our own pass, or run, that was compared."""
    rows = []
    for record in records:
        for row in record.content.get("comparisons", ()) if isinstance(record.content, dict) else ():
            ours = record.content
            if record.kind == LATENCY:
                ours = next((one for one in ours["passes"] if one["batch_size"] == row.get("batch_size")), {})
            bound = {name: ours.get(name) for name in ("bound", "fraction_of_bound")}
            times = {"ours_s": row.get("our_token_s", ours.get("elapsed_time"))}
            times["theirs_s"] = row.get("token_s", row.get("elapsed_time"))
            rows.append(record.facts() | bound | times | row)
    return rows


def text(key: str) -> Callable[[Row], str]:
    return lambda row: cell(row.get(key))


def number(key: str, decimals: int = DECIMALS, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else f"{row[key] * scale:.{decimals}f}"


def ms(key: str) -> Callable[[Row], str]:
    return number(key, 2, 1e3)


MODEL: list[Column] = [(name, text(key)) for name, key in (("model", "model"), ("ranks", "tp_size"))]
MODEL += [
    ("resident", text("resident")),
    ("weights", text("weights")),
    ("batch", text("batch_size")),
    ("prompt", text("input_len")),
]
BOUND: list[Column] = [("bound", ms("bound_s")), ("by", text("bound")), ("fraction", number("fraction_of_bound"))]
BOUND += [("predicted", ms("predicted_s")), ("predicted / time", number("predicted_over_measured", 2))]
RATES: list[Column] = [("tokens/s", number("tokens_per_second", 1)), ("link GB/s", number("achieved_link_gb_s", 2))]
RATES += [("read GB/s", number("achieved_memory_gb_s", 0)), ("TFLOP/s", number("achieved_tflops", 2))]
SOURCE: list[Column] = [(name, text(name)) for name in ("hardware", "commit", "record")]
GRAPH: list[Column] = [("graph alone", ms("graph_s")), ("pass / graph", number("step_over_graph"))]
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
    *(("output", text("output_len")), ("requests", text("num_requests")), ("time", ms("elapsed_time"))),
    *BOUND,
    *(("requests/s", number("requests_per_second", 2)), ("output tokens/s", number("output_tokens_per_second", 1))),
    *RATES,
    *SOURCE,
]
COMPARISONS: list[Column] = [
    *MODEL,
    *(("against", text("baseline")), ("theirs", ms("theirs_s")), ("ours", ms("ours_s"))),
    *(("times faster", number("speedup", 2)), ("first token, times faster", number("first_token_speedup", 2))),
    *(("equal tokens", text("equal_tokens")), ("of", text("num_tokens")), ("error", text("error"))),
    *(("ours bound by", text("bound")), ("fraction", number("fraction_of_bound"))),
    *SOURCE,
]


def table(rows: Iterable[Row], columns: list[Column]) -> str:
    """A Markdown table; columns without any value are left out."""
    lines = [[show(row) for _, show in columns] for row in rows]
    used = [place for place in range(len(columns)) if any(line[place] for line in lines)]
    head = [columns[place][0] for place in used]
    body = [[line[place] for place in used] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(used), *body)) + "\n"


def has_rows(record: Record) -> bool:
    rows = record.content.get("rows") if isinstance(record.content, dict) else None
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def generic(record: Record) -> str:
    """Any record with `rows`: what it states as a list, its rows as a table of their keys."""
    stated = {key: value for key, value in record.content.items() if key not in ("benchmark", "rows")}
    lines = [record.link + ":", *(f"{key} {cell(value)}," for key, value in stated.items())]
    keys = dict.fromkeys(key for row in record.content.get("rows", ()) for key in row)
    columns = [(key, text(key)) for key in keys]
    return " ".join(lines).rstrip(",") + "\n\n" + table(record.content.get("rows", ()), columns)


def cell(value: Any) -> str:
    """A value as Markdown that does not break a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(one)}" for key, one in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")
