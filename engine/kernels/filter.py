"""Top-k, top-p and min-p without a sort: finds the least logit of a row that is kept, and the last id among its ties.

transformers' TopK, TopP and MinPLogitsWarper, one after another, keep a prefix of a row's tokens in descending order,
ties by id. So two numbers describe what is kept, and the draw applies them while it reads. All ties with the k-th logit
are kept; of ties at the border of top_p those with lower ids are kept (transformers keeps any). Order and ties are
those of the logits: two float32 logits that only the division by the temperature makes equal are no tie.

Shapes: R rows, V vocab.
Four launches follow one another; rows without filters end at once in each. Where all of a row is read, each of its
SEGMENTS has a program, else the row has one: the largest logits; the border by count, for top-k, and a guess of that by
mass, for top-p; the sums around the guess; the border itself (border.py). Since mass depends on the device's exp
(mass.py), a token within its error of the border may be kept on one device and dropped on another. On one device it is
treated alike in all rows, batches and ranks, in a graph and eagerly.
Tried before: the value's bits from the top, two a launch (34 launches, eight sums of mass): 630 us for 256 rows.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.border import add_up_segments, count_segments, find_border, guess_bounds, value_of, walk
from penstock.engine.kernels.mass import mass, mass_scale, masses
from penstock.engine.kernels.penalty import Penalised, load_score
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
KEEP_ALL = -1.0  # a drop_mass that drops no token
BLOCK = 4096
SEGMENTS = 8  # of a row, each with a program where all of the row is read
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
    limits = Limits(*(torch.empty(num_rows, dtype=dtype, device=device) for dtype in (torch.float32, torch.int32)))
    if not num_rows:
        return limits
    copies = torch.empty(num_rows, vocab_size + BLOCK, dtype=torch.float32, device=device)
    bounds = torch.empty(num_rows, 2, dtype=torch.int64, device=device)
    sums = torch.empty(num_rows, 3, SEGMENTS, dtype=torch.int64, device=device)
    length = triton.cdiv(triton.cdiv(vocab_size, SEGMENTS), BLOCK) * BLOCK
    row = (logits, logits.stride(0), *(penalised or (None, None)), vocab_size)
    asked = (temperatures, *filters)
    work = (copies, copies.stride(0), bounds, sums, limits.least, limits.last, length, mass_scale(vocab_size))
    fixed = {"BESIDE": penalised is not None, "BITS": VALUE_BITS[logits.dtype], "SEGMENTS": SEGMENTS}
    grid = {True: (SEGMENTS, num_rows), False: (num_rows,)}
    for kernel, (is_split, share, options) in LAUNCHES.items():
        block = {"BLOCK": BLOCK, "TILE": int(BLOCK * share)}
        kernel[grid[is_split]](*row, *asked, *work, **fixed, **block, **options, enable_fp_fusion=False)
    return limits


_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _last_of_ties(
    logits, scores, is_penalised, vocab_size, begin, least, admitted, BESIDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Finds the id of the last of `admitted` logits from `begin` on equal to `least`; 0 if there are fewer."""
    seen, last = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
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
def _row_of(row, logits, logits_row, penalised, scores, vocab_size, BESIDE: tl.constexpr, BITS: tl.constexpr):
    """Finds a row: its logits, its scores, whether these count, and the lowest bits that keys of them lack."""
    is_penalised, shift = tl.zeros((), tl.int64), tl.full((), 32 - BITS, tl.int64)
    if BESIDE:
        scores += row * vocab_size
        is_penalised = tl.load(penalised + row)
        shift = tl.where(is_penalised > 0, 0, shift)
    return logits + row * logits_row, scores, is_penalised, shift


