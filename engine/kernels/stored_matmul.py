"""Linear of some tokens over a weight as it is stored, through tensor cores: out = x @ dequantised(w).T (+ bias).

Shapes: T tokens of x, at most MOST_TOKENS; N output columns, D input width.
From a few tokens on `stored_linear` is bound by its products, and floats first write each weight to memory and read it
again in every pass. Here a program makes floats of a tile of the weight in registers, once for all tokens, and
multiplies them with the tokens' tile of x by `tl.dot`, with fp32 sums. They are the dequantiser's very floats: bf16,
rounded from the exact value's fp32. So the result is that of `linear` over floats but for the order of its sums.

A program owns `rows` rows of the weight and walks `words` words of codes (block_words.py) of each a turn, in pairs as
`stored_linear` does: a thread has the eight codes of a pair and set in order, which are eight neighbours of a row, and
what is stored of the next turn is under way meanwhile. The weight is the left operand of the product, since tensor
cores take 64 rows of it but 8 of the right one. Where the rows make few programs, several walk parts of D, and a second
kernel adds up their sums, in order. All of it depends on format, shape and tokens alone (matmul_tiles.py).
"""

import torch
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
from penstock.engine.kernels.matmul_tiles import TOKENS, Shape, row_pairs, tiles_of
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.engine.kernels.stored_linear import StoredRun, multiply_floats
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
MOST_TOKENS = TOKENS[-1]
MERGED_COLUMNS = 256  # of a program that adds up the sums of several


def stored_matmul(x: Tensor, run: StoredRun, bias: Tensor | None, out: Tensor) -> None:
    """Computes the columns of out (T, N) = x (T, D) @ w.T + bias (N,) that are those of a run of w (N, D), all bf16."""
    assert len(x) <= MOST_TOKENS
    multiply = _stored_matmul_triton if x.is_cuda else stored_matmul_reference
    multiply(x, run.kind, run.data, *run.columns(bias, out))


