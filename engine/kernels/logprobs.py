"""Log probabilities of the rows that ask for them, in one launch: of the sampled token, its rank, and the most likely
tokens. Their bits depend on nothing but their row.

R rows, V vocab, N most likely tokens. Sums are taken in integers, since the bits of a float sum depend on the shape
of the batch, and ties go to the lower id, which torch.argmax and torch.topk do not promise on CUDA.

A row has one program, which reads it twice; that of a row that asks for nothing ends at once. First each of its lanes
finds its largest logit. No more than N tokens can be above the N-th largest of these, but for those in the same lanes,
so the second walk, which adds up the mass, picks a few tokens from the row: those above that limit, and the first of
those equal to it. The N largest of them are taken one by one.
"""

from typing import NamedTuple

import numpy as np
import torch
from penstock.engine.kernels.mass import mass, mass_scale, masses
from penstock.engine.kernels.packed_scores import NO_ID
from penstock.engine.kernels.philox import WORD
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
BLOCK = 4096


class Logprobs(NamedTuple):
    """Log probabilities as vLLM gives them: of the raw logits, before penalties and temperature.

    N is at least what any row of the batch asked for, or V. What a row has beyond that means nothing, nor do rows that
    asked for none.
    """

    sampled_logprob: Tensor  # (R,) float32
    sampled_rank: Tensor  # (R,) int32, from 1: how many tokens are at least as likely
    top_logprobs: Tensor  # (R, N) float32, descending
    top_ids: Tensor  # (R, N) int32, ties by the lower id

    @staticmethod
    def of(packed: Tensor) -> "Logprobs":
        """The views of `packed` (R, packed_width(N)) int32, one memory: so they travel in one copy."""
        num_top, floats = (packed.shape[1] - 2) // 2, packed.view(torch.float32)
        return Logprobs(floats[:, 0], packed[:, 1], floats[:, 2 : 2 + num_top], packed[:, 2 + num_top :])

    def at(self, index: int, num_top: int) -> tuple[float, int, list[tuple[int, float]]]:
        """The values of one row on the host: the sampled token's logprob and rank, and the `num_top` first (id,
        logprob)."""
        logprob, rank, top_logprobs, top_ids = (field.numpy()[index] for field in self)  # a tenth of torch's time
        return float(logprob), int(rank), list(zip(top_ids[:num_top].tolist(), top_logprobs[:num_top].tolist()))

    def packed(self, rows: slice, num_top: int) -> bytes:
        """The same of many rows, which packed_scores.unpack reads."""
        logprobs, ranks, top_logprobs, top_ids = (field.numpy()[rows] for field in self)
        made = np.full((len(ranks), packed_width(num_top)), NO_ID, np.int32)
        made[:, 0], made[:, 1] = logprobs.view(np.int32), ranks
        for start, top in ((2, top_logprobs.view(np.int32)), (2 + num_top, top_ids)):
            made[:, start : start + top.shape[1]][:, :num_top] = top[:, :num_top]
        return made.tobytes()


def packed_width(num_top: int) -> int:
    """Values of a row of Logprobs."""
    return 2 + 2 * num_top


def score_rows(logits: Tensor, vocab_size: int, tokens: Tensor, wanted: Tensor, packed: Tensor) -> None:
    """Writes the Logprobs of tokens (R,) int64 under the first vocab_size columns of logits (R, V or more), of any
    float dtype, to `packed` (R, packed_width(N)) int32. `wanted` (R,) int64 is how many of the most likely tokens each
    row wants, at most N; -1: nothing, and none of its memory is written. A token -1 is scored as token 0."""
    takes = logits.is_cuda and HAS_TRITON and logits.dtype != torch.float64
    run = _score_rows_triton if takes else score_rows_reference
    run(logits, vocab_size, tokens, wanted, packed)


def score_rows_reference(logits: Tensor, vocab_size: int, tokens: Tensor, wanted: Tensor, packed: Tensor) -> None:
    """Does the same in plain torch; it writes all rows, and all N of them."""
    calls["reference"] += 1
    raw, out = logits[:, :vocab_size].float(), Logprobs.of(packed)
    num_top = min(out.top_ids.shape[1], vocab_size)
    peak = raw.amax(-1, keepdim=True)
    total = masses(raw, peak).sum(-1, keepdim=True).double() / mass_scale(vocab_size)
    sampled = raw.gather(-1, tokens.clamp(min=0)[:, None])  # (R, 1)
    bits = (raw + 0.0).view(torch.int32)  # without -0.0, which equals 0.0 but has other bits
    ordered = bits ^ (bits >> 31 & 0x7FFFFFFF)  # integers in the order of the floats
    ids = torch.arange(vocab_size, device=raw.device)
    keys = (ordered.long() << 32) | (WORD - ids)  # (R, V), all different: topk has no ties to break
    top_ids = WORD - (keys.topk(num_top, dim=-1).values & WORD)  # (R, N)
    both = torch.cat((sampled, raw.gather(-1, top_ids)), dim=-1) - peak
    values = (both.double() - total.log()).float()  # (R, 1 + N)
    out.sampled_logprob.copy_(values[:, 0])
    out.sampled_rank.copy_((raw >= sampled).sum(-1))
    out.top_logprobs[:, :num_top].copy_(values[:, 1:])
    out.top_ids[:, :num_top].copy_(top_ids)


