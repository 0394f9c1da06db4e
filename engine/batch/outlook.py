"""Predicts when a job ends: the sequences that are left, as long as they are known or taken to be, are played through
the passes that they take."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from penstock.engine.batch.input_lines import InputLines
from penstock.engine.batch.lengths import Lengths
from penstock.engine.batch.play import Passes, Play, Sequences, play
from penstock.scheduler.batching.request import Request, RequestState

MOST_PLAYED = 8192  # sequences that have not begun; of more a share is played
SEED = 0


@dataclass
class Outlook:
    """The sequences of a job that have not begun, counted by their longest length, and what is known of their prompts
    and lengths."""

    passes: Passes
    lengths: Lengths = field(default_factory=Lengths)
    waiting: Counter = field(default_factory=Counter)
    num_waiting: int = 0
    num_prompts: int = 0  # those that are known
    num_prompt_tokens: int = 0

    @property
    def longest(self) -> int:
        """The most tokens of a sequence, which one that names no length may reach."""
        return self.passes.limits.max_model_len

    @property
    def prompt(self) -> float:
        """The mean tokens of a prompt."""
        return self.num_prompt_tokens / max(self.num_prompts, 1)

    @property
    def most_tokens(self) -> int:
        """The tokens that those which have not begun get at the longest."""
        return sum(self._most(most) * count for most, count in self.waiting.items())

    def _most(self, most: int) -> int:
        return max(min(most, self.longest - math.ceil(self.prompt)), 1)

    def add_row(self, lines: InputLines, index: int) -> None:
        """Counts the sequences of a row."""
        self._count(lines, index, lines.num_sequences[index])

    def take_row(self, lines: InputLines, index: int) -> None:
        """Says that the sequences of a row are in flight, or have failed."""
        self._count(lines, index, -lines.num_sequences[index])

    def _count(self, lines: InputLines, index: int, num_sequences: int) -> None:
        self.waiting[lines.most_tokens[index] or self.longest] += num_sequences
        self.num_waiting += num_sequences

    def note_prompt(self, num_tokens: int) -> None:
        """Takes in the prompt of a sequence."""
        self.num_prompts += 1
        self.num_prompt_tokens += num_tokens

    def play(self, in_flight: Sequence[Request] = (), shared: float = 0.0, most_played: int = MOST_PLAYED) -> Play:
        """Plays until all have ended. Of all prompts a share is `shared`, and neither computed nor kept for each."""
        running, others = ([one for one in in_flight if _runs(one) is runs] for runs in (True, False))
        known = np.array([self._known(one) for one in running + others], dtype=np.float64).reshape(-1, 3)
        table = np.concatenate([known, self._later(most_played)])
        prompts, got, most = table.T
        outputs = self.lengths.draw(got, most, got[: len(known)])
        sequences = Sequences(prompts * (1 - shared) + got, outputs, len(running))
        return play(self.passes, sequences, self.num_waiting + len(known) - len(table))

    def _known(self, request: Request) -> tuple[int, int, int]:
        """The tokens of its prompt, those that it has got, and those that it gets in all at the longest."""
        return len(request.prompt_token_ids), len(request.output_token_ids), request.most_outputs(self.longest)

    def _later(self, most_played: int) -> np.ndarray:
        """The same (M, 3) of sequences that have not begun: the longest first, as in the last window, or if not all are
        played a share of them, mixed."""
        kinds = [(self._most(most), count) for most, count in self.waiting.items() if count]
        share = min(1.0, most_played / max(self.num_waiting, 1))
        counts = [max(round(count * share), 1) for _, count in kinds]
        most = -np.sort(-np.repeat([most for most, _ in kinds], counts).astype(np.float64))
        if share < 1.0:
            np.random.default_rng(SEED).shuffle(most)
        return np.stack([np.full(len(most), self.prompt), np.zeros(len(most)), most], axis=1)


def _runs(request: Request) -> bool:
    return request.state is RequestState.RUNNING
