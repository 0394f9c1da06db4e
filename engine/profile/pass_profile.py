"""Counts where the time of a pass goes: the share of each instruction, and the most that the pass could gain from it.

A profile is made from the intervals of one real pass. Amdahl's bound says which instruction is worth work: an
instruction with the share s makes the pass at most 1 / (1 - s) times faster, even if it cost nothing at all.
"""

from collections import Counter
from dataclasses import dataclass

from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.profile.traced_run import pass_s
from penstock.engine.runtime.trace import Interval
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY
from penstock.scheduler.units import GB, gb_s


@dataclass(frozen=True)
class StepShare:
    """The sum of all calls of one step in a pass, over all layers. `at_most` is Amdahl's bound; rates are None where
    the plan knows no bytes or FLOPs."""

    step: str
    num_calls: int
    seconds: float
    share: float
    at_most: float
    predicted_s: float
    gb_s: float | None
    tflops: float | None


@dataclass(frozen=True)
class CopyLane:
    """The bytes and times of the copy lane in a pass."""

    copied_bytes: int
    busy_s: float
    idle_s: float

    @property
    def gb_s(self) -> float:
        """The rate while it was busy, in 1e9 bytes/s."""
        return gb_s(self.copied_bytes, self.busy_s)


@dataclass(frozen=True)
class PassProfile:
    """The profile of one pass. `steps` are those of rank 0's compute lane, the longest first; `copy_lane` is None where
    nothing streams; `rank_s` are the seconds of the pass on each rank."""

    shape: PassShape
    pass_s: float
    predicted_s: float
    steps: list[StepShare]
    copy_lane: CopyLane | None
    rank_s: list[float]

    @property
    def slowest_rank(self) -> int:
        return self.rank_s.index(max(self.rank_s))


def profile_pass(
    plan: EnginePlan, shape: PassShape, ranks: list[list[Interval]], predicted: list[Interval]
) -> PassProfile:
    """Makes the profile. `ranks` are the measured intervals of the pass on each rank, `predicted` the time model's for
    one."""
    measured, whole_s = ranks[0], pass_s(ranks[0])
    seconds, expected = _seconds_by_step(measured), _seconds_by_step(predicted)
    calls = Counter(step_name(interval) for interval in measured if interval.lane == COMPUTE)
    nbytes, flops = Counter(), Counter()
    for work, count in plan.steps:
        nbytes[work.step] += count * work.nbytes(shape)
        flops[work.step] += count * work.flops(shape)
    kept = dict(plan.kept.groups) | plan.kept.compressed
    nbytes["decompress"] = sum(kept[i.group] + i.slot.nbytes for i in plan.pass_plan.decompressions)  # read, written
    steps = [
        StepShare(
            step=step,
            num_calls=calls[step],
            seconds=spent_s,
            share=spent_s / whole_s,
            at_most=1 / (1 - spent_s / whole_s),
            predicted_s=expected[step],
            gb_s=_rate(nbytes[step], spent_s, GB),
            tflops=_rate(flops[step], spent_s, 1e12),
        )
        for step, spent_s in seconds.most_common()
    ]
    copies = [interval for interval in measured if interval.lane == COPY]
    busy_s = sum(interval.end_s - interval.start_s for interval in copies)
    copy_lane = CopyLane(plan.pass_plan.streamed_bytes, busy_s, whole_s - busy_s) if copies else None
    return PassProfile(shape, whole_s, pass_s(predicted), steps, copy_lane, [pass_s(intervals) for intervals in ranks])


def step_name(interval: Interval) -> str:
    """The label of an interval without layer or group."""
    return interval.name.split()[0]


def _seconds_by_step(intervals: list[Interval]) -> Counter:
    """Seconds of each step on the compute lane."""
    seconds = Counter()
    for interval in intervals:
        if interval.lane == COMPUTE:
            seconds[step_name(interval)] += interval.end_s - interval.start_s
    return seconds


def _rate(amount: float, seconds: float, unit: float) -> float | None:
    return amount / seconds / unit if amount and seconds else None
