"""Top-k, top-p and min-p without a sort: finds the least logit of a row that is kept, and the last id among its ties.

transformers' TopK, TopP and MinPLogitsWarper, one after another, keep a prefix of a row's tokens in descending order,
ties by id. So two numbers describe what is kept, and the draw applies them while it reads. All ties with the k-th logit
are kept; of ties at the border of top_p those with lower ids are kept (transformers keeps any). Order and ties are
those of the logits: two float32 logits that only the division by the temperature makes equal are no tie.

Shapes: R rows, V vocab.
A row has one program in one launch; that of a row without filters ends at once. The border is the largest value that
has at least `goal` at or above it, in tokens for top-k, in mass for top-p. The program guesses two values around it
(_guess), adds up exactly what lies above and between them, keeps a copy of the logits between, and bisects these. Where
the guess was wrong the exact sums say on which side the border lies, and that side is walked instead: a guess costs
time, never a bit. Mass is exp((logit - peak) / temperature) in fixed point, which adds up exactly in any order; a mass
below 2**-45 of the peak's (V = 128256) is 0. It depends on the device's exp: a token within its error of the border may
be kept on one device and dropped on another. On one device it is treated alike in all rows, batches and ranks, in a
graph and eagerly.
Tried before: the value's bits from the top, two a launch (34 launches, eight sums of mass): 630 us for 256 rows.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.penalty import Penalised, load_score
from penstock.engine.kernels.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
KEEP_ALL = -1.0  # a drop_mass that drops no token
BLOCK = 4096
VALUE_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}  # of a logit as float32, from the top


class Filters(NamedTuple):
    """The filters of each row; a row with temperature 0 is not filtered."""

    top_k: Tensor  # (R,) int64, 1..V; V keeps all
    drop_mass: Tensor  # (R,) float32: 1 - top_p, or KEEP_ALL
    log_min_p: Tensor  # (R,) float32, at most 0; -inf keeps all


class Limits(NamedTuple):
    """The limits of each row: logits above `least` are kept, and those equal to it with ids up to `last`."""

    least: Tensor  # (R,) float32
    last: Tensor  # (R,) int32

    def keep(self, logits: Tensor) -> Tensor:
        """Tells which logits (R, V), of any float dtype, are kept: (R, V) bool. NaN is kept, for the argmax to find."""
        ids = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
        least, last = self.least[:, None], self.last[:, None]
        return ~(logits < least) & ~((logits == least) & (ids > last))


def find_limits(
    logits: Tensor, vocab_size: int, temperatures: Tensor, filters: Filters, penalised: Penalised | None = None
) -> Limits:
    """Finds the limits of the first vocab_size columns of logits (R, V or more) of any float dtype; those of rows that
    are `penalised` are read there. temperatures (R,) are float32, 0 where nothing is drawn. The limits of a row with a
    NaN mean nothing."""
    takes = logits.is_cuda and HAS_TRITON and logits.dtype in VALUE_BITS
    run = _find_limits_triton if takes else find_limits_reference
    return run(logits, vocab_size, temperatures, filters, penalised)


def find_limits_reference(
    logits: Tensor, vocab_size: int, temperatures: Tensor, filters: Filters, penalised: Penalised | None = None
) -> Limits:
    """Does the same in plain torch, by sorting."""
    calls["reference"] += 1
    if penalised is not None:
        logits = penalised.over(logits[:, :vocab_size])
    top_k, drop_mass, log_min_p = (part[:, None] for part in filters)
    draws = temperatures > 0
    temperature = torch.where(draws, temperatures, 1.0)[:, None]
    logits, ids = logits[:, :vocab_size].float().sort(dim=-1, descending=True, stable=True)  # (R, V)
    peak = logits[:, :1]
    keep = logits >= logits.gather(-1, top_k - 1)
    mass = masses(logits, peak, temperature) * keep
    total, before = mass.sum(-1, keepdim=True), mass.cumsum(-1) - mass
    keep &= total - before > (drop_mass.double() * total.double()).long()
    keep &= ~(logits < peak + log_min_p * temperature)
    num_kept = keep.sum(-1, keepdim=True).clamp_(min=1)  # the most likely token is always kept
    least, last = (part.gather(-1, num_kept - 1)[:, 0] for part in (logits, ids))
    return Limits(least.masked_fill(~draws, -torch.inf), last.int().masked_fill(~draws, vocab_size))


def masses(logits: Tensor, peak: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """Computes exp((logits - peak) / temperature), (R, V), as int64 in fixed point, where mass_scale() stands for 1. A
    row's sum does not overflow."""
    weights = torch.where(logits == peak, 1.0, ((logits - peak) / temperature).exp())  # not exp there: inf - inf is NaN
    return (weights * mass_scale(logits.shape[-1])).long()


