"""Finds the border of a row's filter: the largest value that has at least `goal` at or above it, in tokens for top-k,
in mass for top-p. It is a part of the kernels of filter.py.

A program guesses two values around the border (_guess), adds up exactly what lies above and between them, keeps a
copy of the logits between, and bisects these. Where the guess was wrong the exact sums say on which side the border
lies, and that side is walked instead: a guess costs time, never a bit. Segments of a row may have
a program each.

Values are bisected as keys: integers in the order of the floats, without the lowest bits where a dtype has none there.
"""

from penstock.engine.kernels.mass import mass
from penstock.engine.kernels.penalty import load_score
from penstock.parallel.triton_door import tl, triton

_LOWEST_KEY = tl.constexpr(0x007FFFFF)  # of -inf
_COARSE_BITS = tl.constexpr(16)  # of a key, from the top, with which a guess is made
_TOP_SHARE = tl.constexpr(32)  # of a block's lanes, one in so many has a logit that a guess counts as it is


@triton.jit
def key_of(value):
    """Maps a float32 to an int64 of 32 bits in the same order; -0.0 equals 0.0."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    return (bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)).to(tl.int64)


@triton.jit
def value_of(key, shift):
    """Maps a key without its lowest `shift` bits, which the value lacks, to the value."""
    full = key.to(tl.int64) << shift
    negative = ((full ^ 0xFFFFFFFF) >> shift) << shift
    return tl.where(full >> 31 == 1, full ^ 0x80000000, negative).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _amount(logit, least, peak, log2_slope, scale, COUNT: tl.constexpr):
    """Computes what a token counts for, as int64: 1, or its mass if it is not below `least`."""
    if COUNT:
        return tl.full(logit.shape, 1, tl.int64)
    else:
        return tl.where(logit >= least, mass(logit, peak, log2_slope, scale), 0)


@triton.jit
def _share(logit, least, peak, log2_slope, COUNT: tl.constexpr):
    """Computes about what _amount does, as float32."""
    if COUNT:
        return tl.full(logit.shape, 1.0, tl.float32)
    else:
        share = tl.where(logit == peak, 1.0, tl.exp2((logit - peak) * log2_slope))
        return tl.where(logit >= least, share, 0.0)


@triton.jit
def _guess(best, sample, step, goal, drop, least, peak, log2_slope, COUNT: tl.constexpr):
    """Guesses two coarse keys that the border lies between. `best` are the largest logits of the lanes, among which are
    nearly all of the row's largest ones; of the others, one in `step` is in `sample`. What is sampled errs by about the
    root of its squares, and of the largest ones a few are missing."""
    peak_key = (key_of(peak) >> _COARSE_BITS).to(tl.int32)
    low, high = tl.full((), 0, tl.int32) + (_LOWEST_KEY >> _COARSE_BITS), peak_key + 1
    while high - low > 1:  # the value from which on the largest ones are counted as they are
        middle = (low + high) // 2
        enough = tl.sum((best >= value_of(middle.to(tl.int64), _COARSE_BITS)).to(tl.int32), 0)
        if enough * _TOP_SHARE >= best.shape[0]:
            low = middle
        else:
            high = middle
    limit = value_of(low.to(tl.int64), _COARSE_BITS)
    top = tl.where(best >= limit, _share(best, least, peak, log2_slope, COUNT), 0.0)
    rest = tl.where(sample < limit, _share(sample, least, peak, log2_slope, COUNT) * step, 0.0)
    in_top, total = tl.sum(top, 0), tl.sum(top, 0) + tl.sum(rest, 0)
    if COUNT:
        aim = goal.to(tl.float32)
    else:
        aim = total - drop * total
    share = tl.minimum(tl.maximum(aim / total, 0.0), 1.0)
    slack = in_top / 16 + 4 * tl.sqrt(share * (1 - share) * tl.sum(rest * rest, 0))
    low, low_end = tl.full((), 0, tl.int32) + (_LOWEST_KEY >> _COARSE_BITS), peak_key + 1
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
def walk(
    logits, scores, is_penalised, first, end, vocab_size, copy, low, high, least, peak, log2_slope, scale,
    BESIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up what the row's logits from `first` up to `end` count for, all and those above `high`, and copies those
    from `low` to `high` to `copy`. Returns the sums and how many were copied."""
    lane, zero = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int64)
    total, above, num_copied = zero, zero, tl.zeros((), tl.int32)
    for begin in tl.range(first, end, BLOCK):
        column = begin + lane
        logit = load_score(logits, scores, is_penalised, column, vocab_size, BESIDE)
        amount = tl.where(column < vocab_size, _amount(logit, least, peak, log2_slope, scale, COUNT), 0)
        total += amount
        above += tl.where(logit > high, amount, 0)
        chosen = (column < vocab_size) & (logit >= low) & (logit <= high)
        place = num_copied + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(copy + place, logit, mask=chosen)
        num_copied += tl.sum(chosen.to(tl.int32), 0)
    return tl.sum(total, 0), tl.sum(above, 0), num_copied


