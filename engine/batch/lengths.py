"""Learns from the sequences of a job how long the others will be, where a stop may end them before their longest.

In a range of lengths so many are stopped for each token that sequences got in it. Those that still run count with the
tokens that they have got: that many short ones end first misleads nobody. A range where few have been yet is taken to
be like the one before it: nobody knows better while the first ones run. Where all lengths are fixed nothing stops, and
each sequence is as long as it may be.

This is the piecewise exponential model of survival analysis, whose ranges have gamma priors that fade along a chain
(Gamerman, Dynamic Bayesian models for survival data, Applied Statistics 40, 1991).
"""

import numpy as np

# beginnings of ranges, some 4 of them for each doubling; the last one has no end
_STARTS = np.unique(np.round(2 ** (np.arange(0, 96) / 4)).astype(np.int64) - 1).astype(np.float64)  # (B,)
_WIDTHS = np.diff(_STARTS, append=np.inf)
# What the ranges before one count in it: such a share, but no more than so many stops, seen or to be expected at the
# range's own rate. What is foreseen of lengths that none has reached hangs on the last ranges, which have seen few:
# with one stop at most, chance moved the end of a job by a third. With more than these, it takes longer to tell that
# longer ones are stopped otherwise.
SHARE_BEFORE, MOST_BEFORE = 0.7, 10
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

    def draw(self, num_tokens: np.ndarray, most: np.ndarray, begun: np.ndarray) -> np.ndarray:
        """Tokens that sequences may still get, drawn by those rates: they have `num_tokens` (N,) by now, and get
        `most` (N,) in all at the longest. `begun` (M,) are the tokens of those that have begun and not ended."""
        risks = np.append(0.0, np.cumsum(self._rates(begun)[:-1] * _WIDTHS[:-1]))  # (B,) at their beginnings
        rising = risks + np.arange(len(risks)) * 1e-12  # np.interp wants no two alike
        # one of each N-th of all lives, in any order: two draws differ by half as much as of independent ones
        shares = (self._random.permutation(len(num_tokens)) + 0.5) / max(len(num_tokens), 1)
        drawn = np.interp(num_tokens, _STARTS, rising) - np.log(shares)
        ends = np.where(drawn > rising[-1], np.inf, np.interp(drawn, rising, _STARTS))
        return np.maximum(np.minimum(ends, most) - num_tokens, 0.0)

    def _rates(self, begun: np.ndarray) -> np.ndarray:
        """The stops a token in each range (B,), in which those before it count too."""
        rates, stops, tokens = [], 0.0, 0.0
        for more_stops, more_tokens in zip(self._stops, self._tokens + _by_range(begun)):
            expected = tokens * more_stops / max(more_tokens, 1)  # if those before were stopped as those in it
            share = min(SHARE_BEFORE, MOST_BEFORE / max(stops, expected, 1))
            stops, tokens = share * stops + more_stops, share * tokens + more_tokens
            rates.append(stops / max(tokens, 1))
        return np.array(rates)


def _by_range(num_tokens: np.ndarray) -> np.ndarray:
    """The tokens of sequences (M,) in each range (B,)."""
    return np.clip(num_tokens[:, None] - _STARTS, 0.0, _WIDTHS).sum(axis=0)
