"""Computes act(gate) * up, or act alone, in place, with one launch and one read instead of two to nine of each.

Shapes: T tokens in the batch, I local FFN width.
It rounds where transformers does: the activation's result to the model's dtype before the product; in gelu_new and
gelu_fast, which transformers writes in Python, after every operation. exp and tanh are the device's fast ones: in fp32
they differ from torch's by a few ulp, in bf16 and fp16 in a last bit now and then. The thread that writes an element is
the only one that reads it, so working in place is safe.
Tried, on an H200, us, for 256 / 2048 / 8192 tokens of 14336: 3.8 / 43.55 / 170.0. Blocks of 1024 and 4 warps 4.9 /
44.05 / 170.8, of 4096 and 8 warps 4.03 / 43.96 / 170.5, of 512 and 2 warps 9.5 / 70.4 / 277.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
BLOCK = 2048  # 8 elements a thread: 16 bytes in bf16
NUM_WARPS = 8


def gelu_new(x: Tensor) -> Tensor:
    """The gelu_new of transformers, which rounds differently from torch's tanh approximation."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_fast(x: Tensor) -> Tensor:
    """The gelu_fast of transformers: the same function, rounded differently again."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_fast,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def gated_activation(ffn: Tensor, kind: str, gated: bool) -> None:
    """Replaces the first I columns of ffn (T, 2I) by act(gate) * up if gated, else ffn (T, I) by act(ffn)."""
    run = _gated_activation_triton if ffn.is_cuda else gated_activation_reference
    run(ffn, kind, gated)


def gated_activation_reference(ffn: Tensor, kind: str, gated: bool) -> None:
    """Does the same in plain torch."""
    calls["reference"] += 1
    if gated:
        gate, up = ffn.chunk(2, dim=1)
        torch.mul(ACTIVATIONS[kind](gate), up, out=gate)
    else:
        ffn.copy_(ACTIVATIONS[kind](ffn))


def _gated_activation_triton(ffn: Tensor, kind: str, gated: bool) -> None:
    require_triton("gated_activation on a GPU", "device='cpu'")
    assert kind in ACTIVATIONS, f"no activation {kind!r}"
    assert ffn.stride(1) == 1, "gated_activation: the last dim must have stride 1"
    calls["triton"] += 1
    width = ffn.shape[1] // 2 if gated else ffn.shape[1]
    block = min(BLOCK, triton.next_power_of_2(width))
    _activate_rows[(ffn.shape[0], triton.cdiv(width, block))](
        *(ffn, ffn.stride(0), width, kind, gated, block),
        **options(ffn.device),
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


@triton.jit
def _tanh(x):
    """Computes tanh within 1e-7; 1 + tanh keeps no finer difference."""
    shrunk = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def _gelu_new(x, dtype: tl.constexpr):
    """Computes gelu_new. torch's pow(x, 3.0) is x * x * x, each product rounded (in fp16 on a CPU, rounded once)."""
    cube = ((x * x).to(dtype).to(tl.float32) * x).to(dtype).to(tl.float32)
    term = (0.044715 * cube).to(dtype).to(tl.float32)
    inner = (0.7978845608028654 * (x + term).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    outer = (1.0 + _tanh(inner).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return (0.5 * x).to(dtype).to(tl.float32) * outer


@triton.jit
def _gelu_fast(x, dtype: tl.constexpr):
    square = ((0.044715 * x).to(dtype).to(tl.float32) * x).to(dtype).to(tl.float32)
    factor = (1.0 + square).to(dtype).to(tl.float32)
    inner = ((x * 0.7978845608).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
    outer = (1.0 + _tanh(inner).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return (0.5 * x).to(dtype).to(tl.float32) * outer


@triton.jit
def _activate(x, KIND: tl.constexpr, dtype: tl.constexpr):
    """Applies the activation to fp32 and returns fp32; the caller rounds."""
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    elif KIND == "relu":
        return tl.where(x <= 0.0, 0.0, x)  # NaN stays
    elif KIND == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_pytorch_tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))))
    elif KIND == "gelu_new":
        return _gelu_new(x, dtype)
    else:
        return _gelu_fast(x, dtype)


@triton.jit
def _activate_rows(
    ffn, ffn_row, width, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    dtype: tl.constexpr = ffn.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointer, inside = ffn + tl.program_id(0).to(tl.int64) * ffn_row + column, column < width
    gate = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(pointer + width, mask=inside, other=0.0).to(tl.float32)
    result = _activate(gate, KIND, dtype).to(dtype)
    if GATED:
        result = (result.to(tl.float32) * up).to(dtype)
    tl.store(pointer, result, mask=inside)
