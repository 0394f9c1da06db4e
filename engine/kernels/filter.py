"""Top-k, top-p and min-p without a sort: finds the least logit of a row that is kept, and the last id among its ties.

transformers' TopK, TopP and MinPLogitsWarper, one after another, keep a prefix of a row's tokens in descending order,
ties by id. So two numbers describe what is kept, and the draw applies them while it reads. All ties with the k-th logit
are kept; of ties at the border of top_p those with lower ids are kept (transformers keeps any). Order and ties are
those of the logits: two float32 logits that only the division by the temperature makes equal are no tie.

Shapes: R rows, V vocab.
Seven launches follow one another, in each of which a row that does not ask ends at once: the largest logits of each
segment of a row; then for the border by count, of top-k, and again for that by mass, of top-p: a guess of two values
around it (guess.py), what is above and between them in each segment, and the border itself (border.py). Where all of a
row is read a segment has a program, since one program a row waits for each block; else a row has one.
Since mass depends on the device's exp (mass.py), a token within its error of the border may be kept on one device and
dropped on another. On one device it is treated alike in all rows, batches and ranks, in a graph and eagerly.
Tried before, 256 rows: the value's bits from the top, two a launch (34 launches, eight sums of mass), 630 us; one
program a row that does all of it, 386 us.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.border import find_border, last_of_ties, load_sums, value_of, walk_segment
from penstock.engine.kernels.guess import guess_bounds, load_best
from penstock.engine.kernels.mass import mass, mass_scale, masses
from penstock.engine.kernels.penalty import Penalised, load_score
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
KEEP_ALL = -1.0  # a drop_mass that drops no token
BLOCK = 4096
SEGMENTS = 16  # of a row at most: those of 256 rows are all under way at once
TILES = 16  # of a block, for a program of one warp
OF_SEGMENT = {"num_warps": 1, "maxnreg": 64, "enable_fp_fusion": False}  # an SM has room for 32 segments
OF_ROW = {"num_warps": 16, "maxnreg": 64, "enable_fp_fusion": False}  # and for two rows
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


def _find_limits_triton(
    logits: Tensor, vocab_size: int, temperatures: Tensor, filters: Filters, penalised: Penalised | None = None
) -> Limits:
    num_rows, device = len(logits), logits.device
    assert logits.stride(1) == 1, "the last dim of the logits must have stride 1"
    assert 1 <= vocab_size <= logits.shape[1]
    assert all(part.shape == (num_rows,) and part.is_contiguous() for part in (temperatures, *filters))
    calls["triton"] += 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=device)

    limits = Limits(empty(), empty(dtype=torch.int32))
    if not num_rows:
        return limits
    length = triton.cdiv(triton.cdiv(vocab_size, SEGMENTS), BLOCK) * BLOCK
    bounds, sums = empty(2, dtype=torch.int64), empty(3, SEGMENTS, dtype=torch.int64)
    row = (logits, logits.stride(0), *(penalised or (filters.top_k, logits)), vocab_size, temperatures, *filters)
    work = (empty(BLOCK), empty(), bounds, empty(vocab_size), sums, *limits, length, mass_scale(vocab_size))
    fixed = {"BESIDE": penalised is not None, "BITS": VALUE_BITS[logits.dtype], "SEGMENTS": SEGMENTS, "BLOCK": BLOCK}
    by_segment, by_row = (triton.cdiv(vocab_size, length), num_rows), (num_rows,)
    _find_peaks[by_segment](*row, *work, **fixed, num_warps=8)
    for count in (True, False):
        _bound_rows[by_row](*row, *work, **fixed, COUNT=count, **OF_ROW)
        _walk_segments[by_segment](*row, *work, **fixed, COUNT=count, TILE=BLOCK // TILES, **OF_SEGMENT)
        _settle_rows[by_row](*row, *work, **fixed, COUNT=count, **OF_ROW)
    return limits


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _asks(row, temperatures, top_k, drop_mass, vocab_size, COUNT: tl.constexpr):
    """Tells whether a row has a border by count, or by mass."""
    if COUNT:
        return (tl.load(temperatures + row) > 0) & (tl.load(top_k + row) < vocab_size)
    else:
        return (tl.load(temperatures + row) > 0) & (tl.load(drop_mass + row) >= 0)


@triton.jit
def _find_row(row, logits, logits_row, penalised, scores, vocab_size, BESIDE: tl.constexpr, BITS: tl.constexpr):
    """Finds a row: its logits, its scores, whether these count, and the lowest bits that keys of them lack."""
    is_penalised, shift = tl.zeros((), tl.int64), tl.full((), 32 - BITS, tl.int64)
    if BESIDE:
        is_penalised = tl.load(penalised + row)
        shift = tl.where(is_penalised > 0, 0, shift)
    return logits + row * logits_row, scores + row * vocab_size, is_penalised, shift


@triton.jit
def _find_peaks(
    logits, logits_row, penalised, scores, vocab_size, temperatures, top_k, drop_mass, log_min_p,
    best, peaks, bounds, copies, sums, leasts, lasts, length, scale,
    BESIDE: tl.constexpr, BITS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Finds the largest logits of the lanes of a segment."""
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count, drop, log_floor = tl.load(top_k + row), tl.load(drop_mass + row), tl.load(log_min_p + row)
    filtered = (count < vocab_size) | (drop >= 0) | (log_floor > float("-inf"))
    if (tl.load(temperatures + row) > 0) & filtered:
        logits, scores, is_penalised, shift = _find_row(
            row, logits, logits_row, penalised, scores, vocab_size, BESIDE, BITS
        )
        column = segment * length + tl.arange(0, BLOCK)
        largest = load_score(logits, scores, is_penalised, column, vocab_size, float("-inf"), BESIDE)
        for offset in tl.range(BLOCK, length, BLOCK):
            logit = load_score(logits, scores, is_penalised, column + offset, vocab_size, float("-inf"), BESIDE)
            largest = tl.maximum(largest, logit)
        PART: tl.constexpr = BLOCK // SEGMENTS
        largest = tl.max(tl.reshape(largest, (SEGMENTS, PART)), 0)
        tl.store(best + row * BLOCK + segment * PART + tl.arange(0, PART), largest)


