"""The records of benchmarks/, and what they measured as rows: decode passes, prefills, throughput, comparisons.

It imports no torch.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.scheduler.units import gb_s

from scripts.report.markdown_table import Row

LATENCY, THROUGHPUT, TRAFFIC, SERVING = "latency", "throughput", "traffic", "serving"
STORED = "stored_kernels"


@dataclass(frozen=True)
class Record:
    """One file of benchmarks/; `kind` is what its `benchmark` field says."""

    name: str
    content: Any

    @property
    def kind(self) -> str | None:
        return self.content.get("benchmark") if isinstance(self.content, dict) else None

    @property
    def link(self) -> str:
        return f"[{self.name}](../benchmarks/{self.name})"

    def facts(self) -> Row:
        """Facts of the record that each of its rows states beside its own figures."""
        names = ("hardware", "commit", "model", "dtype", "tp_size", "resident")
        names += ("input_len", "output_len", "attention_window")
        weights = "compressed" if any(self.content.get("compressed_groups", ())) else "plain"
        weights = ", ".join(self.content.get("quantised_as", ())) or weights
        facts = {name: self.content.get(name) for name in names}
        ranks = f"{facts['tp_size']}, NCCL alone" if self.content.get("collectives") == "Nccl" else facts["tp_size"]
        return facts | {"ranks": ranks, "weights": weights, "record": self.link}


def read_records(folder: Path) -> list[Record]:
    """All records of a folder by name. Raises ValueError naming a file that is not JSON."""
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(Record(path.name, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise ValueError(f"{path}: is not JSON: {error}") from None
    return records


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
    """The rate of `decode_rows`; None where nothing is compressed."""
    compressed = any(content.get("compressed_groups", ()))
    return gb_s(content["plain_streamed_bytes_per_pass_and_rank"], seconds) if compressed else None


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


def traffic_rows(records: list[Record]) -> list[Row]:
    """A row for each row of real traffic, with vLLM's version where it ran too, as a baseline of its own where its
    weights were offloaded."""
    rows = []
    for record in records:
        if record.kind == TRAFFIC:
            vllm = record.content.get("vllm", {})
            theirs = {"vllm_version": vllm.get("version")}
            theirs["baseline"] = "vllm-offload" if "offloaded_bytes" in vllm else "vllm"
            rows += [record.facts() | theirs | row for row in record.content["rows"]]
    return rows


def kind_rows(records: list[Record]) -> list[Row]:
    """A row for each kind of pass of a job, where the record tells them apart."""
    jobs = [(record, record.content) for record in records if record.kind == THROUGHPUT]
    jobs += [(record, row) for record in records if record.kind == TRAFFIC for row in record.content["rows"]]
    return [record.facts() | {"job": job.get("row")} | row for record, job in jobs for row in job.get("by_kind", ())]


def dequantiser_rows(content: Row) -> list[Row]:
    """A row for each dequantiser and matrix of a record of stored kernels, with its share of the rate of a copy."""
    return [
        {"type": kind, "matrix": matrix} | rates | {"share_of_copy": rates["moved"] / content["copy_gb_s"]}
        for kind, matrices in content.get("dequantise", {}).items()
        for matrix, rates in matrices.items()
    ]


def comparison_rows(records: list[Record]) -> list[Row]:
    """A row for each comparison, with the bound of our own pass or run that was compared."""
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
    for row in traffic_rows(records):
        if row.get("speedup") is not None:
            rows.append(row | {"ours_s": row["measured_s"], "theirs_s": row["vllm_measured_s"]})
    return rows + [row for record in records if record.kind == SERVING for row in served_rows(record)]


def served_rows(record: Record) -> Iterator[Row]:
    """Rows of what clients of our server and of vLLM's felt, if both ran: all requests, by tokens a second, and the
    medians of first tokens and of tokens."""
    if "vllm_ratios" not in record.content:
        return
    _, ours, theirs = record.content["rows"]
    facts = record.facts() | {"baseline": "vllm-serve"}
    yield facts | {"row": "served requests", "speedup": ours["tokens_per_second"] / theirs["tokens_per_second"]}
    for name, row in (("ttft", "first token, served"), ("tpot", "token, served")):
        ours_s, theirs_s = (one[f"median_{name}_ms"] / 1e3 for one in (ours, theirs))
        yield facts | {"row": row, "ours_s": ours_s, "theirs_s": theirs_s, "speedup": theirs_s / ours_s}
