"""Plays what is left of a job through its passes: when each sequence begins, and when all have ended.

A sequence begins once there are a row and pages for it, and as fast as passes take prompts: tokens that the link hides,
or where nothing streams all that a pass may have. So ramp and drain are in it. A sequence holds as many pages all the
time as in the mean: those that grow together give way to each other, and fewer run the longer they are.
"""

import functools
import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from penstock.scheduler.batching.filling import MOST_PASSES, Filling
from penstock.scheduler.batching.limits import Limits
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
    """Sequences as arrays (N,), in the order in which they begin: the tokens of each that are computed before it gets
    one, those that it gets, and those that it holds in the mean meanwhile. One that runs begins at once, with no tokens
    to be computed."""

    prompts: np.ndarray
    outputs: np.ndarray
    held: np.ndarray


class Play:
    """The passes and seconds that have gone by, and the `most_rows` that one of the passes had, where a prompt has
    `prompt` tokens and a row attends to `context` in the mean."""

    def __init__(self, given: Passes, prompt: float, context: float):
        self.passes = self.seconds = 0.0
        self.most_rows = 0
        self._given, self._prompt, self._context = given, prompt, context
        self._filling = Filling.of(given.work, given.rates)
        self._num_free_pages = given.limits.num_pages
        self._ends: list[tuple[float, float]] = []  # of those that run: in which pass, and of how many pages; a heap
        self._step = max(given.most_rows // LEVELS, 1)
        self._seconds_at = functools.cache(self._predict)

    def begin(self, prompt: float, output: float, pages: float) -> None:
        """Plays until a sequence has begun."""
        while self._ends and (self._ends[0][0] <= self.passes or not self._has_room(pages)):
            self._end_one()
        tokens, seconds, _ = self._seconds_at(round(len(self._ends) / self._step))
        self.passes += prompt / tokens
        self.seconds += prompt / tokens * seconds
        self._num_free_pages -= pages
        heapq.heappush(self._ends, (self.passes + output, pages))
        self.most_rows = max(self.most_rows, len(self._ends))

    def end(self) -> None:
        """Plays until all have ended."""
        while self._ends:
            self._end_one()

    def pass_time(self, num_rows: int, num_begun: float) -> PassTime:
        """The time of a pass of so many rows beside prompts that begin."""
        read, tokens = num_rows * self._context, num_begun * self._prompt
        pairs = read + tokens * (self._prompt + 1) / 2
        shape = PassShape(round(num_rows + tokens), round(num_rows + num_begun), 0, round(pairs), round(read), 0)
        return predict_pass(self._given.work, shape, self._given.rates)

    def _has_room(self, pages: float) -> bool:
        return len(self._ends) < self._given.most_rows and pages <= self._num_free_pages

    def _end_one(self) -> None:
        if (passes := self._ends[0][0] - self.passes) > 0:
            self.passes += passes
            self.seconds += passes * self._seconds_at(round(len(self._ends) / self._step))[2]
        self._num_free_pages += heapq.heappop(self._ends)[1]

    def _predict(self, level: int) -> tuple[float, float, float]:
        """The tokens of prompts that enter a pass of so many rows, its seconds, and those of a pass without."""
        num_rows = max(level * self._step, 1)
        tokens = max(self._given.most_tokens - num_rows, 1)
        if self._filling is not None:
            spare_s = self._filling.link_s - self._filling.seconds(num_rows, round(num_rows * self._context))
            hidden = spare_s / self._filling.chunk_s(0, round(self._prompt)) * self._prompt
            tokens = min(max(hidden, self._prompt / MOST_PASSES), tokens)
        return tokens, *(self.pass_time(num_rows, each / self._prompt).total_s for each in (tokens, 0))


def play(given: Passes, sequences: Sequences, num_more: int = 0) -> Play:
    """Plays all of them, and as many more that go on as the second half of these does."""
    prompts, outputs, held = sequences
    if not len(prompts):
        return Play(given, 1.0, 0.0)
    played = Play(
        given, max(prompts.sum() / max(np.count_nonzero(prompts), 1), 1.0), np.average(held, weights=outputs + 1)
    )
    retention, middle = given.limits.retention, len(prompts) // 2
    # Half a page of each is empty in the mean, and half is left free for it while it grows.
    pages = np.minimum(
        np.minimum(held, retention.max_cached or math.inf) / retention.page_size + 1, given.limits.num_pages
    )
    for at, one in enumerate(zip(prompts.tolist(), outputs.tolist(), pages.tolist())):
        if at == middle:
            before = played.passes, played.seconds
        played.begin(*one)
    share = num_more / (len(prompts) - middle)
    more = share * (played.passes - before[0]), share * (played.seconds - before[1])
    played.end()
    played.passes += more[0]
    played.seconds += more[1]
    return played
