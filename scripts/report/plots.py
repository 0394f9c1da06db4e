"""Draws the records of benchmarks/: how near each row came to its bound, and the time of a pass by batch.

It needs matplotlib (pip install penstock[plot]).
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.ticker import ScalarFormatter
from penstock.scheduler.units import ms

from scripts.report.markdown_table import Row
from scripts.report.records import Record, decode_rows, prefill_rows, throughput_rows

matplotlib.use("Agg")
COLOURS = {"link": "#4e79a7", "memory": "#f28e2b", "compute": "#59a14f"}


def draw_all(records: list[Record], folder: Path) -> None:
    """Writes fraction.png and pass_time.png into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_fractions(records, folder / "fraction.png")
    draw_pass_times(decode_rows(records), folder / "pass_time.png")


def draw_fractions(records: list[Record], path: Path) -> None:
    groups = [("decode", decode_rows(records)), ("prefill", prefill_rows(records))]
    groups.append(("throughput", throughput_rows(records)))
    bars = [(f"{title}, {series(row)}, {size(row)}", row) for title, rows in groups for row in rows]
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.28 * len(bars)))
    heights = range(len(bars), 0, -1)
    for height, (_, row) in zip(heights, bars):
        axes.barh(height, row["fraction_of_bound"], color=COLOURS[row["bound"]])
        axes.text(row["fraction_of_bound"] + 0.005, height, f"{row['fraction_of_bound']:.2f}", va="center", fontsize=7)
    axes.set_yticks(list(heights), [label for label, _ in bars], fontsize=7)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.legend(*legend(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(COLOURS), fontsize=7)
    axes.set_xlabel("bound / time")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_pass_times(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(10, 5))
    for index, name in enumerate(dict.fromkeys(map(series, rows))):
        points = [row for row in rows if series(row) == name]
        batches, colour = [row["batch_size"] for row in points], f"C{index % 10}"
        axes.plot(batches, [ms(row["decode_pass_s"]) for row in points], "o-", color=colour, label=name)
        axes.plot(batches, [ms(row["bound_s"]) for row in points], "_--", color=colour, markersize=12)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_yscale("log")
    axes.set_xlabel("batch")
    axes.set_ylabel("ms a decode pass (dashed: its bound)")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def series(row: Row) -> str:
    ranks = "1 rank" if row["tp_size"] == 1 else f"{row['tp_size']} ranks"
    return f"{row['model']}, {ranks}, resident {row['resident']}, prompt {row['input_len']}"


def size(row: Row) -> str:
    return f"batch {row['batch_size']}" if "batch_size" in row else f"{row['num_requests']} requests"


def legend() -> tuple[list, list[str]]:
    return [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()], list(COLOURS)
