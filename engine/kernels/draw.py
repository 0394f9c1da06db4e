"""A token a row from softmax(logits / temperature), the logits read once in their own dtype.

The Gumbel-max trick: argmax of logit / temperature + noise, with independent Gumbel(0, 1) noise -log(-log(1 - u)) and u
the number of philox.uniform. 1 - u is as uniform as u, and the noise's long upper tail comes from u near 0, where u is
fine. Segments and merge are argmax's, and so is the token of a row with temperature 0.

Shapes: R rows, V vocab.
The integers are the same everywhere. The noise is a function of them and of the device's logarithm: on a GPU lg2.approx,
within 1e-5 of the exact noise; -log1p(-u) is a series below 1/16, where 1 - u has few bits of u left. So a near tie within
that error may fall otherwise on a CPU than on a GPU, but never between rows, batches, segments, ranks, graph and eager:
products and sums are not fused, so that every variant of the kernel rounds alike.
"""

import torch
from torch import Tensor

from engine.kernels.argmax import argmax_rows_reference, over_segments
from engine.kernels.philox import BELOW_ONE, uniform

try:
    import triton
    import triton.language as tl

    from engine.kernels.argmax import hand_in
except ImportError:  # a CPU install has no triton
    triton = None

calls = {"reference": 0, "triton": 0}


def reads_in_place(logits: Tensor) -> bool:
    """Whether a kernel takes these logits; the reference makes temporaries of about 40 bytes a logit."""
    return logits.is_cuda and triton is not None and logits.dtype != torch.float64


def draw_rows(
    logits: Tensor, vocab_size: int, temperatures: Tensor, seeds: Tensor, positions: Tensor, nan_rows: Tensor
) -> Tensor:
    """Tokens (R,) int64 of the first vocab_size columns of logits (R, V or more) of any float dtype.

    temperatures (R,) float32, 0 where the most likely token is taken; seeds (R,) and positions (R,) int64 name the
    noise. Ties go to the lowest id. A row with a NaN gives 0 and adds 1 to nan_rows () int64.
    """
    run = _draw_rows_triton if reads_in_place(logits) else draw_rows_reference
    return run(logits, vocab_size, temperatures, seeds, positions, nan_rows)


def draw_rows_reference(
    logits: Tensor, vocab_size: int, temperatures: Tensor, seeds: Tensor, positions: Tensor, nan_rows: Tensor
) -> Tensor:
    """The same in plain torch."""
    calls["reference"] += 1
    draws = temperatures[:, None] > 0  # (R, 1)
    scores = logits[:, :vocab_size].float() / torch.where(draws, temperatures[:, None], 1.0)  # (R, V)
    noise = uniform(seeds, positions, vocab_size).neg_().log1p_().neg_().log_().neg_()
    return argmax_rows_reference(torch.where(draws, scores + noise, scores), vocab_size, nan_rows)


def _draw_rows_triton(
    logits: Tensor,
    vocab_size: int,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    nan_rows: Tensor,
    num_segments: int | None = None,
) -> Tensor:
    for tensor, dtype in ((temperatures, torch.float32), (seeds, torch.int64), (positions, torch.int64)):
        assert tensor.shape == logits.shape[:1] and tensor.dtype == dtype and tensor.is_contiguous()
    calls["triton"] += 1
    others = {"temperatures": temperatures, "seeds": seeds, "positions": positions, "enable_fp_fusion": False}
    return over_segments(_draw_segment, logits, vocab_size, nan_rows, num_segments, **others)


if triton is not None:
    LARGEST_U: tl.constexpr = tl.constexpr(BELOW_ONE)

    @triton.jit
    def _gumbel(word):
        """The noise of uint32 words."""
        u = tl.minimum((word.to(tl.float32) + 0.5) * (1.0 / 4294967296.0), LARGEST_U)
        series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u * (1 / 6))))))
        return -tl.log(tl.where(u < 1 / 16, series, -tl.log(1.0 - u)))

    @triton.jit
    def words_of(seed, position, first, COUNT: tl.constexpr):
        """The words (COUNT,) of token ids first, first + 1 ..; `first` and COUNT are multiples of 4."""
        block = (first // 4 + tl.arange(0, COUNT // 4)).to(tl.uint32)
        zero = block * 0
        w0, w1, w2, w3 = tl.philox(seed, block, zero + position.to(tl.uint32), zero, zero)
        return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COUNT,))

    @triton.jit
    def _draw_segment(
        logits, logits_row, vocab_size, length, values, ids, tokens, nan_rows, temperatures, seeds, positions,
        SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        segment, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        begin, lane = segment * length, tl.arange(0, BLOCK)
        seed, position, temperature = tl.load(seeds + row), tl.load(positions + row), tl.load(temperatures + row)
        draws = temperature > 0
        divisor = tl.where(draws, temperature, 1.0)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        where = begin + lane  # as in argmax
        nan = tl.zeros((BLOCK,), tl.int32)
        for offset in tl.range(0, length, BLOCK):
            column = begin + offset + lane
            scores = tl.load(logits + row * logits_row + column, mask=column < vocab_size, other=float("-inf"))
            scores = tl.div_rn(scores.to(tl.float32), divisor)
            if draws:
                scores += _gumbel(words_of(seed, position, begin + offset, BLOCK))
            higher = scores > best
            best, where = tl.where(higher, scores, best), tl.where(higher, column, where)
            nan |= (scores != scores).to(tl.int32)
        hand_in(segment, row, best, where, nan, values, ids, tokens, nan_rows, SPLIT)
