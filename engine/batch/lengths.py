"""Learns from the sequences of a job how long the others will be, where a stop may end them before their longest.

Of those that get as far as a range of lengths, a share is stopped in it (the estimate of Kaplan and Meier). Sequences
that still run count in the ranges that they have reached: so that many short ones end first misleads nobody. Where
all lengths are fixed nothing stops, and each sequence is as long as it may be.
"""

import numpy as np

# beginnings of ranges, some 4 of them for each doubling; the last one has no end
_STARTS = np.unique(np.round(2 ** (np.arange(0, 96) / 4)).astype(np.int64) - 1).astype(np.float64)  # (B,)
_MOST_SHARE = 1 - 1e-9  # of a range in which all were stopped
SEED = 0


class Lengths:
    """The sequences that have ended: how many had reached a range, and how many were stopped in it."""

    def __init__(self):
        self._reached, self._stops = np.zeros(len(_STARTS)), np.zeros(len(_STARTS))
        self._random = np.random.default_rng(SEED)
        self._num_ended = self._num_tokens = 0

    def ended(self, num_tokens: int, stopped: bool) -> None:
        """Takes in a sequence that has ended, by a stop or at its longest."""
        self._num_ended, self._num_tokens = self._num_ended + 1, self._num_tokens + num_tokens
        self._reached += num_tokens > _STARTS
        if stopped and num_tokens:
            self._stops[np.searchsorted(_STARTS, num_tokens - 1, "right") - 1] += 1

    @property
    def mean(self) -> float:
        """The tokens of a sequence that has ended; 0 before one has."""
        return self._num_tokens / max(self._num_ended, 1)

    def draw(self, num_tokens: np.ndarray, most: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Tokens that sequences may still get, drawn by those shares: they have `num_tokens` (N,) by now, and get
        `most` (N,) in all at the longest. `running` (M,) are the tokens of those that have begun and not ended."""
        reached = self._reached + (running[:, None] > _STARTS).sum(axis=0)
        shares = np.divide(self._stops, reached, out=np.zeros_like(reached), where=reached > 0)
        risks = np.append(0.0, np.cumsum(-np.log1p(-np.minimum(shares, _MOST_SHARE)))[:-1])  # (B,) at their beginnings
        rising = risks + np.arange(len(risks)) * 1e-12  # np.interp wants no two alike
        drawn = np.interp(num_tokens, _STARTS, rising) + self._random.exponential(size=len(num_tokens))
        ends = np.where(drawn > rising[-1], np.inf, np.interp(drawn, rising, _STARTS))
        return np.maximum(np.minimum(ends, most) - num_tokens, 0.0)
