"""Draws a PassPlan as a step table: the table is the plan. Torch-free.

It has a row for each compute instruction and a column for each activation with its letters (+ create, o keep, r read,
w write, x destroy). A row also shows the weights that its instruction reads and the copies that are issued right after.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from penstock.scheduler.passes.check import lifetimes
from penstock.scheduler.passes.pass_plan import (
    COPY,
    Acquire,
    Compute,
    Decompress,
    Instruction,
    Join,
    PassPlan,
    Prefetch,
    Release,
)
from penstock.scheduler.units import show_bytes

ORDER = "+orwx"


@dataclass(frozen=True)
class Row:
    """A line of the table; `copy` are the copies issued right after the compute instruction."""

    layer_idx: int | None  # None for acquire, release, fork and join, which are shown with their neighbours
    name: str
    letters: dict[str, str]
    weights: str
    copy: tuple[str, ...]


def render(plan: PassPlan, token_bytes: Mapping[str, tuple[str, int]], layer_idx: int = 0) -> str:
    """The table of a plan: everything before, in and after layer `layer_idx`, the other layers as one "..." row.

    `token_bytes` gives for each activation what its rows are ("tokens" or "rows") and the bytes of one. The text ends
    with the lifetimes in that layer and the legend.
    """
    rows = _shown(_rows(plan), layer_idx)
    columns = [name for name in plan.activations if any(name in row.letters for row in rows)]
    head = ["compute lane", *columns, "weights", "copy lane"]
    cells = [[r.name, *(r.letters.get(c, "") for c in columns), r.weights, ", ".join(r.copy)] for r in rows]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [head, *cells]]
    lines.insert(1, "-+-".join("-" * width for width in widths))
    return "\n".join([*lines, "", *_sizes(plan, columns, token_bytes), LEGEND])


LEGEND = "+ create, o keep, r read, w write, x destroy; a copy waits for `free` of the groups named after <-"


def _rows(plan: PassPlan) -> list[Row]:
    """A row for every compute-lane instruction, with the letters of all activations; "o" means alive but untouched."""
    spans, rows = lifetimes(plan), []
    for index, instruction in enumerate(plan.instructions):
        if instruction.lane == COPY:
            last = rows[-1]
            rows[-1] = Row(last.layer_idx, last.name, last.letters, last.weights, (*last.copy, _copy(instruction)))
            continue
        touched = dict(getattr(instruction, "effects", ()))
        alive = [name for name, lives in spans.items() if any(a <= index <= b for a, b in lives)]
        letters = {name: "".join(sorted(touched.get(name, "o"), key=ORDER.index)) for name in alive}
        rows.append(Row(_layer_of(instruction), str(instruction), letters, _weights(instruction), ()))
    return rows


def _layer_of(instruction: Instruction) -> int | None:
    if isinstance(instruction, Compute):
        return instruction.layer_idx
    group = getattr(instruction, "group", None)
    return group.layer_idx if group is not None else None


def _weights(instruction: Instruction) -> str:
    if isinstance(instruction, Compute):
        return str(instruction.group or "")
    if isinstance(instruction, Acquire):
        return "in the ring" if instruction.present else f"waits ready({instruction.group})"
    if isinstance(instruction, Decompress):
        return f"{show_bytes(instruction.slot.nbytes)} decompressed"
    if isinstance(instruction, Release):
        return f"records free({instruction.group})"
    return f"waits ready({instruction.last})" if isinstance(instruction, Join) else ""


def _copy(copy: Prefetch) -> str:
    after = ", ".join(map(str, copy.after))
    return str(copy) + (f" <- {after}" if after else "")


def _shown(rows: list[Row], layer_idx: int) -> list[Row]:
    """The rows without those of other layers; one row stands for each run of layers that are left out."""
    last = max((row.layer_idx for row in rows if row.layer_idx is not None), default=0)  # the head's
    shown: list[Row] = []
    hidden: list[Row] = []
    for row in rows:
        if row.layer_idx is None or row.layer_idx in (-1, layer_idx) or row.layer_idx >= last:
            if hidden:
                shown.append(_ellipsis(hidden))
                hidden = []
            shown.append(row)
        else:
            hidden.append(row)
    return shown


def _ellipsis(hidden: list[Row]) -> Row:
    first, last = hidden[0].layer_idx, hidden[-1].layer_idx
    num_copies = sum(len(row.copy) for row in hidden)
    name = f"... layer {first}" if first == last else f"... layers {first} to {last} alike"
    return Row(first, name, {}, "", (f"{num_copies} more copies",) if num_copies else ())


def _sizes(plan: PassPlan, columns: list[str], token_bytes: Mapping[str, tuple[str, int]]) -> list[str]:
    """Lines with the bytes of each activation and where its first life begins and ends."""
    intervals = lifetimes(plan)
    lines = []
    for name in columns:
        unit, nbytes = token_bytes[name]
        first, last = intervals[name][0]
        lives = f"{len(intervals[name])} lives" if len(intervals[name]) > 1 else "1 life"
        where = f"{plan.instructions[first]} to {plan.instructions[last]}"
        lines.append(f"{name:<8}{nbytes:>10} bytes a {unit[:-1]:<6} {lives:>9}, the first from {where}")
    ring = f"ring {show_bytes(plan.ring.ring_bytes)}, {show_bytes(plan.streamed_bytes)} cross the link in a pass"
    return [*lines, ring]
