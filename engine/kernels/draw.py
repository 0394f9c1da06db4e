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
Noise is most of the work: of 115 instructions a logit more than half are for the two logarithms. So they are taken only
in a block of which a logit may win: one whose bound, in a few instructions, is not below the best score so far by more
than all errors. That changes no token, and leaves one block in eight.
Tried before: all noise, in argmax's cut, 124 us more than argmax for 256 rows.
"""

from typing import NamedTuple

import torch
from penstock.engine.kernels.argmax import (
    Cut,
    Owners,
    argmax_rows_reference,
    end_of_segment,
    find_largest,
    hand_in,
    over_segments,
    reads_in_place,
)
from penstock.engine.kernels.filter import Limits
from penstock.engine.kernels.penalty import Penalised, load_score
from penstock.engine.kernels.philox import BELOW_ONE, uniform
from penstock.parallel.triton_door import tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
CUT = Cut(256, 1, 32 * 132)  # a warp waits for no other, and leaves out blocks by itself


class Noise(NamedTuple):
    """The values on which each row's draw depends, beside its logits."""

    temperatures: Tensor  # (R,) float32; a row with 0 takes the most likely token
    seeds: Tensor  # (R,) int64
    positions: Tensor  # (R,) int64


def draw_rows(
    logits: Tensor,
    vocab_size: int,
    noise: Noise,
    limits: Limits | None = None,
    penalised: Penalised | None = None,
    owners: Owners | None = None,
) -> Tensor:
    """Returns tokens (R,) int64 from the first vocab_size columns of logits (R, V or more) of any float dtype; those of
    rows that are `penalised` are read there; `limits` says which may be drawn. Ties go to the lowest id. A row with a
    NaN gives -1, which is no token."""
    run = _draw_rows_triton if reads_in_place(logits) else draw_rows_reference
    return run(logits, vocab_size, noise, limits, penalised, owners)


def draw_rows_reference(
    logits: Tensor,
    vocab_size: int,
    noise: Noise,
    limits: Limits | None = None,
    penalised: Penalised | None = None,
    owners: Owners | None = None,
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
    return argmax_rows_reference(scores, vocab_size, owners)


def _draw_rows_triton(
    logits: Tensor,
    vocab_size: int,
    noise: Noise,
    limits: Limits | None = None,
    penalised: Penalised | None = None,
    owners: Owners | None = None,
    num_segments: int | None = None,
) -> Tensor:
    asks, scores = penalised or (None, None)
    others = {**noise._asdict(), **(limits or Limits(None, None))._asdict(), "penalised": asks}
    assert all(t is None or t.shape == logits.shape[:1] and t.is_contiguous() for t in others.values())
    calls["triton"] += 1
    others |= {"penalised_scores": scores, "LIMITED": limits is not None, "BESIDE": penalised is not None}
    others |= {"enable_fp_fusion": False, "maxnreg": 64}
    return over_segments(_draw_segment, CUT, logits, vocab_size, owners, num_segments, **others)


LARGEST_U: tl.constexpr = tl.constexpr(BELOW_ONE)
BOUND_ERROR: tl.constexpr = tl.constexpr(2.0**-16)  # of a bound, of its size and 64: a thousand roundings or more
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _gumbel(word):
    """Makes noise of uint32 words."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), LARGEST_U)
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
    return -tl.log(tl.where(u < 1 / 16, series, -tl.log(1.0 - u)))


@triton.jit
def _most_noise(word):
    """Bounds the noise of uint32 words from above, in bits: by -log2(u), since -log(1 - u) >= u, and the logarithm by
    the bits of the float, whose exponent and fraction are less."""
    bits = (word.to(tl.float32) + 0.5).to(tl.int32, bitcast=True)
    return 159.0 - bits.to(tl.float32) * (1.0 / 8388608.0)  # the exponent's bias, and 32 since u is word / 2**32


@triton.jit
def words_of(seed, position, first, COUNT: tl.constexpr):
    """Makes the words (COUNT,) of token ids first, first + 1, ...; `first` and COUNT are multiples of 4."""
    block = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(seed, block, zero + position.to(tl.uint32), zero, zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COUNT,))


@triton.jit
def _any(which):
    return tl.max(which.to(tl.int32), 0) > 0


@triton.jit
def _draw_from(
    logits, scores, is_penalised, begin, end, vocab_size, temperature, seed, position, least, last,
    LIMITED: tl.constexpr, BESIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Finds the best of each lane of a segment after the noise, where it is, and whether there is a NaN."""
    lane, slope = tl.arange(0, BLOCK), _LOG2_E / temperature
    best, floor = tl.full((BLOCK,), float("-inf"), tl.float32), tl.full((), float("-inf"), tl.float32)
    where = begin + lane  # as in argmax
    nan = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(begin, end, BLOCK):
        column = first + lane
        logit = load_score(logits, scores, is_penalised, column, vocab_size, float("-inf"), BESIDE)
        nan |= (logit != logit).to(tl.int32)
        may = True
        if LIMITED:
            kept = (logit > least) | ((logit == least) & (column <= last))
            logit = tl.where(kept, logit, float("-inf"))
            may = _any(kept)
        if may:
            words = words_of(seed, position, first, BLOCK)
            if _any(~(logit * slope + _most_noise(words) < floor)):
                score = tl.div_rn(logit, temperature) + _gumbel(words)
                higher = score > best
                best, where = tl.where(higher, score, best), tl.where(higher, column, where)
                top = tl.max(best, 0) * _LOG2_E
                floor = top - (tl.abs(top) + 64) * BOUND_ERROR
    return best, where, nan


@triton.jit
def _draw_segment(
    logits, logits_row, vocab_size, length, rows, nobody, values, ids, tokens, temperatures, seeds, positions,
    least, last, penalised, penalised_scores, LIMITED: tl.constexpr, BESIDE: tl.constexpr, OWNED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = segment * length
    end = end_of_segment(row, begin, length, rows, nobody, OWNED)
    logits, is_penalised = logits + row * logits_row, tl.zeros((), tl.int64)
    if BESIDE:
        penalised_scores += row * vocab_size
        is_penalised = tl.load(penalised + row)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        least_kept, last_kept = tl.full((), float("-inf"), tl.float32), vocab_size
        if LIMITED:
            least_kept, last_kept = tl.load(least + row), tl.load(last + row)
        best, where, nan = _draw_from(
            logits, penalised_scores, is_penalised, begin, end, vocab_size, temperature, tl.load(seeds + row),
            tl.load(positions + row), least_kept, last_kept, LIMITED, BESIDE, BLOCK,
        )  # fmt: skip
    else:
        best, where, nan = find_largest(logits, penalised_scores, is_penalised, begin, end, vocab_size, BESIDE, BLOCK)
    hand_in(segment, row, best, where, nan, values, ids, tokens, SPLIT)
