"""Linear of few tokens over a weight as it is stored: out = x @ dequantised(w).T (+ bias), without the floats between.

Shapes: T tokens of x, at most MOST_TOKENS; N output columns, D input width.
At a few tokens the time of a linear is that of reading its weight, so 2.6 to 8.5 bits are read where floats would be
written and read again. Codes are multiplied and added in fp32, eight at a time, then their scale; the sum is rounded
once. So the result is not that of `linear` over bf16 floats, which were rounded before: which of both runs is the same
wherever the weight lies (model/weight_formats.py).

A program owns `rows` rows and walks D in turns. A thread has some pairs of words of codes (block_words.py) of each of
the rows in a turn: all tensors are (rows, pairs), so that none changes its layout in the loop, and nothing goes through
shared memory. If loads do not wait for each other, instructions bind: a code becomes a float in two of them, eight bf16
values of x are one load, and a load of x serves all rows. The compiler would save registers by putting loads between
the sums, one after the other's use. So a barrier stands behind a turn's loads of what is stored: they are all under way
at once, and other warps compute meanwhile. Those of the first turn are under way before the kernel that makes x has
ended. No partial sums in memory, no atomics: the order of sums depends on the shape alone.

A float is a power of two more than its code. Where x is bf16 these are not subtracted of each code, but their product
with the sum of x is, once for all rows: the error is 16 to 60 times that of fp32, a thousandth of that of bf16.
"""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from penstock.engine.kernels.block_parts import split_parts
from penstock.engine.kernels.block_values import CHUNK_WEIGHTS, write_values
from penstock.engine.kernels.block_words import (
    WORDS,
    code_float,
    first_weight,
    further_bits,
    halves_of,
    load_pair,
    load_scales,
    set_bytes,
    set_scales,
    unit_scales,
    words_of,
)
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
MOST_TOKENS = 4


class Config(NamedTuple):
    """The shape of a program: its rows, its warps, and the pairs of words of each row that a thread has in a turn."""

    rows: int
    num_warps: int
    pairs: int


# Measured on an H200 over the linears of an 8B one after another, GB/s of Q8_0 and Q4_0 at one token: four warps of one
# pair 3366 and 2375, two warps of two pairs 3175 and 2332, one warp of two pairs 2836 and 2036.
CONFIG = Config(4, 4, 1)


class StoredRun(NamedTuple):
    """Consecutive rows of a weight, from `first_row` on, as they are stored in blocks of `kind`. This linear is for
    passes of up to `few_tokens`."""

    kind: str
    first_row: int
    data: Tensor  # (rows, bytes of a row) uint8, in parts of all rows
    few_tokens: int = MOST_TOKENS

    def columns(self, bias: Tensor | None, out: Tensor) -> tuple[Tensor | None, Tensor]:
        """The part of a bias (N,), if there is one, and of a result (T, N) that is these rows'."""
        stop = self.first_row + len(self.data)
        return None if bias is None else bias[self.first_row : stop], out[:, self.first_row : stop]


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

    @property
    def form(self) -> Hashable:
        """All of it but what the memory holds."""
        runs = tuple(run._replace(data=run.data.shape) for run in self.runs)
        return self._replace(floats=self.floats.shape, runs=runs)


def stored_linear(x: Tensor, run: StoredRun, bias: Tensor | None, out: Tensor) -> None:
    """Computes the columns of out (T, N) = x (T, D) @ w.T + bias (N,) that are those of a run of w (N, D), all of one
    float dtype."""
    assert len(x) <= MOST_TOKENS
    multiply = _stored_linear_triton if x.is_cuda else stored_linear_reference
    multiply(x, run.kind, run.data, *run.columns(bias, out))


