"""Replays a pass plan on two clocks, as the executor's lanes would run it. Traces are drawn beside the result.

Torch-free.
"""

from collections.abc import Callable
from dataclasses import dataclass

from penstock.scheduler.cost.time_model import Rates, decompress_s, link_s
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY, Compute, Decompress, Event, PassPlan, Prefetch


@dataclass(frozen=True)
class Interval:
    """A stretch of one lane, in seconds from the start of the pass. That of an acquire or a join is the time waited."""

    lane: str
    name: str
    start_s: float
    end_s: float


def predict_timeline(
    plan: PassPlan, compute_s: Callable[[Compute | Decompress], float], rates: Rates, launch_s: float = 0.0
) -> list[Interval]:
    """Replays the plan: each lane runs in its order, and no instruction starts before the events that it waits for.

    `compute_s` gives the seconds of a compute step, which the host launches in `launch_s`, one after another, and those
    of a partial decompression, which depend on the pass. The intervals are in the plan's order; the last one is the
    join, and its end is the time of the pass (see `timeline_s`).
    """
    clock, host_s = {COMPUTE: 0.0, COPY: 0.0}, 0.0
    at: dict[Event, float] = {}
    intervals = []
    for instruction in plan.instructions:
        before = clock[instruction.lane]
        start = end = max([before, *(at[event] for event in instruction.waits)])
        if isinstance(instruction, Compute):
            host_s += launch_s
            start = max(start, host_s)
            end = start + compute_s(instruction)
        elif isinstance(instruction, Decompress):
            nbytes, is_partial = instruction.slot.nbytes, instruction.is_partial
            end = start + (compute_s(instruction) if is_partial else decompress_s(nbytes, 1, rates))
        elif isinstance(instruction, Prefetch):
            end = start + link_s(instruction.slot.nbytes, rates)
        else:
            start = before
        clock[instruction.lane] = end
        if instruction.records is not None:
            at[instruction.records] = end
        intervals.append(Interval(instruction.lane, str(instruction), start, end))
    return intervals


def timeline_s(intervals: list[Interval]) -> float:
    """Seconds of the predicted pass."""
    return max((interval.end_s for interval in intervals), default=0.0)
