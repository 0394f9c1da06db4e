"""Plays what is left of a job through its passes: when each sequence begins, and when all have ended.

A sequence begins once there are a row and pages for it, and as fast as passes take prompts: tokens that the link hides,
or where nothing streams all that a pass may have. So ramp and drain are in it. Pages grow with sequences; where there
are none left, the one that began last gives way and is the next to begin.
"""

import functools
import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from penstock.scheduler.batching.filling import MOST_PASSES, Filling
from penstock.scheduler.batching.limits import Limits
from penstock.scheduler.batching.seats import HEADROOM, STRETCH
from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import PassTime, Rates, predict_pass

LEVELS = 16  # numbers of rows for which passes are predicted


@dataclass(frozen=True)
class Passes:
    """The passes of an engine: their work, and the most tokens and rows in one; and the limits of a sequence."""

    work: PassWork
    rates: Rates
    most_tokens: int
    most_rows: int
    limits: Limits


class Sequences(NamedTuple):
    """Sequences as arrays (N,), in the order in which they begin; the first `num_running` run. Each has so many tokens
    of its own, which are computed when it begins, and gets so many outputs."""

    tokens: np.ndarray
    outputs: np.ndarray
    num_running: int


class Costs:
    """The costs of passes in which sequences are as these are in the mean."""

    def __init__(self, passes: Passes, sequences: Sequences):
        tokens, outputs, num_running = sequences
        self._passes, self._filling = passes, Filling.of(passes.work, passes.rates)
        self._prompt = max(float(tokens[num_running:].mean()), 1.0) if len(tokens) > num_running else 1.0
        self._context = float(np.average(tokens + outputs / 2, weights=outputs + 1)) if len(tokens) else 0.0
        self._step = max(passes.most_rows // LEVELS, 1)
        self._level = functools.cache(self._predict)

    def pass_time(self, num_rows: int, num_begun: float) -> PassTime:
        """The time of a pass of so many rows beside prompts that begin."""
        read, tokens = num_rows * self._context, num_begun * self._prompt
        pairs = read + tokens * (self._prompt + 1) / 2
        sums = 0, round(pairs), round(read), 0
        num_tokens, num_seqs = round(num_rows + tokens), round(num_rows + num_begun)
        shape = PassShape(num_tokens, num_seqs, *sums, num_chunks=round(num_begun))
        return predict_pass(self._passes.work, shape, self._passes.rates)

    def at(self, num_rows: int) -> tuple[float, float, float]:
        """The tokens of prompts that enter a pass of about so many rows, its seconds, and those of one without."""
        return self._level(round(num_rows / self._step))

    def _predict(self, level: int) -> tuple[float, float, float]:
        num_rows = max(level * self._step, 1)
        tokens = max(self._passes.most_tokens - num_rows, 1)
        if self._filling is not None:
            spare_s = self._filling.link_s - self._filling.seconds(num_rows, round(num_rows * self._context))
            hidden = spare_s / self._filling.chunk_s(0, round(self._prompt)) * self._prompt
            tokens = min(max(hidden, self._prompt / MOST_PASSES), tokens)
        return tokens, *(self.pass_time(num_rows, each / self._prompt).total_s for each in (tokens, 0))


class Play:
    """A play: the passes and seconds that have gone by, the rows of all these passes, and the most rows of one."""

    def __init__(self, passes: Passes, sequences: Sequences):
        tokens, outputs, num_running = sequences
        retention = passes.limits.retention
        self.costs = Costs(passes, sequences)
        self.passes = self.seconds = self.rows = 0.0
        self.most_rows = 0
        self._allowed_rows = passes.most_rows
        self._grows = retention.max_cached is None  # else each has all its pages from its first pass on
        held = tokens if self._grows else np.minimum(tokens + outputs, retention.max_cached)
        self._held = (held + retention.page_size / 2).tolist()  # half of its last page is empty, in the mean
        self._tokens, self._outputs = tokens.tolist(), outputs.tolist()
        self._free = passes.limits.num_pages * retention.page_size
        self._running: dict[int, float] = {}  # when each ends; in the order in which they began
        self._ends: list[tuple[float, int]] = []  # a heap of these, and of some that are gone
        self._waiting = list(range(len(tokens)))[::-1]  # the next one last
        for _ in range(num_running):
            self._seat(self._waiting.pop())

    def until(self, num_waiting: int) -> None:
        """Plays until no more than so many wait."""
        while len(self._waiting) > num_waiting:
            self._next()

    def end(self) -> None:
        """Plays until all have ended."""
        while self._waiting or self._running:
            self._next()

    def _next(self) -> None:
        """Plays until one begins, ends or gives way."""
        if self._waiting and self._has_room(self._waiting[-1]):
            number = self._waiting.pop()
            tokens, seconds, _ = self.costs.at(len(self._running))
            self._pass(self._tokens[number] / tokens, seconds)
            self._seat(number)
        elif self._running.get(self._ends[0][1]) != self._ends[0][0]:
            heapq.heappop(self._ends)  # of one that is gone
        else:
            self._leave_one()

    def _has_room(self, number: int) -> bool:
        num_rows = len(self._running)
        ahead = STRETCH + HEADROOM * num_rows if self._grows else 0
        has_room = num_rows < self._allowed_rows and self._held[number] + ahead <= self._free
        return not num_rows or (has_room and self._ends[0][0] > self.passes)

    def _seat(self, number: int) -> None:
        self._running[number] = self.passes + self._outputs[number]
        self._free -= self._held[number]
        heapq.heappush(self._ends, (self._running[number], number))
        self.most_rows = max(self.most_rows, len(self._running))

    def _leave_one(self) -> None:
        """Plays until one ends; or until no page is left, when the one that began last gives way."""
        num_rows, (end, number) = len(self._running), self._ends[0]
        passes = max(end - self.passes, 0.0)
        until_full = max(self._free, 0.0) / num_rows if self._grows and num_rows > 1 else math.inf
        self._pass(min(passes, until_full), self.costs.at(num_rows)[2])
        if passes > until_full:
            number = next(reversed(self._running))
            self._waiting.append(number)
        left = max(self._running.pop(number) - self.passes, 0.0)
        got, self._outputs[number] = self._outputs[number] - left, left
        self._tokens[number] += got
        self._held[number] += got if self._grows else 0
        self._free += self._held[number]

    def _pass(self, passes: float, pass_s: float) -> None:
        """Lets so many passes go by."""
        rows = passes * len(self._running)
        self.passes, self.seconds, self.rows = self.passes + passes, self.seconds + passes * pass_s, self.rows + rows
        self._free -= rows if self._grows else 0


def play(passes: Passes, sequences: Sequences, num_more: int = 0) -> Play:
    """Plays until all have ended, and as many more that go on as the second half of those that wait does."""
    played, half = Play(passes, sequences), (len(sequences.tokens) - sequences.num_running) // 2
    played.until(half)
    before = played.passes, played.seconds, played.rows
    played.until(0)
    more = [now - then for now, then in zip((played.passes, played.seconds, played.rows), before)]
    times = num_more * sequences.outputs[-half:].mean() / more[2] if num_more and more[2] else 0.0
    played.end()
    played.passes += times * more[0]
    played.seconds += times * more[1]
    return played