def stored_linear_reference(x: Tensor, kind: str, data: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Does the same in plain torch: floats of some rows at a time."""
    calls["reference"] += 1
    multiply_floats(x, kind, data, bias, out, torch.float32)


def multiply_floats(x: Tensor, kind: str, data: Tensor, bias: Tensor | None, out: Tensor, dtype: torch.dtype) -> None:
    """Computes out (T, N) = x (T, D) @ w.T + bias (N,) in fp32 of a run's w (N, D), rounded to `dtype`: of some rows at
    a time."""
    width, row_blocks = x.shape[1], x.shape[1] // BY_NAME[kind].block
    step = max(1, 16 * CHUNK_WEIGHTS // width)
    for first in range(0, len(data), step):
        stop = min(first + step, len(data))
        floats = torch.empty(stop - first, width, dtype=dtype, device=x.device)
        write_values(kind, [part[first * row_blocks : stop * row_blocks] for part in split_parts(kind, data)], floats)
        sums = x.float() @ floats.float().t()
        if bias is not None:
            sums += bias[first:stop].float()
        out[:, first:stop] = sums


def _stored_linear_triton(
    x: Tensor, kind: str, data: Tensor, bias: Tensor | None, out: Tensor, shape: Config = CONFIG
) -> None:
    require_triton("stored_linear on a GPU", "device='cpu'")
    layout, words = BY_NAME[kind], WORDS[kind]
    (num_tokens, width), num_rows = x.shape, len(data)
    assert x.stride(1) == out.stride(1) == 1, "stored_linear: the last dim of x and out must have stride 1"
    assert data.is_contiguous(), "stored_linear: strides: stored rows have no gaps"
    assert data.data_ptr() % 16 == 0, "stored_linear: stored rows begin at 16 bytes"
    assert data.shape[1] == layout.row_bytes(width) and out.shape == (num_tokens, num_rows)
    calls["triton"] += 1
    rows, num_warps, pairs = shape
    row_pairs = width // layout.block * words.units * words.lanes // 2
    eights = x.dtype == torch.bfloat16 and x.data_ptr() % 16 == 0 and (num_tokens == 1 or x.stride(0) % 8 == 0)
    _stored_gemv[(triton.cdiv(num_rows, rows),)](
        *(x, data, bias, out, x.stride(0), out.stride(0), num_rows, row_pairs, 0, kind, layout.block, *words),
        **{"BIAS": bias is not None, "TOKENS": num_tokens},
        **{"EXACT": x.dtype != torch.bfloat16, "EIGHTS": eights},
        **{"ROWS": rows, "PAIRS": 32 * num_warps * pairs, **options(x.device)},
        num_warps=num_warps,
    )


@triton.jit
def _stored_gemv(
    x, data, bias, out, x_row, out_row, num_rows, row_pairs, zero,
    KIND: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, SETS: tl.constexpr,
    STEP: tl.constexpr, BITS: tl.constexpr, HIGHER: tl.constexpr, LESS: tl.constexpr, MINIMUM: tl.constexpr,
    BIAS: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr, EIGHTS: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    BLOCK_PAIRS: tl.constexpr = UNITS * LANES // 2
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, num_rows - 1).to(tl.int64)[:, None]  # (ROWS, 1)
    row_blocks = row_pairs // BLOCK_PAIRS
    num_blocks, first_block, codes = num_rows * row_blocks, row * row_blocks, data + row * row_pairs * 8
    sums_0 = tl.zeros((ROWS, PAIRS), tl.float32)
    sums_1, sums_2, sums_3 = sums_0, sums_0, sums_0
    for first in range(0, row_pairs, PAIRS):
        at = first + tl.arange(0, PAIRS)[None, :]  # (1, PAIRS)
        inside = at < row_pairs
        at = tl.minimum(at, row_pairs - 1)  # behind the end of a row, where x is 0, its last pair is read once more
        block, pair = at // BLOCK_PAIRS, at % BLOCK_PAIRS
        unit, lane = pair // (LANES // 2), pair % (LANES // 2) * 2
        words = load_pair(codes + at * 8)
        bits = further_bits(data, num_blocks, first_block, block, unit, lane, KIND)
        halves, first_scales, second_scales, third_scales = load_scales(
            data, num_blocks, first_block, block, unit, KIND
        )
        if first == 0:
            wait_for_inputs(OVERLAPS)  # no kernel has written what is stored
        tl.debug_barrier()  # without it loads are put between the sums, and wait for each other
        word, next_word = words_of(words)
        word_bits, next_bits = words_of(bits)
        d, d_least = halves_of(halves)
        packed, further = unit_scales(first_scales, second_scales, third_scales, unit, KIND)
        column = x + (block * BLOCK + first_weight(unit, KIND) + 4 * lane)
        for SET in tl.static_range(SETS):
            scale, least = set_scales(d, d_least, packed, further, SET, KIND)
            more = 2.0 ** (8 - SET * HIGHER) + LESS
            a = _floats(set_bytes(word, word_bits, unit, lane, SET, KIND), zero, SET * HIGHER, BITS, more, EXACT)
            b = _floats(
                set_bytes(next_word, next_bits, unit, lane + 1, SET, KIND), zero, SET * HIGHER, BITS, more, EXACT
            )
            here = column + SET * STEP
            sums_0 += _products(a, b, scale, least, here, inside, more, MINIMUM, EXACT, EIGHTS)
            if TOKENS > 1:
                sums_1 += _products(a, b, scale, least, here + x_row, inside, more, MINIMUM, EXACT, EIGHTS)
            if TOKENS > 2:
                sums_2 += _products(a, b, scale, least, here + 2 * x_row, inside, more, MINIMUM, EXACT, EIGHTS)
            if TOKENS > 3:
                sums_3 += _products(a, b, scale, least, here + 3 * x_row, inside, more, MINIMUM, EXACT, EIGHTS)
    added = tl.zeros((ROWS,), tl.float32)
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
def _floats(codes, zero, SHIFT: tl.constexpr, BITS: tl.constexpr, more, EXACT: tl.constexpr):
    """The four codes of a word as fp32: EXACT, or `more` than they are."""
    a, b = code_float(codes, zero, 0, SHIFT, BITS), code_float(codes, zero, 1, SHIFT, BITS)
    c, d = code_float(codes, zero, 2, SHIFT, BITS), code_float(codes, zero, 3, SHIFT, BITS)
    if EXACT:
        a, b, c, d = a - more, b - more, c - more, d - more
    return a, b, c, d


@triton.jit
def _products(
    weights, next_weights, scale, least, x, inside, more,
    MINIMUM: tl.constexpr, EXACT: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """The sum of eight weights times their values of x."""
    a, b, c, d = weights
    e, f, g, h = next_weights
    x_a, x_b, x_c, x_d, x_e, x_f, x_g, x_h = _eight_values(x, inside, EIGHTS)
    all_x = ((x_a + x_b) + (x_c + x_d)) + ((x_e + x_f) + (x_g + x_h))
    products = a * x_a if EXACT else a * x_a - more * all_x
    products = d * x_d + (c * x_c + (b * x_b + products))
    products = scale * (h * x_h + (g * x_g + (f * x_f + (e * x_e + products))))
    return products + least * all_x if MINIMUM else products


@triton.jit
def _eight_values(x, inside, EIGHTS: tl.constexpr):
    """Eight consecutive values of x as fp32. With EIGHTS they are bf16 at 16 bytes, and one load."""
    if EIGHTS:
        pointers = x.to(tl.pointer_type(tl.int64))[:, :, None] + tl.arange(0, 2)[None, None, :]
        pointers = tl.max_contiguous(tl.multiple_of(pointers, [1, 1, 16]), [1, 1, 2])
        low, high = tl.split(tl.load(pointers, mask=inside[:, :, None], other=0))
        x_a, x_b, x_c, x_d = _four_values(low)
        x_e, x_f, x_g, x_h = _four_values(high)
    else:
        x_a, x_b = _value(x, inside), _value(x + 1, inside)
        x_c, x_d = _value(x + 2, inside), _value(x + 3, inside)
        x_e, x_f = _value(x + 4, inside), _value(x + 5, inside)
        x_g, x_h = _value(x + 6, inside), _value(x + 7, inside)
    return x_a, x_b, x_c, x_d, x_e, x_f, x_g, x_h


@triton.jit
def _four_values(pair):
    """The four bf16 of an int64 as fp32."""
    low, high = words_of(pair)
    x_a, x_b = (low << 16).to(tl.float32, bitcast=True), (low & -65536).to(tl.float32, bitcast=True)
    x_c, x_d = (high << 16).to(tl.float32, bitcast=True), (high & -65536).to(tl.float32, bitcast=True)
    return x_a, x_b, x_c, x_d


@triton.jit
def _value(x, inside):
    return tl.load(x, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_sums(out, n, num_rows, sums, added):
    result = tl.sum(sums, 1) + added
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < num_rows)
