"""Computes x += delta, then RMSNorm or LayerNorm of the sum: the two steps between a reduce and a projection in one
launch.

Shapes: T tokens in the batch, D hidden.
It rounds where transformers does: the sum to x's dtype; RMSNorm is in fp32, cast, then multiplied by the weight;
LayerNorm is all in fp32 and cast once. A program has one row in registers, so every value is read once. The number of
warps, and with it the order in which a row is summed, depends on D alone, so a row's bits do not depend on the batch.
Tried: nothing else yet.
"""

import torch
import torch.nn.functional as F
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
MAX_WIDTH = 16384  # more would not stay in registers
KINDS = ("rms", "layer")


def residual_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor, kind: str
) -> None:
    """Adds delta (T, D) to x (T, D) in place and writes out (T, D) = norm(x). Without `delta` x stays as it is.

    `kind` is "rms" or "layer"; `bias` goes with "layer". `out` may be `delta`.
    """
    run = _residual_norm_triton if x.is_cuda else residual_norm_reference
    run(x, delta, weight, bias, eps, out, kind)


def residual_norm_reference(x, delta, weight, bias, eps, out, kind) -> None:
    """Does the same in plain torch."""
    calls["reference"] += 1
    if delta is not None:
        x.add_(delta)
    if kind == "layer":
        out.copy_(F.layer_norm(x, x.shape[-1:], weight, bias, eps))
        return
    x32 = x.float()
    scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    out.copy_(weight * scaled.to(x.dtype))


def _residual_norm_triton(x, delta, weight, bias, eps, out, kind) -> None:
    check_rows(x, delta, weight, bias, out, kind)
    calls["triton"] += 1
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    strides = (x.stride(0), 0 if delta is None else delta.stride(0), out.stride(0))
    _add_and_norm[(x.shape[0],)](
        *(x, delta, weight, bias, out, eps, *strides),
        *(width, kind == "layer", delta is not None, bias is not None, block),
        **options(x.device),
        num_warps=min(max(block // 512, 1), 16),  # 16 elements a thread, up to D = 8192
        enable_fp_fusion=False,
    )


def check_rows(x, delta, weight, bias, out, kind) -> None:
    """Checks the arguments. Raises ValueError if the kernel cannot take rows of this width at all."""
    require_triton("residual_norm on a GPU", "device='cpu'")
    if x.shape[1] > MAX_WIDTH:
        raise ValueError(f"hidden size {x.shape[1]}: the norm kernel takes rows of at most {MAX_WIDTH}")
    given = [t for t in (x, delta, weight, bias, out) if t is not None]
    assert kind in KINDS and (bias is None or kind == "layer"), f"no norm {kind!r} with bias={bias is not None}"
    assert all(t.stride(-1) == 1 for t in given), "residual_norm: the last dim of every tensor must have stride 1"
    assert len({t.dtype for t in given}) == 1, "residual_norm: all tensors have one dtype"


@triton.jit
def load_weights(weight, bias, column, inside, BIAS: tl.constexpr):
    """Loads weight and bias in fp32."""
    factors = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    offsets = 0.0
    if BIAS:
        offsets = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return factors, offsets


@triton.jit
def norm_row(
    values, inside, factors, offsets, eps,
    dtype: tl.constexpr, D: tl.constexpr, LAYER: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Norms a row `values` of fp32, which is 0 where not `inside`, and rounds to dtype."""
    if LAYER:
        values = tl.where(inside, values - tl.sum(values) * (1.0 / D), 0.0)
    scaled = values * tl.rsqrt(tl.sum(values * values) * (1.0 / D) + eps)
    normed = scaled * factors if LAYER else scaled.to(dtype).to(tl.float32) * factors
    if BIAS:
        normed += offsets
    return normed.to(dtype)


@triton.jit
def _add_and_norm(
    x, delta, weight, bias, out, eps, x_row, delta_row, out_row,
    D: tl.constexpr, LAYER: tl.constexpr, ADDS: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < D
    factors, offsets = load_weights(weight, bias, column, inside, BIAS)  # loads that overlap the sums
    wait_for_inputs(OVERLAPS)
    values = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(delta + row * delta_row + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        rounded = values.to(dtype)
        tl.store(x + row * x_row + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    normed = norm_row(values, inside, factors, offsets, eps, dtype, D, LAYER, BIAS)
    tl.store(out + row * out_row + column, normed, mask=inside)
