"""Linear of few tokens over a weight as it is stored: out = x @ dequantised(w).T (+ bias), without the floats between.

Shapes: T tokens of x, at most MOST_TOKENS; N output columns, D input width.
At a few tokens the time of a linear is that of reading its weight, so 4.5 or 8.5 bits are read where floats would be
written and read again. Codes are multiplied and added in fp32, a word of codes at a time, then its scale; the sum is
rounded once. So the result is not that of `linear` over bf16 floats, which were rounded before: which of both runs is
the same wherever the weight lies (model/weight_formats.py).

A program owns BLOCK_N rows and walks D in blocks of 32. A thread's loads are words of two bytes, which is all that
blocks of 18 or 34 bytes are aligned to; neighbours read neighbouring words, and values of x fit them without an
exchange, each loaded once for BLOCK_N rows. No partial sums in memory, no atomics. Not tried on a GPU yet: other
numbers of rows, words and warps. Layouts of larger blocks (the K-quants) are not here: bytes read one by one, with six
bits of scale for each group, take about as many instructions as dequantising.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from penstock.engine.kernels.block_values import CHUNK_WEIGHTS, write_values
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
MOST_TOKENS = 4
WORDS = {"Q8_0": 16, "Q4_0": 8, "Q4_1": 8}  # of two bytes of codes in a block of 32 weights
BLOCK_N, WALK_WORDS, NUM_WARPS = 4, 256, 4


class StoredRun(NamedTuple):
    """Consecutive rows of a weight, from `first_row` on, as they are stored in blocks of `kind`."""

    kind: str
    first_row: int
    data: Tensor  # (rows, bytes of a row) uint8


class StoredMatrix(NamedTuple):
    """A weight (N, D) that is stored quantised: in passes of more than `as_stored` tokens `floats` (N, D) hold it, in
    all others `runs` do."""

    floats: Tensor
    runs: tuple[StoredRun, ...]
    as_stored: int

    @property
    def width(self) -> int:
        """D."""
        return self.floats.shape[1]


def stored_linear(x: Tensor, runs: Sequence[StoredRun], bias: Tensor | None, out: Tensor) -> None:
    """Computes out (T, N) = x (T, D) @ w.T + bias (N,), all of one float dtype; the runs make up w (N, D)."""
    assert len(x) <= MOST_TOKENS and sum(len(run.data) for run in runs) == out.shape[1]
    for kind, first, data in runs:
        stop = first + len(data)
        run = _stored_linear_triton if x.is_cuda else stored_linear_reference
        run(x, kind, data, None if bias is None else bias[first:stop], out[:, first:stop])


def stored_linear_reference(x: Tensor, kind: str, data: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Does the same for one run in plain torch: floats of some rows at a time."""
    calls["reference"] += 1
    width = x.shape[1]
    step = max(1, 16 * CHUNK_WEIGHTS // width)
    for first in range(0, len(data), step):
        part = data[first : first + step]
        floats = torch.empty(len(part), width, dtype=torch.float32, device=x.device)
        write_values(kind, part, floats)
        sums = x.float() @ floats.t()
        if bias is not None:
            sums += bias[first : first + step].float()
        out[:, first : first + step] = sums


def _stored_linear_triton(x: Tensor, kind: str, data: Tensor, bias: Tensor | None, out: Tensor) -> None:
    require_triton("stored_linear on a GPU", "device='cpu'")
    layout, words = BY_NAME[kind], WORDS[kind]
    (num_tokens, width), num_rows = x.shape, len(data)
    assert x.stride(1) == out.stride(1) == 1, "stored_linear: the last dim of x and out must have stride 1"
    assert data.is_contiguous(), "stored_linear: strides: stored rows have no gaps"
    assert data.shape[1] == layout.row_bytes(width) and out.shape == (num_tokens, num_rows)
    calls["triton"] += 1
    row_blocks, blocks = width // layout.block, WALK_WORDS // words
    turns = triton.cdiv(row_blocks, blocks)
    _stored_gemv[(triton.cdiv(num_rows, BLOCK_N),)](
        *(x, data.view(torch.int16), data.view(torch.float16), bias, out),
        *(x.stride(0), out.stride(0), num_rows, row_blocks),
        **{"KIND": kind, "BIAS": bias is not None, "TOKENS": num_tokens, "EVEN": row_blocks % blocks == 0},
        **{"BLOCK_N": BLOCK_N, "BLOCKS": blocks, "WORDS": words, "BLOCK_WORDS": layout.nbytes // 2},
        **{"UNROLL": next(factor for factor in (4, 2, 1) if turns % factor == 0)},
        **options(x.device),
        num_warps=NUM_WARPS,
    )


@triton.jit
def _stored_gemv(
    x, words, halves, bias, out, x_row, out_row, num_rows, row_blocks,
    KIND: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    UNROLL: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.minimum(n, num_rows - 1).to(tl.int64)[:, None, None] * row_blocks  # (BLOCK_N, 1, 1)
    word = tl.arange(0, WORDS)[None, None, :]
    sums_0 = tl.zeros((BLOCK_N, BLOCKS, WORDS), tl.float32)
    sums_1, sums_2, sums_3 = sums_0, sums_0, sums_0
    wait_for_inputs(OVERLAPS)
    for start in tl.range(0, row_blocks, BLOCKS, loop_unroll_factor=UNROLL):
        block = start + tl.arange(0, BLOCKS)[None, :, None]
        inside = None if EVEN else block < row_blocks
        at = (first + block) * BLOCK_WORDS
        scale = tl.load(halves + at, mask=inside, other=None if EVEN else 0.0).to(tl.float32)
        least = scale
        if KIND == "Q4_1":
            least = tl.load(halves + at + 1, mask=inside, other=None if EVEN else 0.0).to(tl.float32)
        codes = tl.load(words + at + (BLOCK_WORDS - WORDS) + word, mask=inside, other=None if EVEN else 0).to(tl.int32)
        column = x + block * 32 + 2 * word  # (1, BLOCKS, WORDS)
        sums_0 += _word_products(codes, scale, least, column, inside, KIND, EVEN)
        if TOKENS > 1:
            sums_1 += _word_products(codes, scale, least, column + x_row, inside, KIND, EVEN)
        if TOKENS > 2:
            sums_2 += _word_products(codes, scale, least, column + 2 * x_row, inside, KIND, EVEN)
        if TOKENS > 3:
            sums_3 += _word_products(codes, scale, least, column + 3 * x_row, inside, KIND, EVEN)
    added = tl.zeros((BLOCK_N,), tl.float32)
    if BIAS:
        added = tl.load(bias + n, mask=n < num_rows, other=0.0).to(tl.float32)
    _store_sums(out, n, num_rows, sums_0, added)
    if TOKENS > 1:
        _store_sums(out + out_row, n, num_rows, sums_1, added)
    if TOKENS > 2:
        _store_sums(out + 2 * out_row, n, num_rows, sums_2, added)
    if TOKENS > 3:
        _store_sums(out + 3 * out_row, n, num_rows, sums_3, added)


@triton.jit
def _word_products(codes, scale, least, x, inside, KIND: tl.constexpr, EVEN: tl.constexpr):
    """The sum of a word's weights times their values of x. A word of Q8_0 has weights 2w and 2w + 1; one of nibbles
    also those 16 behind."""
    x_0, x_1 = _value(x, inside, EVEN), _value(x + 1, inside, EVEN)
    if KIND == "Q8_0":
        return scale * ((codes << 24 >> 24).to(tl.float32) * x_0 + (codes << 16 >> 24).to(tl.float32) * x_1)
    else:
        x_16, x_17 = _value(x + 16, inside, EVEN), _value(x + 17, inside, EVEN)
        sums = (codes & 15).to(tl.float32) * x_0 + (codes >> 4 & 15).to(tl.float32) * x_16
        sums += (codes >> 8 & 15).to(tl.float32) * x_1 + (codes >> 12 & 15).to(tl.float32) * x_17
        of_x = x_0 + x_1 + x_16 + x_17
        return scale * sums + least * of_x if KIND == "Q4_1" else scale * (sums - 8.0 * of_x)


@triton.jit
def _value(x, inside, EVEN: tl.constexpr):
    return tl.load(x, mask=inside, other=None if EVEN else 0.0).to(tl.float32)


@triton.jit
def _store_sums(out, n, num_rows, sums, added):
    result = tl.sum(tl.sum(sums, 2), 1) + added
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < num_rows)