def mass_scale(vocab_size: int) -> float:
    return 2.0 ** (62 - vocab_size.bit_length())


def _find_limits_triton(
    logits: Tensor, vocab_size: int, temperatures: Tensor, filters: Filters, penalised: Penalised | None = None
) -> Limits:
    num_rows, device = len(logits), logits.device
    assert logits.stride(1) == 1, "the last dim of the logits must have stride 1"
    assert 1 <= vocab_size <= logits.shape[1]
    assert all(part.shape == (num_rows,) and part.is_contiguous() for part in (temperatures, *filters))
    calls["triton"] += 1
    limits = Limits(*(torch.empty(num_rows, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)))
    if not num_rows:
        return limits
    copies = torch.empty(num_rows, vocab_size + BLOCK, dtype=torch.float32, device=device)
    _find_limits[(num_rows,)](
        *(logits, logits.stride(0), *(penalised or (None, None)), vocab_size, mass_scale(vocab_size), temperatures),
        *(*filters, copies, copies.stride(0), *limits),
        **{"BESIDE": penalised is not None, "BITS": VALUE_BITS[logits.dtype], "BLOCK": BLOCK},
        num_warps=16,
        maxnreg=64,  # so that an SM has room for two rows
        enable_fp_fusion=False,
    )
    return limits


_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST_KEY = tl.constexpr(0x007FFFFF)  # of -inf
_COARSE_BITS = tl.constexpr(16)  # of a key, from the top, with which a guess is made
_TOP_SHARE = tl.constexpr(32)  # of a block's lanes, one in so many has a logit that a guess counts as it is


