"""Learns from the sequences of a job how long the others will be, where a stop may end them before their longest.

After t tokens a sequence ends with some chance at its next one. The chances are counted for ranges of t, from all
sequences that came so far, those that still run too: so that many short ones end first misleads nobody. Where all
lengths are fixed nothing stops, and each sequence is as long as it may be.
"""

import numpy as np

# beginnings of ranges, some 4 of them for each doubling; the last one has no end
_STARTS = np.unique(np.round(2 ** (np.arange(0, 96) / 4)).astype(np.int64) - 1).astype(np.float64)  # (B,)
_WIDTHS = np.append(np.diff(_STARTS), np.inf)  # (B,)
SEED = 0


class Lengths:
    """The tokens that were generated, and the stops, by range of t."""

    def __init__(self):
        self._tokens, self._stops = np.zeros(len(_STARTS)), np.zeros(len(_STARTS))
        self._random = np.random.default_rng(SEED)

    def ended(self, num_tokens: int, stopped: bool) -> None:
        """Takes in a sequence that has ended, by a stop or at its longest."""
        self._tokens += _in_ranges(np.array([num_tokens], dtype=np.float64))
        if stopped and num_tokens:
            self._stops[np.searchsorted(_STARTS, num_tokens - 1, "right") - 1] += 1

    def draw(self, num_tokens: np.ndarray, most: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Tokens that sequences may still get, drawn by those chances: they have `num_tokens` (N,) by now, and get
        `most` (N,) in all at the longest. `running` (M,) are the tokens of those that have begun and not ended."""
        tokens = self._tokens + _in_ranges(running)
        chances = np.divide(self._stops, tokens, out=np.zeros_like(tokens), where=tokens > 0)
        risks = np.append(0.0, np.cumsum(chances[:-1] * _WIDTHS[:-1]))  # (B,) at the beginnings of ranges
        rising = risks + np.arange(len(risks)) * 1e-12  # np.interp wants no two alike
        reached = np.interp(num_tokens, _STARTS, rising) + self._random.exponential(size=len(num_tokens))
        ends = np.where(reached > rising[-1], np.inf, np.interp(reached, rising, _STARTS))
        return np.maximum(np.minimum(ends, most) - num_tokens, 0.0)


def _in_ranges(num_tokens: np.ndarray) -> np.ndarray:
    """Tokens of sequences of these lengths (N,) by range (B,)."""
    return np.clip(num_tokens[:, None] - _STARTS, 0.0, _WIDTHS).sum(axis=0)
