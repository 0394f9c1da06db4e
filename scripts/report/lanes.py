"""Draws recorded traces: the two lanes of a pass, compute above copy, by the plot code of `penstock profile`.

Each trace is drawn whole, with what was predicted below what was measured; and the beginnings of all traces are drawn
one above the other, for README.
"""

import json
from pathlib import Path

from penstock.engine.profile.trace_plot import draw, rows
from penstock.engine.runtime.trace import Interval, read_intervals

BEGINNING_MS = 40.0


def draw_lanes(records: Path, folder: Path) -> None:
    """Writes NAME.png for each trace NAME.json among the records, and lanes.png, into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    beginnings: list[tuple[str, list[Interval]]] = []
    for path in sorted(records.glob("trace_*.json")):
        content, intervals = json.loads(path.read_text(encoding="utf-8")), read_intervals(str(path))
        title = f"{content['model']} on {content['hardware']}: {content['pass']}"
        measured, predicted = intervals[0, False], intervals.get((0, True), [])
        drawn = rows("", measured) + rows("predicted ", predicted)
        draw(drawn, None, None, title, str(folder / f"{path.stem}.png"))
        beginnings += rows(content["pass"].partition(", all weights")[0] + ": ", measured)
    if beginnings:
        title = f"the first {BEGINNING_MS:g} ms of recorded passes whose weights all stream"
        draw(beginnings, 0.0, BEGINNING_MS, title, str(folder / "lanes.png"))
