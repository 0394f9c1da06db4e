"""Top-k, top-p and min-p without a sort: finds the least logit of a row that is kept, and the last id among its ties.

transformers' TopK, TopP and MinPLogitsWarper, one after another, keep a prefix of a row's tokens in descending order,
ties by id. So two numbers describe what is kept, and the draw applies them while it reads. All ties with the k-th logit
are kept; of ties at the border of top_p those with lower ids are kept (transformers keeps any). Order and ties are
those of the logits: two float32 logits that only the division by the temperature makes equal are no tie.

Shapes: R rows, V vocab.
The kernel finds the threshold from the top of the floats' bits, two bits a launch: the smallest value that has less
than `goal` above it, in tokens for top-k, in mass for top-p. Mass is exp((logit - peak) / temperature) in fixed point,
which adds up exactly in any order; a mass below 2**-45 of the peak's (V = 128256) is 0. Mass depends on the device's
exp: a token within its error of the border may be kept on one device and dropped on another. On one device it is
treated alike in all rows, batches, segments and ranks, in a graph and eagerly. Nothing of size (R, V) is written.
Not tried: to let the last program of a row narrow, which would save half the launches; three bits a launch.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.argmax import argmax_rows, choose_segments
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
KEEP_ALL = -1.0  # a drop_mass that drops no token
BLOCK, SCAN_BLOCK = 1024, 8192
DIGIT = 2  # bits that a launch finds
STATE_FIELDS = 8  # int64 values of a row's state, of which 7 are used
SEARCHED_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}  # of the logit as float32, from the top


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


def find_limits(logits: Tensor, vocab_size: int, temperatures: Tensor, filters: Filters) -> Limits:
    """Finds the limits of the first vocab_size columns of logits (R, V or more) of any float dtype. temperatures (R,)
    are float32, 0 where nothing is drawn. The limits of a row with a NaN mean nothing."""
    takes = logits.is_cuda and HAS_TRITON and logits.dtype in SEARCHED_BITS
    return (_find_limits_triton if takes else find_limits_reference)(logits, vocab_size, temperatures, filters)


def find_limits_reference(logits: Tensor, vocab_size: int, temperatures: Tensor, filters: Filters) -> Limits:
    """Does the same in plain torch, by sorting."""
    calls["reference"] += 1
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
    logits: Tensor, vocab_size: int, temperatures: Tensor, filters: Filters, num_segments: int | None = None
) -> Limits:
    num_rows, device = len(logits), logits.device
    assert logits.stride(1) == 1, "the last dim of the logits must have stride 1"
    assert 1 <= vocab_size <= logits.shape[1]
    assert all(part.shape == (num_rows,) and part.is_contiguous() for part in (temperatures, *filters))
    calls["triton"] += 1
    limits = Limits(*(torch.empty(num_rows, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)))
    if not num_rows:
        return limits
    segments = num_segments or choose_segments(num_rows, vocab_size)
    length = triton.cdiv(triton.cdiv(vocab_size, segments), BLOCK) * BLOCK
    state = torch.zeros(2, num_rows, STATE_FIELDS, dtype=torch.int64, device=device)  # one by count, one by mass
    tops = argmax_rows(logits, vocab_size)  # -1 for a row with a NaN: read as 0
    rows = (logits, logits.stride(0), vocab_size, mass_scale(vocab_size), tops, temperatures, *filters, *state)
    bits = SEARCHED_BITS[logits.dtype]
    for count in (True, False):
        for shift in range(32 - DIGIT, 31 - bits, -DIGIT):
            first = shift == 32 - DIGIT
            _sum_above[(segments, num_rows)](*rows, length, shift, count, first, bits, BLOCK, enable_fp_fusion=False)
            _narrow[(num_rows,)](*filters, *state, shift, count, first, num_warps=1)
    _write_limits[(num_rows,)](*rows, *limits, bits, SCAN_BLOCK, num_warps=16, enable_fp_fusion=False)
    return limits


# Fields of a row's state, int64: the sums at or above four values; the value found so far; GOAL, below which the sum
# above that value has to stay; and that sum.
SUMS = tl.constexpr(0)
LOG2_E = tl.constexpr(1.4426950408889634)
FOUND, GOAL, BEFORE, FIELDS = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(STATE_FIELDS)


@triton.jit
def _key(value, BITS: tl.constexpr):
    """Maps float32 to uint32 in the same order, of which the upper BITS count; -0.0 equals 0.0."""
    bits = (value + 0.0).to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >> 31 == 1, 0xFFFFFFFF, 0x80000000)
    return key >> (32 - BITS) << (32 - BITS)


@triton.jit
def _value(key, BITS: tl.constexpr):
    bits = tl.where(key >> 31 == 1, key ^ 0x80000000, (key ^ 0xFFFFFFFF) >> (32 - BITS) << (32 - BITS))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _mass(logit, peak, log2_slope, scale):
    return (tl.where(logit == peak, 1.0, tl.exp2((logit - peak) * log2_slope)) * scale).to(tl.int64)


@triton.jit(do_not_specialize=["shift"])
def _sum_above(
    logits, logits_row, vocab_size, scale, tops, temperatures, top_k, drop_mass, log_min_p, by_count, by_mass,
    length, shift, COUNT: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up tokens or mass at or above each of four values: FOUND, and the next three at a distance of 1 << shift."""
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperatures + row)
    asks = tl.load(top_k + row) < vocab_size if COUNT else tl.load(drop_mass + row) >= 0
    if asks & (temperature > 0):
        state = (by_count if COUNT else by_mass) + row * FIELDS
        begin, lane = segment * length, tl.arange(0, BLOCK)
        peak = tl.load(logits + row * logits_row + tl.maximum(tl.load(tops + row), 0)).to(tl.float32)
        log2_slope = LOG2_E / temperature
        least = tl.load(by_count + row * FIELDS + FOUND).to(tl.uint32)
        distance = tl.full((), 1, tl.uint32) << shift.to(tl.uint32)
        value1 = tl.load(state + FOUND).to(tl.uint32) + distance
        value2 = value1 + distance
        value3 = value2 + distance
        zero = tl.zeros((BLOCK,), tl.int64)
        sum0, sum1, sum2, sum3 = zero, zero, zero, zero
        for offset in tl.range(0, length, BLOCK):
            column = begin + offset + lane
            inside = column < vocab_size
            logit = tl.load(logits + row * logits_row + column, mask=inside, other=float("-inf")).to(tl.float32)
            key = _key(logit, BITS)
            amount = inside.to(tl.int64)
            if not COUNT:
                amount = tl.where(inside & (key >= least), _mass(logit, peak, log2_slope, scale), 0)
            if FIRST:
                sum0 += amount
            sum1 += tl.where(key >= value1, amount, 0)
            sum2 += tl.where(key >= value2, amount, 0)
            sum3 += tl.where(key >= value3, amount, 0)
        if FIRST:
            tl.atomic_add(state + SUMS, tl.sum(sum0, 0), sem="relaxed")
        tl.atomic_add(state + SUMS + 1, tl.sum(sum1, 0), sem="relaxed")
        tl.atomic_add(state + SUMS + 2, tl.sum(sum2, 0), sem="relaxed")
        tl.atomic_add(state + SUMS + 3, tl.sum(sum3, 0), sem="relaxed")