@triton.jit
def _add_up(
    copy, num_copied, value, least, peak, log2_slope, scale, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds up what copied logits of at least `value` count for."""
    lane, found = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int64)
    for begin in tl.range(0, num_copied, BLOCK):
        logit = tl.load(copy + begin + lane, mask=begin + lane < num_copied, other=float("nan"))
        found += tl.where(logit >= value, _amount(logit, least, peak, log2_slope, scale, COUNT), 0)
    return tl.sum(found, 0)


@triton.jit
def guess_bounds(
    logits, scores, is_penalised, vocab_size, copy, shift, goal, drop, least, peak, log2_slope,
    BESIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Guesses the least and the largest key, without their lowest `shift` bits, that the border may have."""
    lane = tl.arange(0, BLOCK)
    spread = (lane.to(tl.int64) * vocab_size // BLOCK).to(tl.int32)
    sample = load_score(logits, scores, is_penalised, spread, vocab_size, BESIDE)
    best = tl.load(copy + vocab_size + lane)
    low, high = _guess(best, sample, vocab_size / BLOCK, goal, drop, least, peak, log2_slope, COUNT)
    low = tl.maximum(low << (_COARSE_BITS - shift), tl.full((), _LOWEST_KEY, tl.int64) >> shift)
    high = tl.minimum(((high + 1) << (_COARSE_BITS - shift)) - 1, key_of(peak) >> shift)
    return low, high


@triton.jit
def add_up_segments(
    copy, length, counts, value, least, peak, log2_slope, scale, SEGMENTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Adds up the masses of at least `value` that segments copied, `counts` (SEGMENTS,) of them: (SEGMENTS,) int64."""
    WIDTH: tl.constexpr = TILE // SEGMENTS
    part, lane = tl.arange(0, SEGMENTS)[:, None], tl.arange(0, WIDTH)[None, :]
    found = tl.zeros((SEGMENTS, WIDTH), tl.int64)
    for begin in tl.range(0, tl.max(counts, 0), WIDTH):
        inside = begin + lane < counts[:, None]
        logit = tl.load(copy + part * length + begin + lane, mask=inside, other=float("nan"))
        found += tl.where(logit >= value, _amount(logit, least, peak, log2_slope, scale, False), 0)
    return tl.sum(found, 1)


@triton.jit
def count_segments(copy, length, counts, value, SEGMENTS: tl.constexpr, TILE: tl.constexpr):
    """Counts the logits equal to `value` that segments copied: (SEGMENTS,) int32."""
    WIDTH: tl.constexpr = TILE // SEGMENTS
    part, lane = tl.arange(0, SEGMENTS)[:, None], tl.arange(0, WIDTH)[None, :]
    found = tl.zeros((SEGMENTS, WIDTH), tl.int32)
    for begin in tl.range(0, tl.max(counts, 0), WIDTH):
        inside = begin + lane < counts[:, None]
        logit = tl.load(copy + part * length + begin + lane, mask=inside, other=float("nan"))
        found += (logit == value).to(tl.int32)
    return tl.sum(found, 1)


@triton.jit
def find_border(
    logits, scores, is_penalised, vocab_size, copy, shift, goal, drop, least, peak, log2_slope, scale,
    BESIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Finds the key of the border, without its lowest `shift` bits. Returns it, the goal, and the sum above it. The
    goal of a count is given; that of mass is what `drop` leaves of all, but the most likely token is always kept."""
    lowest, highest = tl.full((), _LOWEST_KEY, tl.int64) >> shift, key_of(peak) >> shift
    low, high = guess_bounds(
        logits, scores, is_penalised, vocab_size, copy, shift, goal, drop, least, peak, log2_slope,
        BESIDE, COUNT, BLOCK,
    )  # fmt: skip
    above, num_copied, tries = goal * 0, tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    while tries < 2:
        low_value = value_of(low, shift)
        total, above, num_copied = walk(
            logits, scores, is_penalised, 0, vocab_size, vocab_size, copy, low_value, value_of(high, shift), least,
            peak, log2_slope, scale, BESIDE, COUNT, BLOCK,
        )  # fmt: skip
        if not COUNT:
            dropped = drop.to(tl.float64) * total.to(tl.float64)
            goal = tl.maximum(total - dropped.to(tl.int64), 1)
        tries += 1
        tl.debug_barrier()
        if above >= goal:
            low, high = high + 1, highest
        elif above + _add_up(copy, num_copied, low_value, least, peak, log2_slope, scale, COUNT, BLOCK) < goal:
            low, high = lowest, low - 1
        else:
            tries = tl.full((), 2, tl.int32)
    end, before = high + 1, above
    while end - low > 1:
        middle = (low + end) // 2
        found = _add_up(copy, num_copied, value_of(middle, shift), least, peak, log2_slope, scale, COUNT, BLOCK)
        enough = above + found >= goal
        low, end = tl.where(enough, middle, low), tl.where(enough, end, middle)
        before = tl.where(enough, before, above + found)
    return low, goal, before
