"""Draws a token a row from softmax(logits / temperature), filtered or not; the logits are read once, in their own
dtype.

It uses the Gumbel-max trick: the argmax of logit / temperature + noise, with independent Gumbel(0, 1) noise
-log(-log(1 - u)), where u is the number of philox.uniform. 1 - u is as uniform as u, and the noise's long upper tail
comes from u near 0, where u has the finest steps. Segments, their merge, and the token of a row with temperature 0 are
those of argmax.py.

Shapes: R rows, V vocab.
The integers are the same everywhere. The noise is a function of them and of the device's logarithm, within 1e-5 of the
exact noise; for u below 1/16, where 1 - u keeps few bits of u, -log(1 - u) is a series. So a tie within that error may
fall one way on a CPU and another on a GPU. It falls the same way in all rows, batches, segments and ranks, in a graph
and eagerly, since products and sums are not fused, so that every variant of the kernel rounds alike.
Tried, compiled for sm_90 only: 16-byte loads, no exchange between the layouts of words and logits, about 115
instructions a logit, half of them for the two logarithms. Not tried: other segments than argmax's.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.argmax import argmax_rows_reference, hand_in, over_segments, reads_in_place
from penstock.engine.kernels.filter import Limits
from penstock.engine.kernels.penalty import Penalised, load_score
from penstock.engine.kernels.philox import BELOW_ONE, uniform
from penstock.parallel.triton_door import tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}


class Noise(NamedTuple):
    """The values on which each row's draw depends, beside its logits."""

    temperatures: Tensor  # (R,) float32; a row with 0 takes the most likely token
    seeds: Tensor  # (R,) int64
    positions: Tensor  # (R,) int64


def draw_rows(
    logits: Tensor, vocab_size: int, noise: Noise, limits: Limits | None = None, penalised: Penalised | None = None
) -> Tensor:
    """Returns tokens (R,) int64 from the first vocab_size columns of logits (R, V or more) of any float dtype; those of
    rows that are `penalised` are read there; `limits` says which may be drawn. Ties go to the lowest id. A row with a
    NaN gives -1, which is no token."""
    run = _draw_rows_triton if reads_in_place(logits) else draw_rows_reference
    return run(logits, vocab_size, noise, limits, penalised)


def draw_rows_reference(
    logits: Tensor, vocab_size: int, noise: Noise, limits: Limits | None = None, penalised: Penalised | None = None
) -> Tensor:
    """Does the same in plain torch."""
    calls["reference"] += 1
    if penalised is not None:
        logits = penalised.over(logits[:, :vocab_size])
    temperatures = noise.temperatures[:, None]
    draws = temperatures > 0  # (R, 1)
    logits = logits[:, :vocab_size].float()  # (R, V)
    if limits is not None:
        logits = logits.masked_fill(~limits.keep(logits), -torch.inf)
    gumbel = uniform(noise.seeds, noise.positions, vocab_size).neg_().log1p_().neg_().log_().neg_()
    scores = torch.where(draws, logits / torch.where(draws, temperatures, 1.0) + gumbel, logits)
    return argmax_rows_reference(scores, vocab_size)


def _draw_rows_triton(
    logits: Tensor,
    vocab_size: int,
    noise: Noise,
    limits: Limits | None = None,
    penalised: Penalised | None = None,
    num_segments: int | None = None,
) -> Tensor:
    asks, scores = penalised or (None, None)
    others = {**noise._asdict(), **(limits or Limits(None, None))._asdict(), "penalised": asks}
    assert all(t is None or t.shape == logits.shape[:1] and t.is_contiguous() for t in others.values())
    calls["triton"] += 1
    others |= {"penalised_scores": scores, "LIMITED": limits is not None, "BESIDE": penalised is not None}
    others |= {"enable_fp_fusion": False}
    return over_segments(_draw_segment, logits, vocab_size, num_segments, **others)


LARGEST_U: tl.constexpr = tl.constexpr(BELOW_ONE)


@triton.jit
def _gumbel(word):
    """Makes noise of uint32 words."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), LARGEST_U)
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return -tl.log(tl.where(u < 1 / 16, series, -tl.log(1.0 - u)))


@triton.jit
def words_of(seed, position, first, COUNT: tl.constexpr):
    """Makes the words (COUNT,) of token ids first, first + 1, ...; `first` and COUNT are multiples of 4."""
    block = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + position.to(tl.uint32), zero, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COUNT,))


@triton.jit
def _draw_segment(
    logits, logits_row, vocab_size, length, values, ids, tokens, temperatures, seeds, positions,
    least, last, penalised, penalised_scores, LIMITED: tl.constexpr, BESIDE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, lane = segment * length, tl.arange(0, BLOCK)
    seed, position, temperature = tl.load(seeds + row), tl.load(positions + row), tl.load(temperatures + row)
    draws = temperature > 0
    logits, is_penalised = logits + row * logits_row, tl.zeros((), tl.int64)
    if BESIDE:
        penalised_scores += row * vocab_size
        is_penalised = tl.load(penalised + row)
    if LIMITED:
        least_kept, last_kept = tl.load(least + row), tl.load(last + row)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = begin + lane  # as in argmax
    nan = tl.zeros((BLOCK,), tl.int32)
    for offset in tl.range(0, length, BLOCK):
        column = begin + offset + lane
        scores = load_score(logits, penalised_scores, is_penalised, column, vocab_size, BESIDE)
        nan |= (scores != scores).to(tl.int32)
        may = draws
        if LIMITED:
            kept = (scores > least_kept) | ((scores == least_kept) & (column <= last_kept))
            scores = tl.where(kept, scores, float("-inf"))
            may = draws & (tl.max(kept.to(tl.int32), 0) > 0)  # noise is most of the work
        if may:
            scores = tl.div_rn(scores, temperature) + _gumbel(words_of(seed, position, begin + offset, BLOCK))
        higher = scores > best
        best, where = tl.where(higher, scores, best), tl.where(higher, column, where)
    hand_in(segment, row, best, where, nan, values, ids, tokens, SPLIT)
