"""An all-reduce, the addition of its result to the residual, and the norm, in one launch, for the few rows of a decode
pass.

Shapes: T tokens in the batch, D hidden, W 32-bit words of a row.
It joins parallel/push_reduce.py, with a program a row, and residual_norm. The sum of the ranks' parts is rounded as the
all-reduce's result would be, and the reference runs the two one after the other. Residual and weights are read while
the parts are on their way. All ranks get the same bits; a row's bits do not depend on the batch.
Tried, compiled for sm_90 only: 8 elements a thread, 16 bytes an access. Not tried: a row over several programs, which
shortens the push and adds an exchange of the sum of squares.
"""

from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.engine.kernels.residual_norm import check_rows, load_weights, norm_row
from penstock.parallel.push_reduce import WORD_BYTES, PeerBuffers, collect, fits_rows, flip, load_part, push, sum_parts
from penstock.parallel.triton_door import tl, triton
from torch import Tensor, int32

calls = {"triton": 0}
MAX_WARPS = 16


def reduce_residual_norm(
    peers: PeerBuffers,
    x: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    kind: str,
    pushes: bool = True,
    collects: bool = True,
) -> None:
    """Adds to x (T, D) the sum over ranks of delta (T, D), contiguous, and writes out (T, D) = norm(x). `out` may be
    `delta`.

    `kind` is "rms" or "layer"; `bias` goes with "layer". `pushes` and `collects` mean what they mean in push_reduce.
    """
    check_rows(x, delta, weight, bias, out, kind)
    assert delta.is_contiguous(), "reduce_residual_norm: strides: a part has no gaps"
    assert fits_rows(delta)
    calls["triton"] += 1
    width = x.shape[1]
    block = triton.next_power_of_2(width * x.itemsize // WORD_BYTES)
    if len(x):
        _reduce_add_and_norm[(len(x),)](
            *(x, delta.view(int32), weight, bias, out, eps, x.stride(0), out.stride(0)),
            *(peers.words, peers.others, peers.half, peers.abort_word, peers.rank, peers.size),
            *(width, kind == "layer", bias is not None),
            *(triton.next_power_of_2(peers.size), block, pushes, collects),
            **options(x.device),
            num_warps=min(max(block // 128, 1), MAX_WARPS),
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=["rank"])
def _reduce_add_and_norm(
    x, delta, weight, bias, out, eps, x_row, out_row, words, others, halves, abort_word, rank, size,
    D: tl.constexpr, LAYER: tl.constexpr, BIAS: tl.constexpr,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, PUSHES: tl.constexpr, COLLECTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    PER_WORD: tl.constexpr = 32 // dtype.primitive_bitwidth
    row, word = tl.program_id(0), tl.arange(0, BLOCK)
    offset, there = row * (D // PER_WORD) + word, word < D // PER_WORD
    column = tl.arange(0, BLOCK * PER_WORD)
    inside = column < D
    if COLLECTS:
        factors, offsets = load_weights(weight, bias, column, inside, BIAS)
    wait_for_inputs(OVERLAPS)
    half = tl.load(halves + row)
    own = load_part(delta, offset, there)
    if PUSHES:
        push(own, others, offset, there, half, rank, size)
    if COLLECTS:
        values = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        parts = collect(own, words, offset, there, half, abort_word, rank, size, RANKS)
        values = (values + sum_parts(parts, dtype).to(tl.float32)).to(dtype)
        tl.store(x + row * x_row + column, values, mask=inside)
        normed = norm_row(values.to(tl.float32), inside, factors, offsets, eps, dtype, D, LAYER, BIAS)
        tl.store(out + row * out_row + column, normed, mask=inside)
        flip(halves, half)
