"""Decides which of a sequence's tokens keep their keys and values, and in which of its pages they lie. Torch-free:
tokens and pages are ints.

A row's tokens are cached in order of age, and a token's position is its index in that order. `KeepAll` keeps all, so
that positions never change. `SinksAndWindow` is StreamingLLM (Xiao et al. 2023, "Efficient Streaming Language Models
with Attention Sinks"): the first tokens and a window of recent ones, in constant memory for sequences of any length:

    sequence   | sinks |   evicted, chunk by chunk   |  window: the last M - C + 1 .. M tokens |
    positions  0       N                             N                                         N + M
    pages      | - - sinks | pages of the window, a ring: the oldest C tokens' are written anew |
               0  margin   S

Both depend only on how far a sequence has come: neither on the passes that computed it nor on what runs beside it. So a
prompt has the same outputs in any batch, and a pass that is withdrawn leaves nothing to undo.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.scheduler.batching.pages import pages_for


class Retention(Protocol):
    """Decides which tokens of a row stay cached. `margin` entries of a row's first page, of `page_size` tokens, stay
    empty. A row holds at most `max_cached` tokens, however long its sequence is: their positions change, and keys are
    cached un-rotated. With None it holds all of them."""

    page_size: int
    margin: int
    max_cached: int | None

    def describe(self) -> str:
        """A clause that tells a user what is kept; empty where there is nothing to say."""

    def num_pages(self, num_tokens: int) -> int:
        """Pages of a sequence at its longest, `num_tokens` of it computed."""

    def num_evicted(self, num_tokens: int) -> int:
        """The number of tokens that were evicted before the last of the first `num_tokens` was computed."""

    def pass_end(self, start: int, end: int) -> int:
        """The end of what one pass can compute of tokens start..end: before the next token some must be evicted."""

    def page_table(self, pages: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """The pages, out of a sequence's `pages`, that hold what is kept of its first `num_tokens`, in order."""


@dataclass(frozen=True)
class KeepAll:
    """Keeps every token for as long as the sequence runs."""

    page_size: int
    margin = 0
    max_cached = None

    def describe(self) -> str:
        return ""

    def num_pages(self, num_tokens: int) -> int:
        return pages_for(num_tokens, self.page_size)

    def num_evicted(self, num_tokens: int) -> int:
        return 0

    def pass_end(self, start: int, end: int) -> int:
        return end

    def page_table(self, pages: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        return tuple(pages[: pages_for(num_tokens, self.page_size)])


@dataclass(frozen=True)
class SinksAndWindow:
    """Keeps the first `num_sinks` tokens (N) and at most `window_tokens` (M) recent ones. The oldest of these are
    evicted by whole pages, about a quarter of the window at a time (C): a prompt longer than the cache is computed in
    chunks of as many tokens. Raises ValueError if the window is smaller than a page."""

    num_sinks: int
    window_tokens: int
    page_size: int

    def __post_init__(self):
        if self.window_tokens < self.page_size:
            raise ValueError(
                f"attention_window={self.window_tokens}: expected at least page_size={self.page_size} tokens, since"
                " whole pages are evicted"
            )

    @property
    def margin(self) -> int:
        """Sinks lie at the end of their last page, so that the window begins with a page."""
        return -self.num_sinks % self.page_size

    @property
    def max_cached(self) -> int:
        return self.num_sinks + self.window_tokens

    @property
    def eviction_tokens(self) -> int:
        """C: the number of tokens that are evicted at a time."""
        return max(self.window_tokens // 4 // self.page_size, 1) * self.page_size

    def describe(self) -> str:
        return (
            f"of a sequence the first {self.num_sinks} tokens and {self.window_tokens} recent ones stay cached, of"
            f" which the oldest {self.eviction_tokens} are evicted at a time"
        )

    def num_pages(self, num_tokens: int) -> int:
        return pages_for(self.margin + min(num_tokens, self.max_cached), self.page_size)

    def num_evicted(self, num_tokens: int) -> int:
        return -(-max(num_tokens - self.max_cached, 0) // self.eviction_tokens) * self.eviction_tokens

    def pass_end(self, start: int, end: int) -> int:
        return min(end, self.max_cached + self.num_evicted(start + 1))

    def page_table(self, pages: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        num_evicted = self.num_evicted(num_tokens)
        used = pages_for(self.margin + num_tokens - num_evicted, self.page_size)
        sinks = pages_for(self.num_sinks, self.page_size)
        window = pages[sinks:]
        oldest = num_evicted // self.page_size % max(len(window), 1)
        return (*pages[:sinks], *window[oldest:], *window[:oldest])[:used]
