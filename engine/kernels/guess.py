"""Guesses two values between which the border of a row's filter lies (border.py), from a part of the row: the largest
logit of each of many lanes, which hold nearly all of the row's largest ones, and a sample of the others.

A guess need not be right, and how it is made changes no bit of what is kept.
"""

from penstock.engine.kernels.border import LOWEST_KEY, key_of, value_of
from penstock.engine.kernels.mass import share_of
from penstock.engine.kernels.penalty import load_score
from penstock.parallel.triton_door import tl, triton

_COARSE_BITS = tl.constexpr(16)  # of a key, from the top, with which a guess is made
_TOP_SHARE = tl.constexpr(32)  # of the lanes, one in so many has a logit that a guess counts as it is


@triton.jit
def _share(logit, least, peak, log2_slope, COUNT: tl.constexpr):
    """Computes about what a token counts for, as float32."""
    if COUNT:
        return tl.full(logit.shape, 1.0, tl.float32)
    else:
        return tl.where(logit >= least, share_of(logit, peak, log2_slope), 0.0)


@triton.jit
def _where_top_begins(best, end):
    """Finds the coarse key from which on the largest logits are counted as they are."""
    low, high = tl.full((), 0, tl.int32) + (LOWEST_KEY >> _COARSE_BITS), end
    while high - low > 1:
        middle = (low + high) // 2
        enough = tl.sum((best >= value_of(middle.to(tl.int64), _COARSE_BITS)).to(tl.int32), 0)
        if enough * _TOP_SHARE >= best.shape[0]:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _guess(best, sample, step, goal, drop, least, peak, log2_slope, COUNT: tl.constexpr):
    """Guesses two coarse keys that the border lies between. `best` are the largest logits of the lanes; of the others,
    one in `step` is in `sample`. What is sampled errs by about the root of its squares, and of the largest ones a few
    are missing."""
    end = (key_of(peak) >> _COARSE_BITS).to(tl.int32) + 1
    limit = value_of(_where_top_begins(best, end).to(tl.int64), _COARSE_BITS)
    top = tl.where(best >= limit, _share(best, least, peak, log2_slope, COUNT), 0.0)
    rest = tl.where(sample < limit, _share(sample, least, peak, log2_slope, COUNT) * step, 0.0)
    in_top, total = tl.sum(top, 0), tl.sum(top, 0) + tl.sum(rest, 0)
    if COUNT:
        aim = goal.to(tl.float32)
    else:
        aim = total - drop * total
    share = tl.minimum(tl.maximum(aim / total, 0.0), 1.0)
    slack = in_top / 16 + 4 * tl.sqrt(share * (1 - share) * tl.sum(rest * rest, 0))
    low, low_end = tl.full((), 0, tl.int32) + (LOWEST_KEY >> _COARSE_BITS), end
    high, high_end = low, low_end
    while (low_end - low > 1) | (high_end - high > 1):
        middle, upper = (low + low_end) // 2, (high + high_end) // 2
        value, upper_value = value_of(middle.to(tl.int64), _COARSE_BITS), value_of(upper.to(tl.int64), _COARSE_BITS)
        sum_low = tl.sum(tl.where(best >= value, top, 0.0) + tl.where(sample >= value, rest, 0.0), 0)
        sum_high = tl.sum(tl.where(best >= upper_value, top, 0.0) + tl.where(sample >= upper_value, rest, 0.0), 0)
        fits, upper_fits = sum_low >= aim + slack, sum_high >= aim - slack
        low, low_end = tl.where(fits, middle, low), tl.where(fits, low_end, middle)
        high, high_end = tl.where(upper_fits, upper, high), tl.where(upper_fits, high_end, upper)
    return low.to(tl.int64), high.to(tl.int64)


@triton.jit
def guess_bounds(
    logits, scores, is_penalised, vocab_size, best, shift, goal, drop, least, peak, log2_slope,
    BESIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Guesses the least and the largest key, without their lowest `shift` bits, that the border may have. `best`
    (BLOCK,) are the largest logits of as many lanes; as many of the row are sampled."""
    spread = (tl.arange(0, BLOCK).to(tl.int64) * vocab_size // BLOCK).to(tl.int32)
    sample = load_score(logits, scores, is_penalised, spread, vocab_size, float("-inf"), BESIDE)
    low, high = _guess(best, sample, vocab_size / BLOCK, goal, drop, least, peak, log2_slope, COUNT)
    low = tl.maximum(low << (_COARSE_BITS - shift), tl.full((), LOWEST_KEY, tl.int64) >> shift)
    high = tl.minimum(((high + 1) << (_COARSE_BITS - shift)) - 1, key_of(peak) >> shift)
    return low, high


@triton.jit
def load_best(best, row, length, vocab_size, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """Loads the largest logits of a row's lanes, and the largest of all."""
    lane = tl.arange(0, BLOCK)
    inside = lane // (BLOCK // SEGMENTS) * length < vocab_size
    largest = tl.load(best + row * BLOCK + lane, mask=inside, other=float("-inf"))
    return largest, tl.max(largest, 0)
