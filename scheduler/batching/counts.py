"""What the scheduler counts: the one object that tells how requests came, waited and gave way."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum


class Wait(StrEnum):
    """What a pass lacked for the first of those that waited."""

    ROWS = "rows"
    PAGES = "pages"
    TOKENS = "tokens"


@dataclass
class Counts:
    """Numbers since the scheduler was made. `waits` counts, by what was lacking, the passes in which requests waited;
    `num_waiting` is how many did in the last pass."""

    num_preemptions: int = 0
    num_recomputed_tokens: int = 0  # of rows that had given way
    num_waiting: int = 0
    waits: Counter[Wait] = field(default_factory=Counter)

    def note_waiting(self, num_waiting: int, why: Wait) -> None:
        """Notes how many requests a pass leaves waiting, and why."""
        self.num_waiting = num_waiting
        if num_waiting:
            self.waits[why] += 1
