"""Describes how long rank 0's passes took, beside what the time model predicted."""

import time
from collections import deque
from dataclasses import dataclass, field

from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import PassTime, Rates, predict_pass

Timed = tuple[PassShape, float, PassTime]  # of a pass: its shape, the seconds that it took, and what was predicted


@dataclass
class PassTimes:
    """Seconds of the passes that ended. A pass takes from when it was submitted, or from when the pass before it ended,
    if that was later. `passes` are those since `keep`."""

    num_passes: int = 0
    measured_s: float = 0.0
    predicted_s: float = 0.0
    passes: list[Timed] | None = None  # None: none are kept
    _submitted_s: deque[float] = field(default_factory=deque)
    _ended_s: float = 0.0
    _foreseen: deque[tuple[PassShape, PassTime]] = field(default_factory=deque)

    def keep(self, passes: list[Timed] | None = None) -> list[Timed]:
        """Appends each pass that ends from now on to `passes`, or to a new list, and returns it; it grows for as long
        as the engine runs."""
        self.passes = [] if passes is None else passes
        return self.passes

    def foresee(self, shape: PassShape, work: PassWork, rates: Rates) -> None:
        """Predicts the pass that was submitted last, while it runs and the host has time: it looks at every row."""
        self._foreseen.append((shape, predict_pass(work, shape, rates)))

    def submitted(self) -> None:
        self._submitted_s.append(time.perf_counter())

    def ended(self) -> None:
        """Says that the oldest pass that was submitted has ended."""
        now_s = time.perf_counter()
        measured_s = now_s - max(self._submitted_s.popleft(), self._ended_s)
        shape, predicted = self._foreseen.popleft()
        self._ended_s = now_s
        self.num_passes += 1
        self.measured_s += measured_s
        self.predicted_s += predicted.total_s
        if self.passes is not None:
            self.passes.append((shape, measured_s, predicted))

    def forget(self) -> None:
        """Gives up the passes that have not ended."""
        self._submitted_s.clear()
        self._foreseen.clear()
