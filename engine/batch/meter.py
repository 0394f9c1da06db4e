"""Measures a job as it runs: tokens and passes by time, and the bound of its passes."""

import itertools
import statistics
import time
from array import array
from collections import Counter

from penstock.engine.runtime.pass_times import PassTimes

SAMPLE_S = 1.0  # between two samples: a week of them takes 15 MB
RECENT_S = 30.0
PACES = 60  # samples, at most
FULL = 0.95  # the share of its usual tokens a second from which on a job counts as full


class Meter:
    """The measures of one run. Of its passes the sums are kept, not each; of what it gave a sample each second."""

    def __init__(self, times: PassTimes):
        self._passes = times.keep()
        self.began_s = time.perf_counter()
        self.num_tokens = self.num_passes = 0
        self.passes_s = self.predicted_s = 0.0
        self.bounds_s: Counter = Counter()  # by what binds
        self._times_s, self._tokens, self._predicted_s = array("d", [self.began_s]), array("Q", [0]), array("d", [0.0])
        self.drains_s: float | None = None  # since when no row waits
        self._ended_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """The seconds of the run, until now or until it ended: the end of the engine is none of it."""
        return (self._ended_s or time.perf_counter()) - self.began_s

    def end(self) -> None:
        """Says that the run is over."""
        self._ended_s = time.perf_counter()

    def note_pass(self, num_tokens: int) -> bool:
        """Takes in the passes that ended, which gave so many output tokens. Returns whether a second went by since
        it last did."""
        self.num_tokens += num_tokens
        for _, measured_s, predicted, _ in self._passes:
            self.num_passes += 1
            self.passes_s += measured_s
            self.predicted_s += predicted.total_s
            self.bounds_s[predicted.bound] += predicted.bound_s
        self._passes.clear()
        now_s = time.perf_counter()
        if now_s < self._times_s[-1] + SAMPLE_S:
            return False
        self._times_s.append(now_s)
        self._tokens.append(self.num_tokens)
        self._predicted_s.append(self.predicted_s)
        return True

    def drain(self) -> None:
        """Says that no row waits."""
        self.drains_s = self.drains_s or time.perf_counter()

    @property
    def tokens_s(self) -> float:
        """Output tokens a second of late; 0 before a second has gone by."""
        times_s = self._times_s
        first = next((at for at in range(len(times_s) - 1, 0, -1) if times_s[-1] - times_s[at] >= RECENT_S), 0)
        seconds = times_s[-1] - times_s[first]
        return (self._tokens[-1] - self._tokens[first]) / seconds if seconds else 0.0

    @property
    def pace(self) -> float | None:
        """The seconds that go by while passes run for which one second was predicted: the median of late, since now and
        then they wait for other work. Late is the last third of the run, or less: at first rows are encoded, and passes
        are full of prompts, which are slower than the rest. None before anything is known."""
        number = min(-(-(len(self._times_s) - 1) // 3), PACES)
        times_s, predicted_s = self._times_s[-number - 1 :], self._predicted_s[-number - 1 :]
        both = zip(itertools.pairwise(times_s), itertools.pairwise(predicted_s))
        paces = [(now_s - then_s) / (now - then) for (then_s, now_s), (then, now) in both if now > then]
        return statistics.median(paces) if paces else None

    @property
    def share_of_bound(self) -> float:
        """The share of the bounds of all passes in the time that they took."""
        return self.bounds_s.total() / self.passes_s if self.passes_s else 0.0

    @property
    def bound(self) -> str | None:
        """The part that binds most."""
        return max(self.bounds_s, key=self.bounds_s.get, default=None)

    def steady_tokens_s(self) -> float | None:
        """Output tokens a second between ramp and drain: from the first second that gave nearly as many as usual until
        no row waited any more. None for a job too short to have both."""
        end = len(self._times_s)
        while end > 0 and self._times_s[end - 1] > (self.drains_s or 0.0):
            end -= 1
        rates = [
            (self._tokens[at] - self._tokens[at - 1]) / (self._times_s[at] - self._times_s[at - 1])
            for at in range(1, end)
        ]
        if not rates:
            return None
        usual = sorted(rates)[len(rates) // 2]
        first = next(at for at, rate in enumerate(rates) if rate >= FULL * usual)
        return (self._tokens[end - 1] - self._tokens[first]) / (self._times_s[end - 1] - self._times_s[first])
