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


def part_runs(kind: str, parts: Sequence[Tensor], num_rows: int) -> list[np.ndarray]:
    """Memory for each part of the blocks of so many rows, as arrays (rows, blocks of a row): a part of a block is one
    element. The memory is uint8, contiguous, on the CPU."""
    return [
        part.numpy().view(np.dtype((np.void, nbytes))).reshape(num_rows, -1)
        for (_, nbytes), part in zip(PARTS[kind], parts)
    ]


def take_apart(kind: str, blocks: Tensor, runs: Sequence[np.ndarray], row: int = 0, block: int = 0) -> None:
    """Copies blocks of a file, (rows, bytes) uint8, contiguous, on the CPU, to the rows from `row` and the blocks from
    `block` of each part's run. (By numpy: torch copies such short pieces at half the rate.)"""
    found = blocks.numpy().reshape(len(blocks), -1, BY_NAME[kind].nbytes)
    where = slice(row, row + found.shape[0]), slice(block, block + found.shape[1])
    for (start, nbytes), run in zip(PARTS[kind], runs):
        run[where] = found[:, :, start : start + nbytes].view(run.dtype)[:, :, 0]


def are_finite(scales: Tensor) -> bool:
    """Tells whether all fp16 of blocks, their last part, are numbers: (rows, bytes) uint8, on the CPU."""
    return bool((scales.numpy().view(np.uint16) & 0x7C00).max(initial=0) < 0x7C00)


def in_parts(kind: str, blocks: Tensor) -> Tensor:
    """A file's blocks, (rows, bytes) uint8, contiguous, on the CPU, as they are kept; of the same shape."""
    data = torch.empty_like(blocks)
    parts = [part.view(-1) for part in split_parts(kind, data)]
    take_apart(kind, blocks, part_runs(kind, parts, len(blocks)))
    return data