def _score_rows_triton(logits: Tensor, vocab_size: int, tokens: Tensor, wanted: Tensor, packed: Tensor) -> None:
    num_rows, most = len(logits), Logprobs.of(packed).top_ids.shape[1]
    assert logits.stride(1) == 1, "the last dim of the logits must have stride 1"
    assert 1 <= vocab_size <= logits.shape[1] and packed.is_contiguous()
    assert tokens.shape == wanted.shape == (num_rows,) and tokens.is_contiguous() and wanted.is_contiguous()
    calls["triton"] += 1
    if not num_rows:
        return
    capacity = triton.next_power_of_2(max(most, 1) * (1 + triton.cdiv(vocab_size, BLOCK)))
    picked = torch.empty(num_rows, capacity, dtype=torch.int64, device=logits.device)
    _score[(num_rows,)](
        *(logits, logits.stride(0), vocab_size, mass_scale(vocab_size), tokens, wanted, packed, picked),
        *(most, capacity, BLOCK),
        num_warps=16,
        enable_fp_fusion=False,
    )


_WORD = tl.constexpr(WORD)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _ordered(value, column):
    """Makes int64 in the order of the floats, of equal ones in the order of falling columns; all are different."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (column.to(tl.int64) ^ _WORD)


@triton.jit
def _nth_largest(values, count):
    """Finds the largest of `values` when count - 1 of them are taken away; inf for none."""
    lane, largest = tl.arange(0, values.shape[0]), tl.full((), float("inf"), tl.float32)
    for _ in tl.range(0, count):
        largest = tl.max(values, 0)
        first = tl.min(tl.where(values == largest, lane, 0x7FFFFFFF), 0)
        values = tl.where(lane == first, float("-inf"), values)
    return largest


@triton.jit
def _score(
    logits, logits_row, vocab_size, scale, tokens, wanted, packed, picked,
    MOST: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    num_top = tl.minimum(tl.load(wanted + row), vocab_size).to(tl.int32)
    if num_top >= 0:
        logits, picked, packed = logits + row * logits_row, picked + row * CAPACITY, packed + row * (2 + 2 * MOST)
        lane = tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        for begin in tl.range(0, vocab_size, BLOCK):
            column = begin + lane
            logit = tl.load(logits + column, mask=column < vocab_size, other=float("-inf")).to(tl.float32)
            best = tl.maximum(best, logit)
        peak, limit = tl.max(best, 0), _nth_largest(best, num_top)
        sampled = tl.load(logits + tl.maximum(tl.load(tokens + row), 0)).to(tl.float32)
        total, rank = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int32)
        num_above, num_equal = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        for begin in tl.range(0, vocab_size, BLOCK):
            column = begin + lane
            inside = column < vocab_size
            logit = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
            total += tl.where(inside, mass(logit, peak, _LOG2_E, scale), 0)
            rank += (inside & (logit >= sampled)).to(tl.int32)
            above, equal = (inside & (logit > limit)).to(tl.int32), (inside & (logit == limit)).to(tl.int32)
            if tl.max(above | equal, 0) > 0:  # those above lie behind the first MOST of those that are equal
                key = _ordered(logit, column)
                entry = MOST + num_above + tl.cumsum(above, 0) - above
                tl.store(picked + entry, key, mask=(above > 0) & (entry < CAPACITY))  # a NaN's row may have too many
                entry = num_equal + tl.cumsum(equal, 0) - equal
                tl.store(picked + entry, key, mask=(equal > 0) & (entry < MOST))
                num_above += tl.sum(above, 0)
                num_equal += tl.sum(equal, 0)
        tl.debug_barrier()  # what some threads stored others load
        log_total = tl.log(tl.sum(total, 0).to(tl.float64) / scale)
        tl.store(packed.to(tl.pointer_type(tl.float32)), ((sampled - peak).to(tl.float64) - log_total).to(tl.float32))
        tl.store(packed + 1, tl.sum(rank, 0))
        entry = tl.arange(0, CAPACITY)
        there = (entry < tl.minimum(num_equal, MOST)) | ((entry >= MOST) & (entry < MOST + num_above))
        lowest = tl.full((), -(2**63), tl.int64)
        keys = tl.load(picked + entry, mask=there, other=lowest)
        for index in tl.range(0, num_top):
            key = tl.max(keys, 0)
            keys = tl.where(keys == key, lowest, keys)
            ordered = (key >> 32).to(tl.int32)
            value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            logprob = ((value - peak).to(tl.float64) - log_total).to(tl.float32)
            tl.store((packed + 2 + index).to(tl.pointer_type(tl.float32)), logprob)
            tl.store(packed + 2 + MOST + index, ((key & _WORD) ^ _WORD).to(tl.int32))
