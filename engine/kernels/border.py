"""Finds the border of a row's filter: the largest value that has at least `goal` at or above it, in tokens for top-k,
in mass for top-p. These are the device functions of the kernels of filter.py.

Two values around the border are guessed (guess.py). A walk over the row adds up exactly what lies above them, and
copies the logits between, of which the border is bisected. Where the guess was wrong the exact sums say on which side
the border lies, and that side is walked as well: a guess costs time, never a bit.

A row is walked in segments of `length` tokens; each has a range of `copies`, (V,) of a row, and one of `sums`, of a row
(3, SEGMENTS) int64: what all of the segment counts for, what lies above the guess, and how many logits were copied.

Values are bisected as keys: integers in the order of the floats, without the lowest bits where a dtype has none there.
"""

from penstock.engine.kernels.mass import share_of
from penstock.engine.kernels.penalty import load_score
from penstock.parallel.triton_door import tl, triton

LOWEST_KEY = tl.constexpr(0x007FFFFF)  # of -inf


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
def _amount(logit, counts, peak, log2_slope, scale, COUNT: tl.constexpr):
    """Computes what a token counts for where it `counts`, as int64: 1, or its mass."""
    if COUNT:
        return counts.to(tl.int64)
    else:
        return (tl.where(counts, share_of(logit, peak, log2_slope), 0.0) * scale).to(tl.int64)