@triton.jit
def _bound_rows(
    logits, logits_row, penalised, scores, vocab_size, temperatures, top_k, drop_mass, log_min_p,
    best, peaks, bounds, copies, sums, leasts, lasts, length, scale,
    BESIDE: tl.constexpr, BITS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Guesses bounds of a row's border. The first of two launches writes the limits of a row that keeps all."""
    row = tl.program_id(0).to(tl.int64)
    if COUNT:
        tl.store(leasts + row, float("-inf"))
        tl.store(lasts + row, vocab_size)
    if _asks(row, temperatures, top_k, drop_mass, vocab_size, COUNT):
        logits, scores, is_penalised, shift = _find_row(
            row, logits, logits_row, penalised, scores, vocab_size, BESIDE, BITS
        )
        largest, peak = load_best(best, row, length, vocab_size, SEGMENTS, BLOCK)
        low, high = guess_bounds(
            logits, scores, is_penalised, vocab_size, largest, shift, tl.load(top_k + row), tl.load(drop_mass + row),
            tl.load(leasts + row), peak, _LOG2_E / tl.load(temperatures + row), BESIDE, COUNT, BLOCK,
        )  # fmt: skip
        tl.store(peaks + row, peak)
        tl.store(bounds + row * 2, low)
        tl.store(bounds + row * 2 + 1, high)


@triton.jit
def _walk_segments(
    logits, logits_row, penalised, scores, vocab_size, temperatures, top_k, drop_mass, log_min_p,
    best, peaks, bounds, copies, sums, leasts, lasts, length, scale,
    BESIDE: tl.constexpr, BITS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Adds up a segment, and copies what lies between the bounds."""
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if _asks(row, temperatures, top_k, drop_mass, vocab_size, COUNT):
        logits, scores, is_penalised, shift = _find_row(
            row, logits, logits_row, penalised, scores, vocab_size, BESIDE, BITS
        )
        low, high = tl.load(bounds + row * 2), tl.load(bounds + row * 2 + 1)
        walk_segment(
            logits, scores, is_penalised, segment, length, vocab_size, copies + row * vocab_size,
            sums + row * 3 * SEGMENTS, value_of(low, shift), value_of(high, shift), tl.load(leasts + row),
            tl.load(peaks + row), _LOG2_E / tl.load(temperatures + row), scale, BESIDE, COUNT, SEGMENTS, TILE,
        )  # fmt: skip


@triton.jit
def _settle_rows(
    logits, logits_row, penalised, scores, vocab_size, temperatures, top_k, drop_mass, log_min_p,
    best, peaks, bounds, copies, sums, leasts, lasts, length, scale,
    BESIDE: tl.constexpr, BITS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Finds a row's border; the second of two launches applies min-p as well."""
    row = tl.program_id(0).to(tl.int64)
    temperature, least, last = tl.load(temperatures + row), tl.load(leasts + row), tl.load(lasts + row)
    if _asks(row, temperatures, top_k, drop_mass, vocab_size, COUNT):
        logits, scores, is_penalised, shift = _find_row(
            row, logits, logits_row, penalised, scores, vocab_size, BESIDE, BITS
        )
        copies, sums = copies + row * vocab_size, sums + row * 3 * SEGMENTS
        peak, log2_slope, goal = tl.load(peaks + row), _LOG2_E / temperature, tl.load(top_k + row)
        if not COUNT:
            total = tl.sum(load_sums(sums, 0, length, vocab_size, SEGMENTS), 0)
            dropped = tl.load(drop_mass + row).to(tl.float64) * total.to(tl.float64)
            goal = tl.maximum(total - dropped.to(tl.int64), 1)
        key, before = find_border(
            logits, scores, is_penalised, length, vocab_size, copies, sums, shift, tl.load(bounds + row * 2),
            tl.load(bounds + row * 2 + 1), goal, least, peak, log2_slope, scale, BESIDE, COUNT, SEGMENTS, BLOCK,
        )  # fmt: skip
        least = value_of(key, shift)
        if not COUNT:
            each = mass(least, peak, log2_slope, scale)
            admitted = tl.where(each > 0, (goal - before + each - 1) // tl.maximum(each, 1), 0)
            last = last_of_ties(
                logits, scores, is_penalised, length, vocab_size, copies, sums, least, admitted, BESIDE, SEGMENTS, BLOCK
            )
    if not COUNT:
        log_floor = tl.load(log_min_p + row)
        if (temperature > 0) & (log_floor > float("-inf")):
            largest, peak = load_best(best, row, length, vocab_size, SEGMENTS, BLOCK)
            floor = peak + log_floor * temperature
            if floor > least:
                least, last = floor, vocab_size + last * 0
    tl.store(leasts + row, least)
    tl.store(lasts + row, last)
