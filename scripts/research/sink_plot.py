"""Draws a record of sink_perplexity.py: perplexity along the text, with a line for each way to attend.

Lines of windows can be too near each other for the eye, so a second plot below shows them alone, beside the sinks. It
needs matplotlib, which `pip install penstock[plot]` brings.
"""

from typing import Any

from penstock.engine.profile.trace_plot import check_installed

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter
except ImportError:  # matplotlib is an extra
    Figure = None

STYLES = {  # a line lies above those before it
    "full": {"color": "#e15759", "linewidth": 1.6},
    "recomputed": {"color": "#bab0ac", "linewidth": 4.0},
    "window": {"color": "#f28e2b", "linewidth": 1.6},
    "sinks": {"color": "#4e79a7", "linewidth": 1.6},
}


def draw(record: dict[str, Any], path: str) -> None:
    """Writes the PNG. Raises ValueError if there is no matplotlib, or naming a file that cannot be written."""
    check_installed()
    figure = Figure(figsize=(10, 6.5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1), gridspec_kw={"hspace": 0.08})
    _draw_perplexity(above, record)
    _draw_distance(below, record)
    for axes in (above, below):
        axes.axvline(record["trained_length"], color="black", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3, which="both")
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:
        raise ValueError(f"--plot {path}: {error.strerror}") from None


def _draw_perplexity(axes: "Axes", record: dict[str, Any]) -> None:
    rows = {row["variant"]: row for row in record["rows"]}
    for name, style in STYLES.items():
        axes.plot(middles(record), record["running"][name], label=label(rows[name]), **style)
    trained = record["trained_length"]
    where = {"xy": (trained, 0.97), "xycoords": ("data", "axes fraction"), "va": "top"}
    axes.annotate(f" trained length, {trained}", fontsize=8, **where)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, record["num_tokens"])
    axes.set_ylabel(f"perplexity of each {record['block_tokens']} tokens")
    lines, labels = axes.get_legend_handles_labels()
    beside = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2, "frameon": False}
    title = "attends to (perplexity past the trained length)"
    axes.legend(lines[::-1], labels[::-1], title=title, fontsize=9, title_fontsize=9, **beside)


def _draw_distance(axes: "Axes", record: dict[str, Any]) -> None:
    running = record["running"]
    for name in ("recomputed", "window"):
        apart = [(other / sinks - 1) * 100 for other, sinks in zip(running[name], running["sinks"])]
        axes.plot(middles(record), apart, **STYLES[name])
    axes.axhline(0, **STYLES["sinks"])
    axes.set_ylabel("% above sinks")
    axes.set_xlabel(f"token of the text ({record['model']} model)")


def middles(record: dict[str, Any]) -> list[float]:
    """The middles of the blocks, the last of which may be short."""
    size, total = record["block_tokens"], record["num_tokens"]
    return [(start + min(start + size, total)) / 2 for start in range(0, total, size)]


def label(row: dict[str, Any]) -> str:
    """The legend of a line: what is attended to, and the perplexity past the trained length."""
    attended = {
        "sinks": f"sinks: first {row['sinks']} and {row['window']} recent tokens",
        "window": f"window: {row['window']} recent tokens",
        "recomputed": "the same window, recomputed",
        "full": "full attention",
    }[row["variant"]]
    past = row["perplexity_past"]
    return attended if past is None else f"{attended} ({past:.4g})"