def stored_matmul_reference(x: Tensor, kind: str, data: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Does the same in plain torch: floats of some rows at a time."""
    calls["reference"] += 1
    multiply_floats(x, kind, data, bias, out, x.dtype)


def _stored_matmul_triton(
    x: Tensor, kind: str, data: Tensor, bias: Tensor | None, out: Tensor, shape: Shape | None = None
) -> None:
    require_triton("stored_matmul on a GPU", "device='cpu'")
    layout, (num_tokens, width), num_rows = BY_NAME[kind], x.shape, len(data)
    assert x.stride(1) == out.stride(1) == 1, "stored_matmul: the last dim of x and out must have stride 1"
    assert data.is_contiguous(), "stored_matmul: strides: stored rows have no gaps"
    assert data.data_ptr() % 16 == 0, "stored_matmul: stored rows begin at 16 bytes"
    assert data.shape[1] == layout.row_bytes(width) and out.shape == (num_tokens, num_rows)
    assert x.dtype == out.dtype == torch.bfloat16, "stored_matmul: x and out are bf16"
    calls["triton"] += 1
    tiles = tiles_of(kind, num_rows, width, num_tokens, shape)
    splits, parts, sums, sums_row = tiles.splits, None, out, out.stride(0)
    if splits > 1:
        sums = parts = torch.empty(splits, num_tokens, num_rows, dtype=torch.float32, device=x.device)
        sums_row = num_rows
    _multiply_stored[(tiles.num_tiles, splits)](
        *(x, data, bias, sums, x.stride(0), sums_row, num_tokens, num_rows, row_pairs(kind, width), tiles.pairs, 0),
        *(kind, layout.block, *WORDS[kind]),
        **{"BIAS": bias is not None and parts is None, "SPLITS": parts is not None},
        **{"EIGHTS": x.data_ptr() % 16 == 0 and (num_tokens == 1 or x.stride(0) % 8 == 0)},
        **{"DOT": tl.bfloat16 if x.is_cuda else tl.float32},  # the interpreter's tl.dot of bf16 is wrong
        **{"ROWS": tiles.shape.rows, "TOKENS": tiles.tokens, "PAIRS": tiles.shape.words // 2},
        **{"STAGES": tiles.shape.num_stages, **options(x.device)},
        num_warps=tiles.shape.num_warps,
    )
    if parts is not None:
        _merge_sums[(triton.cdiv(num_rows, MERGED_COLUMNS), num_tokens)](
            *(parts, bias, out, out.stride(0), num_tokens, num_rows, splits),
            **{"BIAS": bias is not None, "COLUMNS": MERGED_COLUMNS, **options(x.device)},
            num_warps=2,
        )


@triton.jit(do_not_specialize=("out_row", "num_tokens", "num_rows", "row_pairs", "own_pairs", "zero"))
def _multiply_stored(
    x, data, bias, out, x_row, out_row, num_tokens, num_rows, row_pairs, own_pairs, zero,
    KIND: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr, LANES: tl.constexpr, SETS: tl.constexpr,
    STEP: tl.constexpr, BITS: tl.constexpr, HIGHER: tl.constexpr, LESS: tl.constexpr, MINIMUM: tl.constexpr,
    BIAS: tl.constexpr, SPLITS: tl.constexpr, EIGHTS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    BLOCK_PAIRS: tl.constexpr = UNITS * LANES // 2
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, num_rows - 1).to(tl.int64)[:, None]  # (ROWS, 1)
    row_blocks = row_pairs // BLOCK_PAIRS
    num_blocks, first_block, codes = num_rows * row_blocks, row * row_blocks, data + row * row_pairs * 8
    start = tl.program_id(1) * own_pairs
    token, k = tl.arange(0, TOKENS), tl.arange(0, 8 * PAIRS)
    rows_of_x = x + tl.minimum(token, num_tokens - 1).to(tl.int64)[None, :] * x_row  # (1, TOKENS)
    words, bits, halves, first_scales, second_scales, third_scales = _load_stored(
        data, codes, num_blocks, first_block, start, row_pairs, UNITS, LANES, PAIRS, KIND
    )
    wait_for_inputs(OVERLAPS)  # no kernel has written what is stored
    sums = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in tl.range(start, tl.minimum(start + own_pairs, row_pairs), PAIRS, num_stages=STAGES):
        pair = (first + tl.arange(0, PAIRS)[None, :]) % BLOCK_PAIRS
        unit, lane = pair // (LANES // 2), pair % (LANES // 2) * 2
        word, next_word = words_of(words)
        word_bits, next_bits = words_of(bits)
        d, d_least = halves_of(halves)
        packed, further = unit_scales(first_scales, second_scales, third_scales, unit, KIND)
        words, bits, halves, first_scales, second_scales, third_scales = _load_stored(
            data, codes, num_blocks, first_block, first + PAIRS, row_pairs, UNITS, LANES, PAIRS, KIND
        )
        at = first + k // 8  # (8 * PAIRS,)
        block, pair_of_x = at // BLOCK_PAIRS, at % BLOCK_PAIRS
        weight = first_weight(pair_of_x // (LANES // 2), KIND) + pair_of_x % (LANES // 2) * 8 + k % 8
        columns = rows_of_x + (block * BLOCK + weight)[:, None]  # (8 * PAIRS, TOKENS)
        for SET in tl.static_range(SETS):
            scale, least = set_scales(d, d_least, packed, further, SET, KIND)
            values = _join_eight(
                _values(set_bytes(word, word_bits, unit, lane, SET, KIND), scale, least, zero, SET, KIND,
                        BITS, HIGHER, LESS, MINIMUM),
                _values(set_bytes(next_word, next_bits, unit, lane + 1, SET, KIND), scale, least, zero, SET, KIND,
                        BITS, HIGHER, LESS, MINIMUM),
            )  # fmt: skip
            here = columns + SET * STEP
            if EIGHTS:
                here = tl.max_contiguous(tl.multiple_of(here, [16, 16]), [8, 1])
            values_of_x = tl.load(here, mask=(at < row_pairs)[:, None], other=0.0)
            tile = tl.reshape(values, (ROWS, 8 * PAIRS))
            sums = tl.dot(tile.to(DOT), values_of_x.to(DOT), sums, input_precision="ieee")
    inside = (n < num_rows)[:, None] & (token < num_tokens)[None, :]
    if BIAS:
        sums += tl.load(bias + n, mask=n < num_rows, other=0.0).to(tl.float32)[:, None]
    if SPLITS:
        out += tl.program_id(1).to(tl.int64) * num_tokens * out_row
    tl.store(out + token.to(tl.int64)[None, :] * out_row + n[:, None], sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_stored(
    data, codes, num_blocks, first_block, first, row_pairs,
    UNITS: tl.constexpr, LANES: tl.constexpr, PAIRS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Reads what is stored of a turn. Behind the end of a row, where x is 0, its last pair is read once more."""
    BLOCK_PAIRS: tl.constexpr = UNITS * LANES // 2
    at = tl.minimum(first + tl.arange(0, PAIRS)[None, :], row_pairs - 1)  # (1, PAIRS)
    block, pair = at // BLOCK_PAIRS, at % BLOCK_PAIRS
    unit, lane = pair // (LANES // 2), pair % (LANES // 2) * 2
    words = load_pair(codes + at * 8)
    bits = further_bits(data, num_blocks, first_block, block, unit, lane, KIND)
    halves, first_scales, second_scales, third_scales = load_scales(data, num_blocks, first_block, block, unit, KIND)
    return words, bits, halves, first_scales, second_scales, third_scales


@triton.jit
def _values(
    codes, scale, least, zero, SET: tl.constexpr, KIND: tl.constexpr,
    BITS: tl.constexpr, HIGHER: tl.constexpr, LESS: tl.constexpr, MINIMUM: tl.constexpr,
):  # fmt: skip
    """The four weights of a word as bf16."""
    a = _value(codes, scale, least, zero, 0, SET, KIND, BITS, HIGHER, LESS, MINIMUM)
    b = _value(codes, scale, least, zero, 1, SET, KIND, BITS, HIGHER, LESS, MINIMUM)
    c = _value(codes, scale, least, zero, 2, SET, KIND, BITS, HIGHER, LESS, MINIMUM)
    d = _value(codes, scale, least, zero, 3, SET, KIND, BITS, HIGHER, LESS, MINIMUM)
    return a, b, c, d


@triton.jit
def _value(
    codes, scale, least, zero, BYTE: tl.constexpr, SET: tl.constexpr, KIND: tl.constexpr,
    BITS: tl.constexpr, HIGHER: tl.constexpr, LESS: tl.constexpr, MINIMUM: tl.constexpr,
):  # fmt: skip
    """A weight, rounded to fp32 once, then to bf16. Products are exact: of Q6_K that of scale and code alone, of others
    without a minimum also those with the power of two that `code_float` adds, which is subtracted behind them."""
    more = 2.0 ** (8 - SET * HIGHER) + LESS
    code = code_float(codes, zero, BYTE, SET * HIGHER, BITS)
    if MINIMUM:
        value = (code - more) * scale + least
    elif KIND == "Q6_K":
        value = (code - more) * scale
    else:
        value = code * scale - more * scale
    return value.to(tl.bfloat16)


@triton.jit
def _join_eight(word, next_word):
    """Eight neighbours of a row in order, in three dims of two."""
    a, b, c, d = word
    e, f, g, h = next_word
    even, odd = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)


@triton.jit(do_not_specialize=("out_row", "num_tokens", "num_rows", "splits"))
def _merge_sums(
    parts, bias, out, out_row, num_tokens, num_rows, splits,
    BIAS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    token, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < num_rows
    wait_for_inputs(OVERLAPS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for split in range(0, splits):
        sums += tl.load(parts + (split * num_tokens + token) * num_rows + n, mask=inside, other=0.0)
    if BIAS:
        sums += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * out_row + n, sums.to(out.dtype.element_ty), mask=inside)
