"""Draws one pass of a trace as a picture: the two lanes of a rank as measured, and below as predicted.

    penstock generate --trace trace.json ...
    python scripts/plot_trace.py trace.json --pass-index 3 --output lanes.png

Grey on the compute lane is waiting for a copy. Needs matplotlib (pip install penstock[plot]).
"""

import argparse
import json

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")
COLOURS = {
    "wait": "#d9d9d9", "attn weights": "#4e79a7", "ffn weights": "#f28e2b", "head": "#b07aa1",
    "attn": "#76b7b2", "ffn": "#ffbe7d", "reduce": "#e15759", "other": "#9c755f",
}  # fmt: skip


def kind(name: str) -> str:
    """The colour's key of an instruction."""
    if name.startswith(("acquire", "join", "fork", "release")):
        return "wait"
    if name.startswith("prefetch"):
        return next((f"{group} weights" for group in ("attn", "ffn") if f".{group}" in name), "head")
    if "allreduce" in name:
        return "reduce"
    step = name.split()[0]
    if step.startswith(("attn", "rope", "attention")):
        return "attn"
    return "ffn" if step.startswith(("ffn", "activation", "parallel_add")) else "other"


def lanes(events: list[dict], pass_index: int, rank: int) -> list[tuple[str, list[dict]]]:
    """(title, events) of the lanes to draw, top to bottom. Raises ValueError if the trace has no such pass."""
    chosen = [e for e in events if e["ph"] == "X" and e["args"]["pass"] == pass_index and e["pid"] // 2 == rank]
    if not chosen:
        raise ValueError(f"the trace has no pass {pass_index} of rank {rank}")
    titles = {(0, 0): "compute", (0, 1): "copy", (1, 0): "compute, predicted", (1, 1): "copy, predicted"}
    return [(title, [e for e in chosen if (e["pid"] % 2, e["tid"]) == key]) for key, title in titles.items()]


def draw(rows: list[tuple[str, list[dict]]], start_ms: float, end_ms: float | None, title: str, output: str) -> None:
    origin = min(event["ts"] for _, events in rows for event in events)
    figure, axes = plt.subplots(figsize=(12, 3.2))
    for place, (_, events) in enumerate(rows):
        for name, colour in COLOURS.items():
            spans = [((e["ts"] - origin) / 1e3, e["dur"] / 1e3) for e in events if kind(e["name"]) == name]
            axes.broken_barh(spans, (-place - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.3)
    axes.set_yticks([-place for place in range(len(rows))], [name for name, _ in rows])
    axes.set_xlim(start_ms, end_ms)
    axes.set_xlabel("ms from the start of the pass")
    axes.set_title(title, fontsize=10)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes.legend(handles, list(COLOURS), ncol=len(COLOURS), loc="upper center", bbox_to_anchor=(0.5, -0.22), fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(output, dpi=130, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--pass-index", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--start-ms", type=float, default=0.0)
    parser.add_argument("--end-ms", type=float, default=None)
    parser.add_argument("--title", default="")
    parser.add_argument("--output", default="trace.png")
    args = parser.parse_args()
    with open(args.trace) as file:
        events = json.load(file)["traceEvents"]
    draw(lanes(events, args.pass_index, args.rank), args.start_ms, args.end_ms, args.title, args.output)


if __name__ == "__main__":
    main()