@triton.jit
def _find_peaks(
    logits, logits_row, penalised, scores, vocab_size, temperatures, top_k, drop_mass, log_min_p,
    copies, copies_row, bounds, sums, leasts, lasts, length, scale,
    BESIDE: tl.constexpr, BITS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Finds the largest logits of the lanes of a segment."""
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count, drop, log_floor = tl.load(top_k + row), tl.load(drop_mass + row), tl.load(log_min_p + row)
    filtered = (count < vocab_size) | (drop >= 0) | (log_floor > float("-inf"))
    if (tl.load(temperatures + row) > 0) & filtered:
        logits, scores, is_penalised, shift = _row_of(
            row, logits, logits_row, penalised, scores, vocab_size, BESIDE, BITS
        )
        lane, begin = tl.arange(0, TILE), segment * length
        best = tl.full((TILE,), float("-inf"), tl.float32)
        for offset in tl.range(0, length, TILE):
            column = begin + offset + lane
            best = tl.maximum(best, load_score(logits, scores, is_penalised, column, vocab_size, BESIDE))
        PART: tl.constexpr = BLOCK // SEGMENTS
        best = tl.max(tl.reshape(best, (TILE // PART, PART)), 0)
        tl.store(copies + row * copies_row + vocab_size + segment * PART + tl.arange(0, PART), best)


@triton.jit
def _bound_rows(
    logits, logits_row, penalised, scores, vocab_size, temperatures, top_k, drop_mass, log_min_p,
    copies, copies_row, bounds, sums, leasts, lasts, length, scale,
    BESIDE: tl.constexpr, BITS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Finds a row's limit by count, and guesses bounds of that by mass."""
    row = tl.program_id(0).to(tl.int64)
    temperature, count, drop = tl.load(temperatures + row), tl.load(top_k + row), tl.load(drop_mass + row)
    least = tl.full((), float("-inf"), tl.float32)
    if (temperature > 0) & ((count < vocab_size) | (drop >= 0)):
        logits, scores, is_penalised, shift = _row_of(
            row, logits, logits_row, penalised, scores, vocab_size, BESIDE, BITS
        )
        copy = copies + row * copies_row
        peak, log2_slope = tl.max(tl.load(copy + vocab_size + tl.arange(0, BLOCK)), 0), _LOG2_E / temperature
        if count < vocab_size:
            found, goal, before = find_border(
                logits, scores, is_penalised, vocab_size, copy, shift, count, drop, least, peak, log2_slope, scale,
                BESIDE, True, BLOCK,
            )  # fmt: skip
            least = value_of(found, shift)
        if drop >= 0:
            low, high = guess_bounds(
                logits, scores, is_penalised, vocab_size, copy, shift, count * 0, drop, least, peak, log2_slope,
                BESIDE, False, BLOCK,
            )  # fmt: skip
            tl.store(bounds + row * 2, low)
            tl.store(bounds + row * 2 + 1, high)
    tl.store(leasts + row, least)


@triton.jit
def _walk_segments(
    logits, logits_row, penalised, scores, vocab_size, temperatures, top_k, drop_mass, log_min_p,
    copies, copies_row, bounds, sums, leasts, lasts, length, scale,
    BESIDE: tl.constexpr, BITS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds up the masses of a segment, all and those above the upper bound, and copies the logits between."""
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature, drop = tl.load(temperatures + row), tl.load(drop_mass + row)
    if (temperature > 0) & (drop >= 0):
        logits, scores, is_penalised, shift = _row_of(
            row, logits, logits_row, penalised, scores, vocab_size, BESIDE, BITS
        )
        copy, begin = copies + row * copies_row, segment * length
        peak, log2_slope = tl.max(tl.load(copy + vocab_size + tl.arange(0, BLOCK)), 0), _LOG2_E / temperature
        low, high = value_of(tl.load(bounds + row * 2), shift), value_of(tl.load(bounds + row * 2 + 1), shift)
        total, above, num_copied = walk(
            logits, scores, is_penalised, begin, tl.minimum(begin + length, vocab_size), vocab_size, copy + begin,
            low, high, tl.load(leasts + row), peak, log2_slope, scale, BESIDE, False, TILE,
        )  # fmt: skip
        sums += row * 3 * SEGMENTS + segment
        tl.store(sums, total)
        tl.store(sums + SEGMENTS, above)
        tl.store(sums + 2 * SEGMENTS, num_copied.to(tl.int64))


@triton.jit
def _settle_rows(
    logits, logits_row, penalised, scores, vocab_size, temperatures, top_k, drop_mass, log_min_p,
    copies, copies_row, bounds, sums, leasts, lasts, length, scale,
    BESIDE: tl.constexpr, BITS: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Finds a row's limits."""
    row = tl.program_id(0).to(tl.int64)
    temperature, drop, log_floor = tl.load(temperatures + row), tl.load(drop_mass + row), tl.load(log_min_p + row)
    least, last = tl.load(leasts + row), vocab_size + tl.zeros((), tl.int32)
    if (temperature > 0) & ((drop >= 0) | (log_floor > float("-inf"))):
        logits, scores, is_penalised, shift = _row_of(
            row, logits, logits_row, penalised, scores, vocab_size, BESIDE, BITS
        )
        copy = copies + row * copies_row
        peak, log2_slope = tl.max(tl.load(copy + vocab_size + tl.arange(0, BLOCK)), 0), _LOG2_E / temperature
        if drop >= 0:
            part, sums = tl.arange(0, SEGMENTS), sums + row * 3 * SEGMENTS
            total, above = tl.sum(tl.load(sums + part), 0), tl.sum(tl.load(sums + SEGMENTS + part), 0)
            counts = tl.load(sums + 2 * SEGMENTS + part).to(tl.int32)
            low, high = tl.load(bounds + row * 2), tl.load(bounds + row * 2 + 1)
            dropped = drop.to(tl.float64) * total.to(tl.float64)
            goal = tl.maximum(total - dropped.to(tl.int64), 1)
            inside = tl.sum(add_up_segments(
                copy, length, counts, value_of(low, shift), least, peak, log2_slope, scale, SEGMENTS, TILE
            ), 0)  # fmt: skip
            begin, missing = tl.zeros((), tl.int32), goal * 0
            if (above >= goal) | (above + inside < goal):
                tl.debug_barrier()
                found, goal, before = find_border(
                    logits, scores, is_penalised, vocab_size, copy, shift, goal * 0, drop, least, peak, log2_slope,
                    scale, BESIDE, False, BLOCK,
                )  # fmt: skip
                least = value_of(found, shift)
                each = mass(least, peak, log2_slope, scale)
                missing = tl.where(each > 0, (goal - before + each - 1) // tl.maximum(each, 1), vocab_size)
            else:
                end, before = high + 1, above
                while end - low > 1:
                    middle = (low + end) // 2
                    reached = above + tl.sum(add_up_segments(
                        copy, length, counts, value_of(middle, shift), least, peak, log2_slope, scale, SEGMENTS, TILE
                    ), 0)  # fmt: skip
                    enough = reached >= goal
                    low, end = tl.where(enough, middle, low), tl.where(enough, end, middle)
                    before = tl.where(enough, before, reached)
                least = value_of(low, shift)
                each = mass(least, peak, log2_slope, scale)
                missing = tl.where(each > 0, (goal - before + each - 1) // tl.maximum(each, 1), vocab_size)
                tied = count_segments(copy, length, counts, least, SEGMENTS, TILE).to(tl.int64)
                upto = tl.cumsum(tied, 0)
                full = tl.sum((upto < missing).to(tl.int32), 0)  # segments whose ties are all kept
                begin = full * length
                missing -= tl.sum(tl.where(part < full, tied, 0), 0)
            last = _last_of_ties(logits, scores, is_penalised, vocab_size, begin, least, missing, BESIDE, BLOCK)
        floor = peak + log_floor * temperature
        if floor > least:
            least = floor
            last = vocab_size + tl.zeros((), tl.int32)
    tl.store(leasts + row, least)
    tl.store(lasts + row, last)


LAUNCHES = {  # in order: whether a segment has a program or a row, the tile as a share of BLOCK, and how it is compiled
    _find_peaks: (True, 1, {"num_warps": 8}),
    _bound_rows: (False, 1, {"num_warps": 16, "maxnreg": 64}),  # so that an SM has room for two rows
    _walk_segments: (True, 0.5, {"num_warps": 8}),
    _settle_rows: (False, 1, {"num_warps": 16, "maxnreg": 64}),
}
