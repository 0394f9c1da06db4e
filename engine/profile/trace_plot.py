"""Draws lanes as a picture, one above the other.

Grey on the compute lane shows waits for a copy. It needs matplotlib, which `pip install penstock[plot]` brings.
"""

from penstock.engine.runtime.trace import Interval
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY
from penstock.scheduler.units import ms

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError:  # matplotlib is an extra
    Figure = None

COLOURS = {
    "wait": "#d9d9d9", "attn weights": "#4e79a7", "ffn weights": "#f28e2b", "head": "#b07aa1",
    "decompress": "#59a14f", "attn": "#76b7b2", "ffn": "#ffbe7d", "reduce": "#e15759", "other": "#9c755f",
}  # fmt: skip


def check_installed() -> None:
    """Raises ValueError if matplotlib is not installed, with the command that installs it."""
    if Figure is None:
        raise ValueError("matplotlib, which draws the picture, is not installed: pip install 'penstock[plot]'")


def kind(name: str) -> str:
    """The key in COLOURS for an instruction's label."""
    if name.startswith(("acquire", "join", "fork", "release")):
        return "wait"
    if name.startswith("decompress"):
        return "decompress"
    if name.startswith("prefetch"):
        return next((f"{group} weights" for group in ("attn", "ffn") if f".{group}" in name), "head")
    if "allreduce" in name:
        return "reduce"
    step = name.split()[0]
    if step.startswith(("attn", "rope", "attention")):
        return "attn"
    return "ffn" if step.startswith(("ffn", "activation", "parallel_add")) else "other"


def rows(title: str, intervals: list[Interval]) -> list[tuple[str, list[Interval]]]:
    """(title, intervals) of the lanes that have any, compute first."""
    lanes = [
        (f"{title}{lane}", [interval for interval in intervals if interval.lane == lane]) for lane in (COMPUTE, COPY)
    ]
    return [row for row in lanes if row[1]]


def draw(
    lanes: list[tuple[str, list[Interval]]], start_ms: float | None, end_ms: float | None, title: str, path: str
) -> None:
    """Writes the PNG: the lanes top to bottom, from `start_ms` to `end_ms` (None: the first and the last). Raises
    ValueError naming the file if it cannot be written."""
    height = 1.2 + 0.5 * len(lanes)
    figure = Figure(figsize=(12, height))
    axes = figure.add_subplot()
    for row, (_, intervals) in enumerate(lanes):
        for name, colour in COLOURS.items():
            bars = [(ms(s.start_s), ms(s.end_s - s.start_s)) for s in intervals if kind(s.name) == name]
            axes.broken_barh(bars, (-row - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.3)
    axes.set_yticks([-row for row in range(len(lanes))], [name for name, _ in lanes])
    axes.set_xlim(start_ms, end_ms)
    axes.set_xlabel("ms from the start of the pass")
    axes.set_title(title, fontsize=10)
    position = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.7 / height)}
    handles = [Patch(color=colour) for colour in COLOURS.values()]
    axes.legend(handles, list(COLOURS), ncol=len(COLOURS), fontsize=8, **position)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    try:
        figure.savefig(path, dpi=130, bbox_inches="tight", format="png")
    except OSError as error:
        raise ValueError(f"--plot {path}: {error.strerror}") from None
