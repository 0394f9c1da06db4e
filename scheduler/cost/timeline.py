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


def waited_s(plan: PassPlan, compute_s: Callable[[Compute | Decompress], float], rates: Rates) -> float:
    """Seconds by which a pass is longer than each of its lanes where both take as long as each other. The ring has no
    room for all that could be copied ahead then, so the compute lane waits, mostly for the last groups. `compute_s` is
    that of any pass, which is stretched to take as long as the copies."""
    copies_s = sum(link_s(each.slot.nbytes, rates) for each in plan.instructions if isinstance(each, Prefetch))
    if not copies_s:
        return 0.0
    replayed = zip(plan.instructions, predict_timeline(plan, compute_s, rates), strict=True)
    taken = [
        (isinstance(each, Decompress) and not each.is_partial, one.end_s - one.start_s)
        for each, one in replayed
        if isinstance(each, Compute | Decompress)
    ]
    fixed_s, steps_s = (sum(seconds for is_fixed, seconds in taken if is_fixed is which) for which in (True, False))
    stretch = max(copies_s - fixed_s, 0.0) / steps_s if steps_s else 0.0
    stretched = iter([stretch * seconds for is_fixed, seconds in taken if not is_fixed])
    return max(timeline_s(predict_timeline(plan, lambda step: next(stretched), rates)) - copies_s, 0.0)


def timeline_s(intervals: list[Interval]) -> float:
    """Seconds of the predicted pass."""
    return max((interval.end_s for interval in intervals), default=0.0)
