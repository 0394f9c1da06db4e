"""Dequantises stored weights to a float dtype, bit for bit as the gguf package: fp32 values, cast once.

A program handles a run of consecutive blocks, and writes their weights in order. A thread's codes lie together.
Not tried on a GPU yet: other numbers of weights a program, and codes by way of shared memory.
"""

import torch
from penstock.engine.kernels.block_parts import split_parts
from penstock.engine.kernels.block_values import GROUPS, block_values, write_values
from penstock.engine.kernels.ggml_types import BY_NAME
from penstock.engine.kernels.overlap import options, wait_for_inputs
from penstock.parallel.triton_door import require_triton, tl, triton
from torch import Tensor

calls = {"reference": 0, "triton": 0}
PROGRAM_WEIGHTS = 4096
NUM_WARPS = 4


def dequantise(kind: str, data: Tensor, out: Tensor) -> None:
    """Writes the weights of `data` (uint8, blocks of `kind` in parts, from a 16-byte boundary) to `out`: as many
    weights, contiguous, of a float dtype."""
    layout = BY_NAME[kind]
    assert data.dtype == torch.uint8 and data.is_contiguous() and out.is_contiguous(), "dequantise: strides"
    assert data.numel() * layout.block == out.numel() * layout.nbytes, "dequantise: sizes do not fit each other"
    run = _dequantise_triton if out.is_cuda else dequantise_reference
    if out.numel():
        run(kind, data, out)


def dequantise_reference(kind: str, data: Tensor, out: Tensor) -> None:
    """Does the same in plain torch."""
    calls["reference"] += 1
    write_values(kind, split_parts(kind, data), out)


def _dequantise_triton(kind: str, data: Tensor, out: Tensor) -> None:
    require_triton("dequantise on a GPU", "device='cpu'")
    calls["triton"] += 1
    layout, groups = BY_NAME[kind], GROUPS[kind]
    num_blocks, blocks = out.numel() // layout.block, PROGRAM_WEIGHTS // layout.block
    _dequantise_blocks[(triton.cdiv(num_blocks, blocks),)](
        *(data.view(-1), out, num_blocks, kind, blocks, groups, layout.block // groups),
        **options(out.device),
        num_warps=NUM_WARPS,
    )


@triton.jit
def _dequantise_blocks(
    data, out, num_blocks,
    KIND: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None, None]
    group, lane = tl.arange(0, GROUPS)[None, :, None], tl.arange(0, LANES)[None, None, :]
    inside = block < num_blocks
    wait_for_inputs(OVERLAPS)
    values = block_values(data, num_blocks, tl.minimum(block, num_blocks - 1), group, lane, KIND)
    weight = (block * GROUPS + group) * LANES + lane
    tl.store(out + weight, values.to(out.dtype.element_ty), mask=inside)
