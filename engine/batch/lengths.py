"""Learns from the sequences of a job how long the others will be, where a stop may end them before their longest.

In a range of lengths so many are stopped for each token that sequences got in it. Those that still run count with the
tokens that they have got: that many short ones end first misleads nobody. A range where few have been yet is taken to
be like the one before it: nobody knows better while the first ones run. Where all lengths are fixed nothing stops, and
each sequence is as long as it may be.
"""

import numpy as np

# beginnings of ranges, some 4 of them for each doubling; the last one has no end
_STARTS = np.unique(np.round(2 ** (np.arange(0, 96) / 4)).astype(np.int64) - 1).astype(np.float64)  # (B,)
_WIDTHS = np.diff(_STARTS, append=np.inf)
SEED = 0


class Lengths:
    """The sequences that have ended: the tokens that they got in each range, and how many were stopped in it."""

    def __init__(self):
        self._tokens, self._stops = np.zeros(len(_STARTS)), np.zeros(len(_STARTS))
        self._random = np.random.default_rng(SEED)

    def ended(self, num_tokens: int, stopped: bool) -> None:
        """Takes in a sequence that has ended, by a stop or at its longest."""
        self._tokens += _by_range(np.array([num_tokens]))
        if stopped and num_tokens:
            self._stops[np.searchsorted(_STARTS, num_tokens - 1, "right") - 1] += 1

    def draw(self, num_tokens: np.ndarray, most: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Tokens that sequences may still get, drawn by those rates: they have `num_tokens` (N,) by now, and get
        `most` (N,) in all at the longest. `running` (M,) are the tokens of those that have begun and not ended."""
        risks = np.append(0.0, np.cumsum(self._rates(running)[:-1] * _WIDTHS[:-1]))  # (B,) at their beginnings
        rising = risks + np.arange(len(risks)) * 1e-12  # np.interp wants no two alike
        drawn = np.interp(num_tokens, _STARTS, rising) + self._random.exponential(size=len(num_tokens))
        ends = np.where(drawn > rising[-1], np.inf, np.interp(drawn, rising, _STARTS))
        return np.maximum(np.minimum(ends, most) - num_tokens, 0.0)

    def _rates(self, running: np.ndarray) -> np.ndarray:
        """The stops a token in each range (B,), as if one stop had been seen at the rate of the range before it."""
        rates, before = [], 0.0
        for stops, tokens in zip(self._stops, self._tokens + _by_range(running)):
            if before:
                stops, tokens = stops + 1, tokens + 1 / before
            before = stops / max(tokens, 1)
            rates.append(before)
        return np.array(rates)


def _by_range(num_tokens: np.ndarray) -> np.ndarray:
    """The tokens of sequences (M,) in each range (B,)."""
    return np.clip(num_tokens[:, None] - _STARTS, 0.0, _WIDTHS).sum(axis=0)
