"""The one object that tells how requests came, waited and gave way: `generate --verbose`, servers and benchmarks read
it."""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from penstock.scheduler.units import show_bytes

LOGGER = logging.getLogger("penstock.scheduler")
LOG_EVERY_S = 1.0


class Wait(StrEnum):
    """The thing that a pass lacked for the first of those that waited."""

    ROWS = "rows"
    PAGES = "pages"
    TOKENS = "tokens"


@dataclass
class MoveCounts:
    """Pages of `page_size` tokens, `page_bytes` on each rank, that moved from the device to host memory, and in from
    there. `num_not_moved` were forgotten instead. Where no host memory was asked for the sizes are 0."""

    page_size: int = 0
    page_bytes: int = 0
    num_out: int = 0
    num_in: int = 0
    num_not_moved: int = 0

    def note(self, is_out: bool) -> None:
        """Notes a page that moves."""
        self.num_out += is_out
        self.num_in += not is_out

    @property
    def num_saved_tokens(self) -> int:
        """Tokens that moved in and were not computed again."""
        return self.num_in * self.page_size

    def to_dict(self) -> dict[str, int]:
        """The numbers, with the bytes of a rank."""
        moved = {"out_bytes": self.num_out * self.page_bytes, "in_bytes": self.num_in * self.page_bytes}
        return vars(self) | moved | {"num_saved_tokens": self.num_saved_tokens}

    def describe(self) -> list[str]:
        """Lines that tell a user what moved, or that nothing did."""
        lines = []
        if self.num_out:
            out, back = (f"{n} ({show_bytes(n * self.page_bytes)} a rank)" for n in (self.num_out, self.num_in))
            lines.append(f"KV pages moved to host memory: {out}; back: {back}, {self.num_saved_tokens} tokens")
        if self.num_not_moved and self.page_size:
            lines.append(f"{self.num_not_moved} KV pages were forgotten: to move them to host memory would not pay")
        return lines


@dataclass
class Counts:
    """Numbers since the scheduler was made. `waits` counts, by what was lacking, the passes in which requests waited;
    `num_waiting` is how many did in the last pass."""

    num_passes: int = 0
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0  # of rows that had given way
    num_asked_tokens: int = 0  # of requests that got their first row
    num_hit_tokens: int = 0  # those of them that the prefix cache had
    num_waiting: int = 0
    num_free_tokens: int = 0  # that the link hid in those passes, T* of each
    num_free_tokens_used: int = 0
    moves: MoveCounts = field(default_factory=MoveCounts)
    waits: Counter[Wait] = field(default_factory=Counter)
    _why_waiting: Wait | None = field(default=None, repr=False, compare=False)
    _logged_at_s: float = field(default=-LOG_EVERY_S, repr=False, compare=False)

    def note_pass(self, num_waiting: int, why: Wait) -> None:
        """Notes a pass, how many requests it leaves waiting, and why."""
        self.num_passes += 1
        self.num_waiting, self._why_waiting = num_waiting, why if num_waiting else None
        if num_waiting:
            self.waits[why] += 1

    def take_pass_back(self) -> None:
        """Says that the last pass will not run, or that it is noted anew."""
        self.num_passes -= 1
        if self._why_waiting is not None:
            self.waits[self._why_waiting] -= 1

    @property
    def why_waiting(self) -> Wait | None:
        """The thing that the last pass lacked for those that wait; None if nobody does."""
        return self._why_waiting

    def note_free_tokens(self, before: tuple[int, int], now: tuple[int, int]) -> None:
        """Notes the tokens that are free in a pass, and how many of these it uses, instead of what was noted
        before."""
        self.num_free_tokens += now[0] - before[0]
        self.num_free_tokens_used += now[1] - before[1]

    def note_preemption(self) -> None:
        """Notes that a row has given way; logs it, once a second at most."""
        self.num_preemptions += 1
        now = time.monotonic()
        if now - self._logged_at_s >= LOG_EVERY_S:
            self._logged_at_s = now
            LOGGER.info("no KV page or row was left: %d rows have given way so far", self.num_preemptions)

    def to_dict(self) -> dict[str, int | dict[str, int]]:
        """The numbers, as JSON takes them."""
        numbers = {name: value for name, value in vars(self).items() if name[0] != "_"}
        return numbers | {"moves": self.moves.to_dict(), "waits": {why.value: self.waits[why] for why in Wait}}

    def describe(self) -> list[str]:
        """Lines that tell a user what happened; none where nothing did."""
        lines = []
        if self.num_hit_tokens:
            share = self.num_hit_tokens / self.num_asked_tokens
            lines.append(f"{self.num_hit_tokens} tokens of prompts were cached, {share:.1%} of all")
        if self.num_preemptions:
            lines.append(f"rows gave way {self.num_preemptions} times: {self.num_recomputed_tokens} tokens once more")
        lines += self.moves.describe()
        if self.waits:
            lacking = ", ".join(f"{why} {self.waits[why]}" for why in Wait if self.waits[why])
            lines.append(f"requests waited in {self.waits.total()} of {self.num_passes} passes, for: {lacking}")
        if self.num_free_tokens:
            share = self.num_free_tokens_used / self.num_free_tokens
            lines.append(f"passes used {share:.1%} of the {self.num_free_tokens} tokens that the link hid")
        return lines
