"""Describes how long rank 0's passes took, beside what the time model predicted."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import PassTime, Rates, predict_pass

NUM_RECENT, RECENT_S = 1000, 10.0  # the passes, and their last seconds, over which tokens/s are taken
NUM_LATE = 32  # passes that tell how early the next one may end, and how long the host may take


class Timed(NamedTuple):
    """A pass that ended: its shape, the seconds that it took, what was predicted, and the CPU seconds of this process,
    all threads, that went by with it, less those in which it only waited for tokens."""

    shape: PassShape
    measured_s: float
    predicted: PassTime
    host_s: float


@dataclass
class PassTimes:
    """Seconds of the passes that ended. A pass takes from when it was submitted, or from when the pass before it ended,
    if that was later. `passes` are those since `keep`; `recent` has when the last ones ended, and their tokens."""

    num_passes: int = 0
    measured_s: float = 0.0
    predicted_s: float = 0.0
    passes: list[Timed] | None = None  # None: none are kept
    last: Timed | None = None  # the one that ended last
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    _submitted_s: deque[tuple[float, float]] = field(default_factory=deque)  # by the clock, and of CPU
    _ended_s: tuple[float, float] = (0.0, 0.0)
    _waited_s: float = 0.0  # of CPU, since a pass ended
    _foreseen: deque[tuple[PassShape, PassTime]] = field(default_factory=deque)
    _late: deque[Timed] = field(default_factory=lambda: deque(maxlen=NUM_LATE))

    def keep(self, passes: list[Timed] | None = None) -> list[Timed]:
        """Appends each pass that ends from now on to `passes`, or to a new list, and returns it; it grows for as long
        as the engine runs."""
        self.passes = [] if passes is None else passes
        return self.passes

    def foresee(self, shape: PassShape, work: PassWork, rates: Rates) -> None:
        """Predicts the pass that was submitted last, while it runs and the host has time: it looks at every row."""
        self._foreseen.append((shape, predict_pass(work, shape, rates)))

    def submitted(self) -> None:
        self._submitted_s.append(_now_s())

    @property
    def expected_s(self) -> float:
        """The time, of time.perf_counter, at which the oldest pass under way is predicted to end."""
        return self._began_s + self._foreseen[0][1].total_s

    @property
    def leisure_s(self) -> float:
        """The time until which the oldest pass under way leaves the host nothing to do: until it ends, by its
        prediction, and as early as any of late did by theirs, less the most that the host had to do for one of them. So
        a wrong profile or a slow host does no harm. It is over while few passes tell that."""
        if len(self._late) < NUM_LATE:
            return 0.0
        earliest = min(1.0, min(timed.measured_s / timed.predicted.total_s for timed in self._late))
        most_host_s = max(timed.host_s for timed in self._late)
        return self._began_s + earliest * self._foreseen[0][1].total_s - most_host_s

    @property
    def _began_s(self) -> float:
        """The time at which the oldest pass under way began: when it was submitted, or the one before it ended."""
        return max(self._submitted_s[0][0], self._ended_s[0])

    def tokens_s(self) -> float:
        """The tokens a second of late, for any thread; 0 where no pass has ended for some seconds."""
        now_s = time.perf_counter()
        recent = [(ended_s, number) for ended_s, number in list(self.recent) if now_s - ended_s < RECENT_S]
        if len(recent) < 2:
            return 0.0
        return sum(number for _, number in recent[1:]) / (now_s - recent[0][0])

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which this thread waits for tokens, which it may do by polling."""
        began_s = time.thread_time()
        yield
        self._waited_s += time.thread_time() - began_s

    def ended(self, num_sampled: int = 0) -> None:
        """Says that the oldest pass that was submitted has ended, and how many tokens it gave."""
        now_s = _now_s()
        measured_s, cpu_s = (now - max(both) for now, *both in zip(now_s, self._submitted_s.popleft(), self._ended_s))
        shape, predicted = self._foreseen.popleft()
        host_s, self._ended_s, self._waited_s = max(cpu_s - self._waited_s, 0.0), now_s, 0.0
        self._late.append(timed := Timed(shape, measured_s, predicted, host_s))
        self.note(timed, num_sampled, now_s[0])

    def note(self, timed: Timed, num_sampled: int, now_s: float) -> None:
        """Counts a pass that ended now, by time.perf_counter, and gave so many tokens."""
        self.recent.append((now_s, num_sampled))
        self.num_passes += 1
        self.measured_s += timed.measured_s
        self.predicted_s += timed.predicted.total_s
        self.last = timed
        if self.passes is not None:
            self.passes.append(timed)

    def forget(self) -> None:
        """Gives up the passes that have not ended."""
        self._submitted_s.clear()
        self._foreseen.clear()
        self._waited_s = 0.0


def _now_s() -> tuple[float, float]:
    """The seconds of the clock, and those of CPU that this process has had."""
    return time.perf_counter(), time.process_time()
