"""Linear of few tokens over a weight as it is stored: out = x @ dequantised(w).T (+ bias), without the floats between.

Shapes: T tokens of x, at most MOST_TOKENS; N output columns, D input width.
At a few tokens the time of a linear is that of reading its weight, so 2.6 to 8.5 bits are read where floats would be
written and read again. Codes are multiplied and added in fp32, four at a time, then their scale; the sum is rounded
once. So the result is not that of `linear` over bf16 floats, which were rounded before: which of both runs is the same
wherever the weight lies (model/weight_formats.py).

A program owns BLOCK_N rows and walks D in units of words (block_words.py). What binds is not memory but instructions,
of which loads cost most. So codes become floats in one operation, four bf16 values of x are one load, and a load of x
serves BLOCK_N rows. All lanes lie along D, a word a thread, and scales are loaded for each word anew: so no tensor
changes its layout in the loop, which would go through shared memory. No partial sums in memory, no atomics.
On an H200 a variant with the same loads had of the read rate, at one token: Q4_0 0.23, Q8_0 0.35, Q4_K 0.16.
Codes converted by `to(float32)`, words of two bytes and single values of x had 0.15 and 0.30. Not tried: codes and
scales apart, at 16 bytes, so that one load has the codes of a block (blocks begin at even bytes only).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from penstock.engine.kernels.block_values import CHUNK_WEIGHTS, write_values
from penstock.engine.kernels.block_words import (
    WORDS,
    first_weight,
    further_bits,
    load_scales,
    load_word,
    set_scales,
    set_weights,
)
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
MOST_TOKENS = 4
Config = tuple[int, int, int, int]  # BLOCK_N, words of a row in a turn, num_warps, turns unrolled


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


def config(kind: str) -> Config:
    """Chooses the block shape for a format, as measured on an H200 for Q4_0, Q8_0 and Q4_K: more rows, words or warps
    only take registers. Unrolling the walk of the K-quants would take the compiler long."""
    return 2, 128, 1, 4 if BY_NAME[kind].block == 32 else 1


def _stored_linear_triton(
    x: Tensor, kind: str, data: Tensor, bias: Tensor | None, out: Tensor, blocks: Config | None = None
) -> None:
    require_triton("stored_linear on a GPU", "device='cpu'")
    layout, words = BY_NAME[kind], WORDS[kind]
    (num_tokens, width), num_rows = x.shape, len(data)
    assert x.stride(1) == out.stride(1) == 1, "stored_linear: the last dim of x and out must have stride 1"
    assert data.is_contiguous(), "stored_linear: strides: stored rows have no gaps"
    assert data.data_ptr() % 4 == 0, "stored_linear: stored rows begin at a word"
    assert data.shape[1] == layout.row_bytes(width) and out.shape == (num_tokens, num_rows)
    calls["triton"] += 1
    block_n, walk_words, num_warps, unroll = blocks or config(kind)
    row_units, units = width // layout.block * words.units, walk_words // words.lanes
    fours = x.dtype == torch.bfloat16 and x.data_ptr() % 8 == 0 and (num_tokens == 1 or x.stride(0) % 4 == 0)
    _stored_gemv[(triton.cdiv(num_rows, block_n),)](
        *(x, data.view(torch.int16), bias, out, x.stride(0), out.stride(0), num_rows, row_units),
        *(kind, layout.block, layout.nbytes, *words),
        **{"BIAS": bias is not None, "TOKENS": num_tokens, "EVEN": row_units % units == 0, "FOURS": fours},
        **{"BLOCK_N": block_n, "UNITS": units, "UNROLL": unroll, **options(x.device)},
        num_warps=num_warps,
    )


@triton.jit
def _stored_gemv(
    x, data, bias, out, x_row, out_row, num_rows, row_units,
    KIND: tl.constexpr, BLOCK: tl.constexpr, NBYTES: tl.constexpr, BLOCK_UNITS: tl.constexpr, LANES: tl.constexpr,
    SETS: tl.constexpr, STEP: tl.constexpr, START: tl.constexpr, LESS: tl.constexpr, MINIMUM: tl.constexpr,
    BIAS: tl.constexpr, TOKENS: tl.constexpr, EVEN: tl.constexpr, FOURS: tl.constexpr,
    BLOCK_N: tl.constexpr, UNITS: tl.constexpr, UNROLL: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = NBYTES // 2
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, num_rows - 1).to(tl.int64)[:, None, None]  # (BLOCK_N, 1, 1)
    rows = data + row * (row_units // BLOCK_UNITS * HALVES)
    lane = tl.arange(0, LANES)[None, None, :]
    sums_0 = tl.zeros((BLOCK_N, UNITS, LANES), tl.float32)
    sums_1, sums_2, sums_3 = sums_0, sums_0, sums_0
    wait_for_inputs(OVERLAPS)
    for first in tl.range(0, row_units, UNITS, loop_unroll_factor=UNROLL):
        at = first + tl.arange(0, UNITS)[None, :, None]  # (1, UNITS, 1)
        inside = None if EVEN else at < row_units
        block, unit = at // BLOCK_UNITS, at % BLOCK_UNITS
        start = block * HALVES + lane * 0  # of all words, so that scales have their layout
        word = load_word(rows, start + (START + unit * 2 * LANES) + 2 * lane, inside, NBYTES, EVEN)
        bits = further_bits(rows, start, unit, lane, inside, KIND, NBYTES, EVEN)
        d, d_least, packed, further = load_scales(rows, start, unit, inside, KIND, NBYTES, EVEN)
        column = x + (block * BLOCK + first_weight(unit, KIND) + 4 * lane)
        for SET in tl.static_range(SETS):
            scale, least = set_scales(d, d_least, packed, further, SET, KIND)
            weights = set_weights(word, bits, unit, lane, SET, KIND, LESS)
            here = column + SET * STEP
            sums_0 += _products(weights, scale, least, here, inside, MINIMUM, FOURS, EVEN)
            if TOKENS > 1:
                sums_1 += _products(weights, scale, least, here + x_row, inside, MINIMUM, FOURS, EVEN)
            if TOKENS > 2:
                sums_2 += _products(weights, scale, least, here + 2 * x_row, inside, MINIMUM, FOURS, EVEN)
            if TOKENS > 3:
                sums_3 += _products(weights, scale, least, here + 3 * x_row, inside, MINIMUM, FOURS, EVEN)
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
def _products(weights, scale, least, x, inside, MINIMUM: tl.constexpr, FOURS: tl.constexpr, EVEN: tl.constexpr):
    """The sum of four weights times their values of x."""
    a, b, c, d = weights
    x_a, x_b, x_c, x_d = _four_values(x, inside, FOURS, EVEN)
    products = scale * (a * x_a + b * x_b + c * x_c + d * x_d)
    return products + least * ((x_a + x_b) + (x_c + x_d)) if MINIMUM else products


@triton.jit
def _four_values(x, inside, FOURS: tl.constexpr, EVEN: tl.constexpr):
    """Four consecutive values of x as fp32. With FOURS they are bf16 at 8 bytes, and one load."""
    if FOURS:
        pointers = tl.max_contiguous(x.to(tl.pointer_type(tl.int64)), [1, 1, 1])
        packed = tl.load(pointers, mask=inside, other=None if EVEN else 0)
        low, high = packed.to(tl.int32), (packed >> 32).to(tl.int32)
        x_a, x_b = (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True)
        x_c, x_d = (high << 16).to(tl.float32, bitcast=True), (high & -65536).to(tl.float32, bitcast=True)
    else:
        x_a, x_b = _value(x, inside, EVEN), _value(x + 1, inside, EVEN)
        x_c, x_d = _value(x + 2, inside, EVEN), _value(x + 3, inside, EVEN)
    return x_a, x_b, x_c, x_d


@triton.jit
def _value(x, inside, EVEN: tl.constexpr):
    return tl.load(x, mask=inside, other=None if EVEN else 0.0).to(tl.float32)


@triton.jit
def _store_sums(out, n, num_rows, sums, added):
    result = tl.sum(tl.sum(sums, 2), 1) + added
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < num_rows)