@triton.jit
def _key(value):
    """Maps a float32 to an int64 of 32 bits in the same order; -0.0 equals 0.0."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    return (bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)).to(tl.int64)


@triton.jit
def _value(key, shift):
    """Maps a key without its lowest `shift` bits, which the value lacks, to the value."""
    full = key.to(tl.int64) << shift
    negative = ((full ^ 0xFFFFFFFF) >> shift) << shift
    return tl.where(full >> 31 == 1, full ^ 0x80000000, negative).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def mass(logit, peak, log2_slope, scale):
    """Computes exp((logit - peak) * slope) as int64 in fixed point, where `scale` stands for 1."""
    return (tl.where(logit == peak, 1.0, tl.exp2((logit - peak) * log2_slope)) * scale).to(tl.int64)


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
    peak_key = (_key(peak) >> _COARSE_BITS).to(tl.int32)
    low, high = tl.full((), 0, tl.int32) + (_LOWEST_KEY >> _COARSE_BITS), peak_key + 1
    while high - low > 1:  # the value from which on the largest ones are counted as they are
        middle = (low + high) // 2
        enough = tl.sum((best >= _value(middle.to(tl.int64), _COARSE_BITS)).to(tl.int32), 0)
        if enough * _TOP_SHARE >= best.shape[0]:
            low = middle
        else:
            high = middle
    limit = _value(low.to(tl.int64), _COARSE_BITS)
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
        value, upper_value = _value(middle.to(tl.int64), _COARSE_BITS), _value(upper.to(tl.int64), _COARSE_BITS)
        sum_low = tl.sum(tl.where(best >= value, top, 0.0) + tl.where(sample >= value, rest, 0.0), 0)
        sum_high = tl.sum(tl.where(best >= upper_value, top, 0.0) + tl.where(sample >= upper_value, rest, 0.0), 0)
        fits, upper_fits = sum_low >= aim + slack, sum_high >= aim - slack
        low, low_end = tl.where(fits, middle, low), tl.where(fits, low_end, middle)
        high, high_end = tl.where(upper_fits, upper, high), tl.where(upper_fits, high_end, upper)
    return low.to(tl.int64), high.to(tl.int64)


@triton.jit
def _walk(
    logits, scores, is_penalised, vocab_size, copy, low, high, least, peak, log2_slope, scale,
    BESIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up what the row's logits count for, all and those above `high`, and copies those from `low` to `high` to
    `copy`. Returns the sums and how many were copied."""
    lane, zero = tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.int64)
    total, above, num_copied = zero, zero, tl.zeros((), tl.int32)
    for begin in tl.range(0, vocab_size, BLOCK):
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
def _search(
    logits, scores, is_penalised, vocab_size, copy, shift, goal, drop, least, peak, log2_slope, scale,
    BESIDE: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Finds the key of the border, without its lowest `shift` bits. Returns it, the goal, and the sum above it. The
    goal of a count is given; that of mass is what `drop` leaves of all, but the most likely token is always kept."""
    lane = tl.arange(0, BLOCK)
    spread = (lane.to(tl.int64) * vocab_size // BLOCK).to(tl.int32)
    sample = load_score(logits, scores, is_penalised, spread, vocab_size, BESIDE)
    best = tl.load(copy + vocab_size + lane)
    low, high = _guess(best, sample, vocab_size / BLOCK, goal, drop, least, peak, log2_slope, COUNT)
    lowest, highest = tl.full((), _LOWEST_KEY, tl.int64) >> shift, _key(peak) >> shift
    low = tl.maximum(low << (_COARSE_BITS - shift), lowest)
    high = tl.minimum(((high + 1) << (_COARSE_BITS - shift)) - 1, highest)
    above, num_copied, tries = goal * 0, tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    while tries < 2:
        low_value = _value(low, shift)
        total, above, num_copied = _walk(
            logits, scores, is_penalised, vocab_size, copy, low_value, _value(high, shift), least, peak, log2_slope,
            scale, BESIDE, COUNT, BLOCK,
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
        found = _add_up(copy, num_copied, _value(middle, shift), least, peak, log2_slope, scale, COUNT, BLOCK)
        enough = above + found >= goal
        low, end = tl.where(enough, middle, low), tl.where(enough, end, middle)
        before = tl.where(enough, before, above + found)
    return low, goal, before


@triton.jit
def _last_of_ties(
    logits, scores, is_penalised, vocab_size, least, admitted, BESIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Finds the id of the last of `admitted` logits equal to `least`; 0 if there are fewer."""
    begin, seen, last = tl.zeros((), tl.int32), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    while (begin < vocab_size) & (seen < admitted):
        column = begin + tl.arange(0, BLOCK)
        logit = load_score(logits, scores, is_penalised, column, vocab_size, BESIDE)
        tied = ((column < vocab_size) & (logit == least)).to(tl.int32)
        count = tl.sum(tied, 0)
        if seen + count >= admitted:
            kept = (tied > 0) & (seen + tl.cumsum(tied, 0) <= admitted)
            last = tl.max(tl.where(kept, column, 0), 0)
        seen += count
        begin += BLOCK
    return last


@triton.jit
def _find_limits(
    logits, logits_row, penalised, scores, vocab_size, scale, temperatures, top_k, drop_mass, log_min_p,
    copies, copies_row, leasts, lasts, BESIDE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature, count, drop = tl.load(temperatures + row), tl.load(top_k + row), tl.load(drop_mass + row)
    log_floor = tl.load(log_min_p + row)
    least, last = tl.full((), float("-inf"), tl.float32), vocab_size + tl.zeros((), tl.int32)
    if (temperature > 0) & ((count < vocab_size) | (drop >= 0) | (log_floor > float("-inf"))):
        is_penalised, shift = tl.zeros((), tl.int64), tl.full((), 32 - BITS, tl.int64)
        logits += row * logits_row
        if BESIDE:
            scores += row * vocab_size
            is_penalised = tl.load(penalised + row)
            shift = tl.where(is_penalised > 0, 0, shift)
        copy, lane = copies + row * copies_row, tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        for begin in tl.range(0, vocab_size, BLOCK):
            column = begin + lane
            logit = load_score(logits, scores, is_penalised, column, vocab_size, BESIDE)
            best = tl.maximum(best, logit)
        tl.store(copy + vocab_size + lane, best)
        tl.debug_barrier()  # what some threads store others load
        peak, log2_slope = tl.max(best, 0), _LOG2_E / temperature
        if count < vocab_size:
            found, goal, before = _search(
                logits, scores, is_penalised, vocab_size, copy, shift, count, drop, least, peak,
                log2_slope, scale, BESIDE, True, BLOCK,
            )  # fmt: skip
            least = _value(found, shift)
        if drop >= 0:
            tl.debug_barrier()
            found, goal, before = _search(
                logits, scores, is_penalised, vocab_size, copy, shift, count * 0, drop, least, peak,
                log2_slope, scale, BESIDE, False, BLOCK,
            )  # fmt: skip
            least = _value(found, shift)
            each = mass(least, peak, log2_slope, scale)
            admitted = tl.where(each > 0, (goal - before + each - 1) // tl.maximum(each, 1), vocab_size)
            last = _last_of_ties(
                logits, scores, is_penalised, vocab_size, least, admitted, BESIDE, BLOCK
            )  # fmt: skip
        floor = peak + log_floor * temperature
        if floor > least:
            least = floor
            last = vocab_size + tl.zeros((), tl.int32)
    tl.store(leasts + row, least)
    tl.store(lasts + row, last)
