"""Top-k, top-p and min-p without a sort: finds the least logit of a row that is kept, and the last id among its ties.

transformers' TopK, TopP and MinPLogitsWarper, one after another, keep a prefix of a row's tokens in descending order,
ties by id. So two numbers describe what is kept, and the draw applies them while it reads. All ties with the k-th logit
are kept; of ties at the border of top_p those with lower ids are kept (transformers keeps any). Order and ties are
those of the logits: two float32 logits that only the division by the temperature makes equal are no tie.

Shapes: R rows, V vocab.
A row has one program in one launch; that of a row without filters ends at once. The others find a border by count, for
top-k, and one by mass, for top-p (border.py). Since mass depends on the device's exp (mass.py), a token within its
error of the border may be kept on one device and dropped on another. On one device it is treated alike in all rows,
batches and ranks, in a graph and eagerly.
Tried before: the value's bits from the top, two a launch (34 launches, eight sums of mass): 630 us for 256 rows.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.border import find_border, value_of
from penstock.engine.kernels.mass import mass, mass_scale, masses
from penstock.engine.kernels.penalty import Penalised, load_score
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
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


@triton.jit
def _last_of_ties(
    logits, scores, is_penalised, vocab_size, least, admitted, BESIDE: tl.constexpr, BLOCK: tl.constexpr
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
            found, goal, before = find_border(
                logits, scores, is_penalised, vocab_size, copy, shift, count, drop, least, peak, log2_slope, scale,
                BESIDE, True, BLOCK,
            )  # fmt: skip
            least = value_of(found, shift)
        if drop >= 0:
            tl.debug_barrier()
            found, goal, before = find_border(
                logits, scores, is_penalised, vocab_size, copy, shift, count * 0, drop, least, peak, log2_slope, scale,
                BESIDE, False, BLOCK,
            )  # fmt: skip
            least = value_of(found, shift)
            each = mass(least, peak, log2_slope, scale)
            admitted = tl.where(each > 0, (goal - before + each - 1) // tl.maximum(each, 1), vocab_size)
            last = _last_of_ties(logits, scores, is_penalised, vocab_size, least, admitted, BESIDE, BLOCK)
        floor = peak + log_floor * temperature
        if floor > least:
            least = floor
            last = vocab_size + tl.zeros((), tl.int32)
    tl.store(leasts + row, least)
    tl.store(lasts + row, last)
