"""Predicts when a job ends: the passes that are left, times the seconds that a pass takes now.

Passes are played through: as many sequences as run now have seats, and each that waits takes the first seat that is
free. So the end of the job, in which ever fewer sequences run, is in it. A prompt takes a seat before its first token
comes; sequences therefore take as many passes more as there are seats without a token in a pass.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from penstock.engine.batch.input_lines import InputLines
from penstock.engine.batch.lengths import Lengths
from penstock.engine.batch.windows import num_passes
from penstock.scheduler.batching.request import Request, RequestState

MOST_PLAYED = 8192  # sequences; of more that wait, a share is played and the rest counted


@dataclass
class Outlook:
    """The sequences of a job that have not begun, counted by their longest length, and what is known of lengths.
    `longest` is max_model_len, which a sequence that names none may reach."""

    longest: int
    lengths: Lengths = field(default_factory=Lengths)
    waiting: Counter = field(default_factory=Counter)
    num_waiting: int = 0

    def add_row(self, lines: InputLines, index: int) -> None:
        """Counts the sequences of a row."""
        self._count(lines, index, lines.num_sequences[index])

    def take_row(self, lines: InputLines, index: int) -> None:
        """Says that the sequences of a row are in flight, or have failed."""
        self._count(lines, index, -lines.num_sequences[index])

    def _count(self, lines: InputLines, index: int, num_sequences: int) -> None:
        self.waiting[lines.most_tokens[index] or self.longest] += num_sequences
        self.num_waiting += num_sequences

    def passes_left(self, in_flight: list[Request], tokens_a_pass: float) -> float:
        """The passes until all have ended, where a pass brings so many tokens now."""
        table = [(len(one.output_token_ids), self._most(one), _runs(one)) for one in in_flight]
        got, most, runs = np.array(table, dtype=np.float64).reshape(-1, 3).T
        far = got[runs > 0]
        left = self.lengths.draw(got, most, far)
        running, queued = left[runs > 0], left[runs == 0]
        seats = max(len(running), math.ceil(tokens_a_pass), 1)  # of late, too: many may just have ended together
        share = tokens_a_pass / seats or 1.0
        later = self._later(far)
        queued = np.concatenate([queued, later])
        more = later.mean() * (self.num_waiting - len(later)) if len(later) else 0.0
        return more / share / seats + num_passes(queued / share, seats, running)

    def _most(self, request: Request) -> int:
        return request.most_tokens(self.longest) - len(request.prompt_token_ids)

    def _later(self, far: np.ndarray) -> np.ndarray:
        """Lengths of sequences that have not begun, drawn; of no more than MOST_PLAYED or so. Those that run have come
        so `far` (M,)."""
        kinds = [(most, count) for most, count in self.waiting.items() if count]
        share = min(1.0, MOST_PLAYED / max(self.num_waiting, 1))
        counts = [max(round(count * share), 1) for _, count in kinds]
        most = np.repeat(np.array([most for most, _ in kinds], dtype=np.float64), counts)
        return self.lengths.draw(np.zeros(len(most)), most, far)


def _runs(request: Request) -> bool:
    return request.state is RequestState.RUNNING