@triton.jit(do_not_specialize=["shift"])
def _narrow(
    top_k, drop_mass, log_min_p, by_count, by_mass, shift, COUNT: tl.constexpr, FIRST: tl.constexpr
):  # fmt: skip
    """Adds two more bits to FOUND. In a row without such a filter the sums are 0, and so are the bits."""
    row = tl.program_id(0).to(tl.int64)
    state = (by_count if COUNT else by_mass) + row * FIELDS
    goal = tl.load(top_k + row) if COUNT else tl.load(state + GOAL)
    if FIRST and not COUNT:
        total = tl.load(state + SUMS)
        dropped = tl.load(drop_mass + row).to(tl.float64) * total.to(tl.float64)
        goal = tl.maximum(total - dropped.to(tl.int64), 1)  # the most likely token is always kept
        tl.store(state + GOAL, goal)
    sum1, sum2, sum3 = tl.load(state + SUMS + 1), tl.load(state + SUMS + 2), tl.load(state + SUMS + 3)
    digit = (sum1 >= goal).to(tl.int64) + (sum2 >= goal).to(tl.int64) + (sum3 >= goal).to(tl.int64)
    above = tl.where(digit == 0, sum1, tl.where(digit == 1, sum2, sum3))
    tl.store(state + FOUND, tl.load(state + FOUND) + (digit << shift))
    tl.store(state + BEFORE, tl.where(digit == 3, tl.load(state + BEFORE), above))
    tl.store(state + SUMS + tl.arange(0, 4), tl.zeros((4,), tl.int64))


@triton.jit
def _write_limits(
    logits, logits_row, vocab_size, scale, tops, temperatures, top_k, drop_mass, log_min_p, by_count, by_mass,
    leasts, lasts, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the limits from the values found. Ties at the border of top_p are counted up to the last that is kept."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    least = tl.full((), float("-inf"), tl.float32)
    last = vocab_size + tl.zeros((), tl.int32)
    if temperature > 0:
        state = by_mass + row * FIELDS
        found = tl.maximum(tl.load(by_count + row * FIELDS + FOUND), tl.load(state + FOUND)).to(tl.uint32)
        peak = tl.load(logits + row * logits_row + tl.maximum(tl.load(tops + row), 0)).to(tl.float32)
        log2_slope = LOG2_E / temperature
        if found > 0:
            least = _value(found, BITS)
        if tl.load(drop_mass + row) >= 0:
            room = tl.load(state + GOAL) - tl.load(state + BEFORE)  # mass, at least 1
            each = _mass(least, peak, log2_slope, scale)
            admitted = tl.where(each > 0, (room + each - 1) // tl.maximum(each, 1), vocab_size)
            begin, seen = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
            while (begin < vocab_size) & (seen < admitted):
                column = begin + tl.arange(0, BLOCK)
                inside = column < vocab_size
                logit = tl.load(logits + row * logits_row + column, mask=inside, other=0.0).to(tl.float32)
                tied = (inside & (_key(logit, BITS) == found)).to(tl.int32)
                count = tl.sum(tied, 0)
                if seen + count >= admitted:
                    kept = (tied > 0) & (seen + tl.cumsum(tied, 0) <= admitted)
                    last = tl.max(tl.where(kept, column, 0), 0)
                seen += count
                begin += BLOCK
        floor = peak + tl.load(log_min_p + row) * temperature
        if floor > least:
            least = floor
            last = vocab_size + tl.zeros((), tl.int32)
    tl.store(leasts + row, least)
    tl.store(lasts + row, last)