@triton.jit
def walk_segment(
    logits, scores, is_penalised, segment, length, vocab_size, copies, sums, low, high, least, peak, log2_slope, scale,
    BESIDE: tl.constexpr, COUNT: tl.constexpr, SEGMENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Fills a segment's `sums` and copies its logits from `low` to `high`. Those below `least` count for nothing, and
    are not copied."""
    lane, zero = tl.arange(0, TILE), tl.zeros((TILE,), tl.int64)
    total, above, num_copied = zero, zero, tl.zeros((), tl.int32)
    begin = segment * length
    for first in tl.range(begin, tl.minimum(begin + length, vocab_size), TILE):
        logit = load_score(logits, scores, is_penalised, first + lane, vocab_size, float("nan"), BESIDE)
        amount = _amount(logit, logit >= least, peak, log2_slope, scale, COUNT)
        total += amount
        above += tl.where(logit > high, amount, 0)
        chosen = (logit >= tl.maximum(low, least)) & (logit <= high)
        upto = num_copied + tl.cumsum(chosen.to(tl.int32), 0)
        tl.store(copies + begin + upto - 1, logit, mask=chosen)
        num_copied += tl.sum(chosen.to(tl.int32), 0)
    tl.store(sums + segment, tl.sum(total, 0))
    tl.store(sums + SEGMENTS + segment, tl.sum(above, 0))
    tl.store(sums + 2 * SEGMENTS + segment, num_copied.to(tl.int64))


@triton.jit
def load_sums(sums, which, length, vocab_size, SEGMENTS: tl.constexpr):
    """Loads one of the sums of each segment: (SEGMENTS,) int64, 0 behind the vocabulary."""
    part = tl.arange(0, SEGMENTS)
    return tl.load(sums + which * SEGMENTS + part, mask=part * length < vocab_size, other=0)


@triton.jit
def _add_up(
    copies, num_copied, length, value, peak, log2_slope, scale, COUNT: tl.constexpr, SEGMENTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Adds up what copied logits of at least `value` count for; `num_copied` are (SEGMENTS,)."""
    WIDTH: tl.constexpr = TILE // SEGMENTS
    part, lane = tl.arange(0, SEGMENTS)[:, None], tl.arange(0, WIDTH)[None, :]
    found = tl.zeros((SEGMENTS, WIDTH), tl.int64)
    for first in tl.range(0, tl.max(num_copied, 0), WIDTH):
        inside = first + lane < num_copied[:, None]
        logit = tl.load(copies + part * length + first + lane, mask=inside, other=float("nan"))
        found += _amount(logit, logit >= value, peak, log2_slope, scale, COUNT)
    return tl.sum(tl.sum(found, 1), 0)


@triton.jit
def _count_copied(copies, num_copied, length, value, SEGMENTS: tl.constexpr, TILE: tl.constexpr):
    """Counts the copied logits equal to `value`, by segment: (SEGMENTS,) int64."""
    WIDTH: tl.constexpr = TILE // SEGMENTS
    part, lane = tl.arange(0, SEGMENTS)[:, None], tl.arange(0, WIDTH)[None, :]
    found = tl.zeros((SEGMENTS, WIDTH), tl.int32)
    for first in tl.range(0, tl.max(num_copied, 0), WIDTH):
        inside = first + lane < num_copied[:, None]
        logit = tl.load(copies + part * length + first + lane, mask=inside, other=float("nan"))
        found += (logit == value).to(tl.int32)
    return tl.sum(found, 1).to(tl.int64)


@triton.jit
def find_border(
    logits, scores, is_penalised, length, vocab_size, copies, sums, shift, low, high, goal, least, peak, log2_slope,
    scale, BESIDE: tl.constexpr, COUNT: tl.constexpr, SEGMENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Finds the key of the border, without its lowest `shift` bits, of a row that was walked with the keys `low` and
    `high`. Returns it, and what lies above it."""
    above = tl.sum(load_sums(sums, 1, length, vocab_size, SEGMENTS), 0)
    num_copied = load_sums(sums, 2, length, vocab_size, SEGMENTS).to(tl.int32)
    reached = above + _add_up(
        copies, num_copied, length, value_of(low, shift), peak, log2_slope, scale, COUNT, SEGMENTS, TILE
    )
    if (above >= goal) | (reached < goal):  # the guess was wrong
        lowest, highest = tl.full((), LOWEST_KEY, tl.int64) >> shift, key_of(peak) >> shift
        is_higher = above >= goal
        low, high = tl.where(is_higher, high + 1, lowest), tl.where(is_higher, highest, low - 1)
        tl.debug_barrier()  # before and behind the walk: what some threads store others load
        for segment in tl.range(0, tl.cdiv(vocab_size, length)):
            walk_segment(
                logits, scores, is_penalised, segment, length, vocab_size, copies, sums, value_of(low, shift),
                value_of(high, shift), least, peak, log2_slope, scale, BESIDE, COUNT, SEGMENTS, TILE,
            )  # fmt: skip
        tl.debug_barrier()
        above = tl.sum(load_sums(sums, 1, length, vocab_size, SEGMENTS), 0)
        num_copied = load_sums(sums, 2, length, vocab_size, SEGMENTS).to(tl.int32)
    end, before = high + 1, above
    while end - low > 1:
        middle = (low + end) // 2
        reached = above + _add_up(
            copies, num_copied, length, value_of(middle, shift), peak, log2_slope, scale, COUNT, SEGMENTS, TILE
        )
        enough = reached >= goal
        low, end = tl.where(enough, middle, low), tl.where(enough, end, middle)
        before = tl.where(enough, before, reached)
    return low, before


@triton.jit
def last_of_ties(
    logits, scores, is_penalised, length, vocab_size, copies, sums, least, admitted, BESIDE: tl.constexpr,
    SEGMENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Finds the id of the last of `admitted` logits equal to `least`, all of which were copied."""
    num_copied = load_sums(sums, 2, length, vocab_size, SEGMENTS).to(tl.int32)
    tied, part = _count_copied(copies, num_copied, length, least, SEGMENTS, TILE), tl.arange(0, SEGMENTS)
    full = tl.sum((tl.cumsum(tied, 0) < admitted).to(tl.int32), 0)  # segments of which all are admitted
    seen, last = tl.sum(tl.where(part < full, tied, 0), 0), tl.zeros((), tl.int32)
    begin = full * length
    while (begin < vocab_size) & (seen < admitted):
        column = begin + tl.arange(0, TILE)
        logit = load_score(logits, scores, is_penalised, column, vocab_size, float("nan"), BESIDE)
        equal = (logit == least).to(tl.int64)
        upto = seen + tl.cumsum(equal, 0)
        last = tl.maximum(last, tl.max(tl.where((equal > 0) & (upto <= admitted), column, 0), 0))
        seen += tl.sum(equal, 0)
        begin += TILE
    return last
