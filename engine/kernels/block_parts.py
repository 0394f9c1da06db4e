"""The parts of quantised blocks: how the bits of a file's blocks are ordered where they are kept, codes apart from
scales.

    blocks of a file   | d codes | d codes | d codes | ...      Q8_0: 2 and 32 bytes, so codes begin at even bytes only
    as they are kept   | codes | codes | codes ... | d | d | d ...

A part of all blocks of consecutive rows lies together, in the order of the blocks, and so do the parts, in the order of
PARTS: a part of a block begins at a multiple of its length, or of 4 bytes, if the whole begins at one of 16. Nothing is
converted, and as many bytes are kept as the file has.
"""

from collections.abc import Sequence

import numpy as np
import torch
from penstock.engine.kernels.ggml_types import BY_NAME
from torch import Tensor

# Of each part its first byte in a file's block and its bytes: codes (of Q6_K their four lower bits), the bits that they
# have beyond, integer scales, and the fp16 scale, with the fp16 minimum behind it if there is one.
PARTS = {
    "Q4_0": ((2, 16), (0, 2)), "Q4_1": ((4, 16), (0, 4)), "Q5_0": ((6, 16), (2, 4), (0, 2)),
    "Q5_1": ((8, 16), (4, 4), (0, 4)), "Q8_0": ((2, 32), (0, 2)), "Q2_K": ((16, 64), (0, 16), (80, 4)),
    "Q3_K": ((32, 64), (0, 32), (96, 12), (108, 2)), "Q4_K": ((16, 128), (4, 12), (0, 4)),
    "Q5_K": ((48, 128), (16, 32), (4, 12), (0, 4)), "Q6_K": ((0, 128), (128, 64), (192, 16), (208, 2)),
}  # fmt: skip


def split_parts(kind: str, data: Tensor) -> list[Tensor]:
    """Views (blocks, bytes of a part) of the parts of blocks that are kept so; `data` is uint8, contiguous."""
    sizes = [nbytes for _, nbytes in PARTS[kind]]
    flat = data.view(-1)
    num_blocks = len(flat) // BY_NAME[kind].nbytes
    return [part.view(num_blocks, -1) for part in flat.split([num_blocks * size for size in sizes])]


def take_apart(kind: str, blocks: Tensor, parts: Sequence[Tensor]) -> None:
    """Copies a file's blocks (uint8, contiguous, on the CPU) to `parts`, as split_parts gives them. (By numpy: torch
    copies such short runs at half the rate.)"""
    found = blocks.numpy().reshape(-1, BY_NAME[kind].nbytes)
    for (start, nbytes), part in zip(PARTS[kind], parts):
        run = np.dtype((np.void, nbytes))
        part.numpy().view(run)[:] = found[:, start : start + nbytes].view(run)


def in_parts(kind: str, blocks: Tensor) -> Tensor:
    """A file's blocks (uint8, contiguous, on the CPU) as they are kept; of the same shape."""
    data = torch.empty_like(blocks)
    take_apart(kind, blocks, split_parts(kind, data))
    return data
