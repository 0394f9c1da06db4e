"""The plan itself, replayed on two clocks, as the executor's lanes would run it: what a trace is drawn beside.

Torch-free.
"""

from collections.abc import Callable
from dataclasses import dataclass

from penstock.scheduler.cost.time_model import Rates, decompress_s, link_s
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY, Compute, Decompress, Event, PassPlan, Prefetch


@dataclass(frozen=True)
class Span:
    """A stretch of one lane, in seconds from the start of the pass. An acquire's or a join's is the time waited."""

    lane: str
    name: str
    start_s: float
    end_s: float


def predict_timeline(
    plan: PassPlan, compute_s: Callable[[Compute], float], rates: Rates, launch_s: float = 0.0
) -> list[Span]:
    """Replays the plan: each lane in its order, an instruction not before the events that it waits for.

    `compute_s` gives the seconds of a compute step, which the host launches in `launch_s`, one after another. The spans
    are in the plan's order; the last one's end, that of the join, is the time of the pass (see `timeline_s`).
    """
    clock, host_s = {COMPUTE: 0.0, COPY: 0.0}, 0.0
    at: dict[Event, float] = {}
    spans = []
    for instruction in plan.instructions:
        before = clock[instruction.lane]
        start = end = max([before, *(at[event] for event in instruction.waits)])
        if isinstance(instruction, Compute):
            host_s += launch_s
            start = max(start, host_s)
            end = start + compute_s(instruction)
        elif isinstance(instruction, Decompress):
            end = start + decompress_s(instruction.place.nbytes, 1, rates)
        elif isinstance(instruction, Prefetch):
            end = start + link_s(instruction.slot.nbytes, rates)
        else:
            start = before
        clock[instruction.lane] = end
        if instruction.records is not None:
            at[instruction.records] = end
        spans.append(Span(instruction.lane, str(instruction), start, end))
    return spans


def timeline_s(spans: list[Span]) -> float:
    """Seconds of the predicted pass."""
    return max((span.end_s for span in spans), default=0.0)
