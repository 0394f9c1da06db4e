"""Linear layers, out = x @ w.T (+ bias): a GEMV for the one row of a small decode pass, a product of tiles for a few
rows, both in Triton, and cuBLAS for more.

Shapes: T tokens in the batch, N output columns, D input width.
All add up in fp32, the bias too, and round once. There are no partial sums in memory and no atomics. At few rows the
time of a linear is that of reading its weight, and of its start: kernels in Triton start while their predecessor ends
(overlap.py), those of cuBLAS do not.

One row. cuBLAS reaches 90 % of the read rate, and programs that walk whole rows reach 99 %. A program owns BLOCK_N rows
and walks D in BLOCK_D columns. All its warps lie along D, 16 bytes a thread and row, so a thread's x fits its weights
without an exchange, and threads exchange values only in the sum at the end. BLOCK_D and the warps depend on (N, D)
alone, and nothing else changes the order of a column's sum. Compiled for sm_90 only: 16-byte loads, no layout
conversion in the loop; 56, 80, 148 registers for 2, 4, 8 weight rows a program. Not tried: D split over programs.

Up to MOST_ROWS, in 16 bits. A program multiplies BLOCK_N whole rows of the weight with all of x, BLOCK_D columns a
turn, by tensor cores; loads are num_stages - 1 turns ahead. The weight is the left operand, of which tensor cores take
16 or 64 rows, and 8 of the right one. Blocks depend on the tile of tokens alone, so passes padded within it have the
same bits.
"""

import functools

import torch
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import HAS_TRITON, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
Config = tuple[int, int, int, int]  # BLOCK_N, BLOCK_D, num_warps, num_stages
TILES = {8: (16, 256, 1, 4), 32: (64, 128, 4, 6)}  # the blocks for so many tokens, as measured on an H200
MOST_ROWS = max(TILES)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Computes out (T, N) = x (T, D) @ weight (N, D).T + bias (N,). Rows of x, weight and out may lie apart."""
    if x.is_cuda and HAS_TRITON and has_kernel(x):
        _linear_triton(x, weight, bias, out)
    else:
        linear_reference(x, weight, bias, out)


def has_kernel(x: Tensor) -> bool:
    """Tells whether x has so few rows that cuBLAS is slower."""
    return len(x) == 1 or (len(x) <= MOST_ROWS and x.dtype.itemsize == 2)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Does the same in plain torch, which uses cuBLAS on a GPU."""
    calls["reference"] += 1
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def config(num_columns: int, width: int) -> Config:
    """Chooses the block shape for a weight (N, D), as measured on an H200. With 1 stage the walk is unrolled and loads
    to registers. With more stages, copies to shared memory run ahead of the walk, which pays where a program walks far
    or many programs follow each other. BLOCK_D = 256 * num_warps gives 16 bytes of bf16 a thread; with less, warps
    would divide the rows between them, and x would have to be exchanged."""
    if num_columns >= 65536:
        return 8, 1024, 4, 4
    return 2, 1024, 4, 1


def _linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, blocks: Config | None = None) -> None:
    """Computes them by the kernel for so many rows, in `blocks`, if these are given, instead of those it has."""
    given = [t for t in (x, weight, bias, out) if t is not None]
    assert has_kernel(x), f"no kernel for {len(x)} rows of {x.dtype}"
    assert x.shape[1] == weight.shape[1] and out.shape == (len(x), len(weight))
    assert all(t.stride(-1) == 1 for t in given), "linear: the last dim of every tensor must have stride 1"
    assert len({t.dtype for t in given}) == 1, "linear: all tensors have one dtype"
    calls["triton"] += 1
    (_multiply_row if len(x) == 1 else _multiply_tile)(x, weight, bias, out, blocks)


