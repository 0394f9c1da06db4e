"""out = x @ w.T (+ bias): a Triton GEMV for the few rows of a small decode step, cuBLAS for all others.

Shapes: T tokens in the batch, N output columns, D input width.
Both add up in fp32, the bias too, and round once. At T = 1 a linear is a read of its weight: cuBLAS takes it at 90 % of
the read rate, rows of it walked by whole programs at 99 %. A program owns BLOCK_N rows and walks D in BLOCK_D columns;
all its warps lie along D, 16 bytes a thread and row, so a thread's x fits its weights without an exchange, and threads
meet once, in the sum at the end. No partial sums in memory, no atomics.

BLOCK_D and the warps depend on (N, D) alone, and nothing else changes the order of a row's sum: its bits depend neither
on the other rows nor, up to SMALL_T, on T.
Tried, compiled for sm_90 only: 16-byte loads and no layout conversion in the loop; 56, 80, 148 registers for 2, 4, 8
rows a program at T = 1; 4 tokens times 8 rows spill. Not tried: D split over programs, x in registers over many rows.
"""

import torch
from torch import Tensor

from engine.kernels.overlap import options, wait_for_inputs
from engine.kernels.triton_door import HAS_TRITON, tl, triton

calls = {"reference": 0, "triton": 0}
SMALL_T = 1  # up to here the GEMV is faster than cuBLAS
MAX_T = 4
Config = tuple[int, int, int, int]  # BLOCK_N, BLOCK_D, num_warps, num_stages


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (T, N) = x (T, D) @ weight (N, D).T + bias (N,). Rows of x, weight and out may lie apart."""
    if x.is_cuda and HAS_TRITON and 1 <= x.shape[0] <= SMALL_T:
        _linear_triton(x, weight, bias, out)
    else:
        linear_reference(x, weight, bias, out)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """The same in plain torch; on a GPU that is cuBLAS."""
    calls["reference"] += 1
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def config(num_columns: int, width: int) -> Config:
    """The block shape for a weight (N, D), as measured on an H200. With 1 stage the walk is unrolled and loads to
    registers; with more, copies to shared memory run ahead of it, which pays where a program walks far or many follow
    each other. BLOCK_D = 256 * num_warps is 16 bytes of bf16 a thread; with less, warps would divide the rows between
    them, and x would have to be exchanged."""
    if num_columns >= 65536:
        return 8, 1024, 4, 4
    return 2, 1024, 4, 1


def candidates() -> list[Config]:
    """What a benchmark may compare with config()."""
    unrolled = [(2, 1024, 4, 1), (4, 1024, 4, 1), (8, 1024, 4, 1), (2, 2048, 8, 1), (4, 2048, 8, 1), (8, 2048, 8, 1)]
    return [*unrolled, (4, 512, 2, 1), (1, 2048, 4, 1), (4, 1024, 4, 3), (8, 1024, 4, 4)]


def _linear_triton(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, blocks: Config | None = None) -> None:
    (num_tokens, width), num_columns = x.shape, weight.shape[0]
    given = [t for t in (x, weight, bias, out) if t is not None]
    assert 1 <= num_tokens <= MAX_T, f"the GEMV takes 1 to {MAX_T} rows, not {num_tokens}"
    assert weight.shape[1] == width and out.shape == (num_tokens, num_columns)
    assert all(t.stride(-1) == 1 for t in given), "linear: the last dim of every tensor must have stride 1"
    assert len({t.dtype for t in given}) == 1, "linear: all tensors have one dtype"
    calls["triton"] += 1
    block_n, block_d, num_warps, num_stages = blocks or config(num_columns, width)
    padded = triton.next_power_of_2(num_tokens)
    if blocks is None:
        block_n = min(block_n, 8 // padded)  # 64 accumulators a thread
    block_d = min(block_d, max(triton.next_power_of_2(width), 256))
    num_warps = max(min(num_warps, block_d // 256), 1)
    turns = triton.cdiv(width, block_d)
    unroll = next((factor for factor in (4, 7, 6, 5, 3, 2) if turns % factor == 0), 4)  # Llama's D have 4 and 7
    _gemv[(triton.cdiv(num_columns, block_n),)](
        *(x, weight, bias, out, x.stride(0), weight.stride(0), out.stride(0), num_tokens, num_columns, width),
        **{"T": padded, "BIAS": bias is not None, "EVEN": width % block_d == 0, "BLOCK_N": block_n},
        **{"BLOCK_D": block_d, "STAGES": num_stages, "UNROLL": unroll if num_stages == 1 else 1},
        **options(x.device),
        num_warps=num_warps,
    )


if HAS_TRITON:

    @triton.jit
    def _gemv(
        x, weight, bias, out, x_row, weight_row, out_row, num_tokens, num_columns, width,
        T: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr,
        OVERLAPS: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        t = tl.minimum(tl.arange(0, T), num_tokens - 1).to(tl.int64)  # rows that are not there repeat the last
        rows = weight + tl.minimum(n, num_columns - 1).to(tl.int64)[None, :, None] * weight_row  # (1, BLOCK_N, 1)
        tokens = x + t[:, None, None] * x_row  # (T, 1, 1)
        wait_for_inputs(OVERLAPS)
        acc = tl.zeros((T, BLOCK_N, BLOCK_D), tl.float32)
        for start in tl.range(0, width, BLOCK_D, num_stages=STAGES, loop_unroll_factor=UNROLL):
            d = start + tl.arange(0, BLOCK_D)[None, None, :]
            inside = None if EVEN else d < width
            other = None if EVEN else 0.0
            w = tl.load(rows + d, mask=inside, other=other, eviction_policy="evict_first")  # (1, BLOCK_N, BLOCK_D)
            values = tl.load(tokens + d, mask=inside, other=other)  # (T, 1, BLOCK_D)
            acc += w.to(tl.float32) * values.to(tl.float32)
        result = tl.sum(acc, 2)  # (T, BLOCK_N)
        if BIAS:
            result += tl.load(bias + n, mask=n < num_columns, other=0.0).to(tl.float32)[None, :]
        place = out + t[:, None] * out_row + n[None, :]
        kept = (tl.arange(0, T) < num_tokens)[:, None] & (n < num_columns)[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=kept)
