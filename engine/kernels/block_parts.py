"""The parts of quantised blocks: how the bits of a file's blocks are ordered where they are kept, codes apart from
scales.

    blocks of a file   | d codes | d codes | d codes | ...      Q8_0: 2 and 32 bytes, so codes begin at even bytes only
    as they are kept   | codes | codes | codes ... | d | d | d ...

A part of all blocks of consecutive rows lies together, in the order of the blocks, and so do the parts, in the order of
PARTS (ggml_types.py): the last one has the fp16 numbers. If the whole begins at 16 bytes, a part of a block begins at a
multiple of its length, of 16 or of 4 bytes. Nothing is converted, and as many bytes are kept as the file has.
"""

from collections.abc import Sequence

import numpy as np
import torch
from penstock.engine.kernels.ggml_types import BY_NAME, PARTS
from torch import Tensor


def split_parts(kind: str, data: Tensor) -> list[Tensor]:
    """Views (blocks, bytes of a part) of the parts of blocks that are kept so; `data` is uint8, contiguous."""
    sizes = [nbytes for _, nbytes in PARTS[kind]]
    flat = data.view(-1)
    num_blocks = len(flat) // BY_NAME[kind].nbytes
    return [part.view(num_blocks, -1) for part in flat.split([num_blocks * size for size in sizes])]


def take_apart(kind: str, blocks: Tensor, parts: Sequence[Tensor]) -> None:
    """Copies a file's blocks to memory for each of their parts; all uint8, contiguous, on the CPU. (By numpy: torch
    copies such short runs at half the rate.)"""
    found = blocks.numpy().reshape(-1, BY_NAME[kind].nbytes)
    for (start, nbytes), part in zip(PARTS[kind], parts):
        run = np.dtype((np.void, nbytes))
        part.numpy().reshape(-1, nbytes).view(run)[:] = found[:, start : start + nbytes].view(run)


def are_finite(scales: Tensor) -> bool:
    """Tells whether all fp16 of blocks, their last part, are numbers: (rows, bytes) uint8, on the CPU."""
    return bool((scales.numpy().view(np.uint16) & 0x7C00).max(initial=0) < 0x7C00)


def in_parts(kind: str, blocks: Tensor) -> Tensor:
    """A file's blocks (uint8, contiguous, on the CPU) as they are kept; of the same shape."""
    data = torch.empty_like(blocks)
    take_apart(kind, blocks, split_parts(kind, data))
    return data