def _multiply_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, blocks: Config | None) -> None:
    num_columns, width = weight.shape
    block_n, block_d, num_warps, num_stages = blocks or config(num_columns, width)
    block_d = min(block_d, max(triton.next_power_of_2(width), 256))
    num_warps = max(min(num_warps, block_d // 256), 1)
    turns = triton.cdiv(width, block_d)
    unroll = next((factor for factor in (4, 7, 6, 5, 3, 2) if turns % factor == 0), 4)  # Llama's D have 4 and 7
    _gemv[(triton.cdiv(num_columns, block_n),)](
        *(x, weight, bias, out, weight.stride(0), num_columns, width),
        **{"BIAS": bias is not None, "EVEN": width % block_d == 0, "BLOCK_N": block_n},
        **{"BLOCK_D": block_d, "STAGES": num_stages, "UNROLL": unroll if num_stages == 1 else 1},
        **options(x.device),
        num_warps=num_warps,
    )


def _multiply_tile(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, blocks: Config | None) -> None:
    (num_columns, width), num_tokens = weight.shape, len(x)
    tokens = next(most for most in TILES if num_tokens <= most)
    block_n, block_d, num_warps, num_stages = blocks or TILES[tokens]
    if x.is_cuda:
        num_stages = min(num_stages, _shared_memory(x.device) // ((block_n + tokens) * block_d * x.dtype.itemsize))
    _gemm[(triton.cdiv(num_columns, block_n),)](
        *(x, weight, bias, out, x.stride(0), weight.stride(0), out.stride(0), num_tokens, num_columns, width),
        **{"BIAS": bias is not None, "EVEN": width % block_d == 0, "TOKENS": tokens, "BLOCK_N": block_n},
        **{"BLOCK_D": block_d, "FLOATS": not x.is_cuda, "STAGES": num_stages, **options(x.device)},
        num_warps=num_warps,
    )


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@triton.jit
def _gemv(
    x, weight, bias, out, weight_row, num_columns, width,
    BIAS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = weight + tl.minimum(n, num_columns - 1).to(tl.int64)[:, None] * weight_row  # (BLOCK_N, 1)
    wait_for_inputs(OVERLAPS)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(0, width, BLOCK_D, num_stages=STAGES, loop_unroll_factor=UNROLL):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        inside = None if EVEN else d < width
        other = None if EVEN else 0.0
        w = tl.load(rows + d, mask=inside, other=other, eviction_policy="evict_first")  # (BLOCK_N, BLOCK_D)
        values = tl.load(x + d, mask=inside, other=other)  # (1, BLOCK_D)
        acc += w.to(tl.float32) * values.to(tl.float32)
    result = tl.sum(acc, 1)  # (BLOCK_N,)
    if BIAS:
        result += tl.load(bias + n, mask=n < num_columns, other=0.0).to(tl.float32)
    tl.store(out + n, result.to(out.dtype.element_ty), mask=n < num_columns)


@triton.jit(do_not_specialize=("num_tokens",))
def _gemm(
    x, weight, bias, out, x_row, weight_row, out_row, num_tokens, num_columns, width,
    BIAS: tl.constexpr, EVEN: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FLOATS: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    n, token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, TOKENS)
    rows = weight + tl.minimum(n, num_columns - 1).to(tl.int64)[:, None] * weight_row  # (BLOCK_N, 1)
    rows_of_x = x + tl.minimum(token, num_tokens - 1).to(tl.int64)[None, :] * x_row  # (1, TOKENS)
    wait_for_inputs(OVERLAPS)
    sums = tl.zeros((BLOCK_N, TOKENS), tl.float32)
    for start in tl.range(0, width, BLOCK_D, num_stages=STAGES):
        d = start + tl.arange(0, BLOCK_D)
        inside = None if EVEN else (d < width)[None, :]
        inside_x = None if EVEN else (d < width)[:, None]
        other = None if EVEN else 0.0
        w = tl.load(rows + d[None, :], mask=inside, other=other, eviction_policy="evict_first")  # (BLOCK_N, BLOCK_D)
        values = tl.load(rows_of_x + d[:, None], mask=inside_x, other=other)  # (BLOCK_D, TOKENS)
        if FLOATS:  # the interpreter's tl.dot of bf16 is wrong
            w, values = w.to(tl.float32), values.to(tl.float32)
        sums = tl.dot(w, values, sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias + n, mask=n < num_columns, other=0.0).to(tl.float32)[:, None]
    real = (n < num_columns)[:, None] & (token < num_tokens)[None, :]
    tl.store(out + token.to(tl.int64)[None, :] * out_row + n[:, None], sums.to(out.dtype.element_ty), mask=real)
