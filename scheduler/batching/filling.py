"""Decides how far a pass is filled. Where the link binds, tokens are free until their compute takes as long as the
copies; T* is their number. Past it each one makes the pass longer for all.

    a pass | a token of every running row | chunks of prompts, then of what is computed again |          |
           0                                                                                  T*   most tokens

Of those that have begun, what comes first is worth most: a row's token needs nothing else, and a prompt adds a token to
every later pass, as does a row that is computed again. A prompt's token past T* costs c seconds of R rows' time. It
brings all that waits forward by 1 / F of a pass, where F are the tokens for prompts that are free in a pass, and so W
rows that are still to come, of R + W in all. So the queue gains where

    W / (R + W) * seconds of a pass / F  >  c

A long queue of prompts with short outputs is bound by its prompts: there passes take so many of their tokens that they
last as long as all decoding, as far as its ends are known. A prompt that has its row takes MOST_PASSES at most, however
few tokens are free; where none are, waiting for them is of no use.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from penstock.scheduler.batching.batch import BatchRow
from penstock.scheduler.batching.request import Request
from penstock.scheduler.cost.pass_work import MOST_PADDED_TOKENS, PassShape, PassWork, padded_tokens, unpadded_tokens
from penstock.scheduler.cost.time_model import Rates, decompress_s, link_s, steps_s

SAMPLE = 1024  # tokens over which costs are averaged
LONG = MOST_PADDED_TOKENS + 1  # tokens of a pass in which chunks behind cached tokens copy these
MOST_PASSES = 8  # that a prompt is spread over


@dataclass(frozen=True)
class Filling:
    """The seconds of a pass as far as they decide how many tokens enter it: those of its copies, those of its compute
    over rows of one token (`PassShape`), and on top of them those of a token of a prompt, of a pair of tokens of which
    one attends to the other, of a cached token that a chunk continues behind, and of a token behind which a log
    probability of the prompt is asked."""

    work: PassWork
    rates: Rates
    link_s: float
    token_s: float
    pair_s: float
    copied_s: float
    scored_s: float

    @staticmethod
    def of(work: PassWork, rates: Rates) -> "Filling | None":
        """The filling of passes that do this work; None where nothing streams, and passes are filled as they can be."""
        if not work.streamed_bytes:
            return None

        def seconds(num_tokens: int, num_pairs: int, num_behind: int, num_scored: int = 0) -> float:
            return steps_s(work.steps, PassShape(num_tokens, 1, 0, num_pairs, 0, num_behind, num_scored), rates)

        alone, scored = seconds(2 * SAMPLE, 0, 0), seconds(2 * SAMPLE, 0, 0, SAMPLE)
        return Filling(
            work,
            rates,
            link_s(work.streamed_bytes, rates),
            token_s=max(alone - seconds(SAMPLE, 0, 0), 0.0) / SAMPLE,
            pair_s=max(seconds(2 * SAMPLE, SAMPLE**2, 0) - alone, 0.0) / SAMPLE**2,
            copied_s=max(seconds(LONG, 0, SAMPLE) - seconds(LONG, 0, 0), 0.0) / SAMPLE,
            scored_s=max(seconds(2 * SAMPLE, 0, 0, 2 * SAMPLE) - scored, 0.0) / SAMPLE,
        )

    def seconds(self, num_rows: int, num_cached: int, num_shared: int = 0) -> float:
        """Seconds of the compute lane for rows of one token that attend to so many cached ones together, and share so
        many (PassShape)."""
        seen = num_rows + num_cached
        shape = PassShape(num_rows, num_rows, num_cached, seen, seen, 0, num_shared=num_shared)
        restored_s = decompress_s(self.work.decompressed_bytes, self.work.num_decompressed, self.rates)
        return steps_s(self.work.steps, shape, self.rates) + restored_s + link_s(self.work.waited_bytes, self.rates)

    def chunk_s(self, start: int, num_tokens: int, num_scored: int = 0) -> float:
        """Seconds of a chunk behind `start` cached tokens, of which so many are scored."""
        pairs = num_tokens * (2 * start + num_tokens + 1) // 2
        copied = start + num_tokens if start else 0
        linears_s = num_tokens * self.token_s + num_scored * self.scored_s
        return linears_s + pairs * self.pair_s + copied * self.copied_s


class Queue(NamedTuple):
    """The requests that are still to come: `num_rows` of them could enter now; they have `prompt_tokens` of prompts
    for each pass that all outputs take."""

    num_rows: int
    prompt_tokens: float

    @staticmethod
    def of(first: Request, num_done: int, num_requests: int, num_rows: int, running: "Running") -> "Queue":
        """The queue of these requests, taken to be like the first, of which `num_done` tokens need not be computed any
        more; so many of them could enter now."""
        outputs = running.num_outputs + num_requests * max(first.longest - first.num_tokens_ahead, 1)
        prompts = num_requests * (first.num_tokens_ahead - num_done)
        return Queue(num_rows, prompts * (running.num_rows + num_rows) / outputs)


class Running(NamedTuple):
    """The rows that decode, and the outputs that they may still get."""

    num_rows: int = 0
    num_outputs: int = 0


class Budget:
    """The tokens of one pass of at most `most_tokens`, which begins with `rows` of one token each. What is cached of
    them is shared as PassShape says."""

    def __init__(self, most_tokens: int, rows: Sequence[BatchRow], filling: Filling | None, num_shared: int = 0):
        self.most_tokens, self.num_rows, self.num_left = most_tokens, len(rows), most_tokens - len(rows)
        self.filling = filling
        self.num_chunks = self.num_free = 0  # tokens of chunks, and those of them that cost no time
        self._free_of: dict[int | None, int] = {}  # these by row, of each chunk
        self._num_single = len(rows)
        self._spare_s, self._pass_s = math.inf, 0.0
        if filling is not None:
            num_cached = sum(row.num_cached for row in rows)
            compute_s = filling.seconds(len(rows), num_cached, min(num_shared, num_cached))
            self._spare_s, self._pass_s = filling.link_s - compute_s, max(filling.link_s, compute_s)

    def has_room(self, queue: Queue, num_before: int = 0) -> bool:
        """Tells whether a chunk of the first in the queue may enter, behind so many tokens of others."""
        if self.num_left < 1 + num_before:
            return False
        if self.filling is None or self._spare_s >= (1 + num_before) * self.filling.token_s:
            return True
        if self.num_chunks + num_before < queue.prompt_tokens:
            return True
        return self._is_worth_it(queue)

    def take(self, request: Request, num_tokens: int, queue: Queue) -> int:
        """Lets in a chunk of a request, for which there is room, of at most its next `num_tokens`. Returns how many of
        these enter."""
        least = max(-(-(request.num_computed_tokens + num_tokens) // MOST_PASSES), 1)
        num_tokens, num_free = min(num_tokens, self.num_left), 0
        if self.filling is not None:
            num_free = self._fitting(request, num_tokens)
            self.num_free += num_free
            if not self._is_worth_it(queue):
                due = math.ceil(queue.prompt_tokens) - self.num_chunks
                num_tokens = min(num_tokens, max(num_free, self._with_padding(max(due, least))))
            self._spare_s -= self._chunk_s(request, num_tokens)
        self.num_left -= num_tokens
        self.num_chunks += num_tokens
        self._free_of[request.row] = num_free
        self.num_rows += 1
        return num_tokens

    def give_back(self, row: BatchRow) -> None:
        """Takes a row out that was let in."""
        self.num_rows -= 1
        self.num_left += len(row.tokens)
        if self.filling is not None:
            self._spare_s += self.filling.chunk_s(row.start, len(row.tokens), row.num_scored)
        if row.index in self._free_of:
            self.num_chunks -= len(row.tokens)
            self.num_free -= self._free_of.pop(row.index)
        else:
            self._num_single -= 1

    def _is_worth_it(self, queue: Queue) -> bool:
        """Tells whether a token past those that are free gains more for the rows to come than it costs all."""
        costs_s = self.filling.token_s * self.num_free * (self.num_rows + queue.num_rows)
        return queue.num_rows * self._pass_s > costs_s

    def _chunk_s(self, request: Request, num_tokens: int) -> float:
        """Seconds of a request's next tokens."""
        start = request.num_computed_tokens
        return self.filling.chunk_s(start, num_tokens, len(request.scored_between(start, start + num_tokens)))

    def _with_padding(self, num_tokens: int) -> int:
        """So many tokens more, and those by which the pass would be padded."""
        before = self.most_tokens - self.num_left
        whole = before + num_tokens
        return num_tokens if whole > MOST_PADDED_TOKENS else padded_tokens(whole) - before

    def _fitting(self, request: Request, num_tokens: int) -> int:
        """The first of a request's next tokens that fit into what is spare; where not all do, so many that the pass is
        not padded."""
        low, high = 0, num_tokens
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._chunk_s(request, middle) <= self._spare_s
            low, high = (middle, high) if fits else (low, middle - 1)
        before = self.most_tokens - self.num_left
        return low if low == num_tokens else max(unpadded_tokens(before + low) - before, 0)

    @property
    def free_tokens(self) -> tuple[int, int]:
        """T* of this pass, and how many of these tokens it uses; zeros where nothing streams."""
        if self.filling is None:
            return 0, 0
        hidden = self._num_single if self._spare_s > 0 or self.num_free else 0
        unused = int(max(self._spare_s, 0.0) / self.filling.token_s) if self.filling.token_s else 0
        return hidden + self.num_free + unused, hidden + self.num_free
