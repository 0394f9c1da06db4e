"""Packed checkpoints as sources of weights: of a coded tensor those blocks are read and decoded that a piece touches.

A block is whole rows: where columns are cut, every rank reads every block.
"""

from pathlib import Path

import torch
from torch import Tensor

from engine.weights.checkpoint import Checkpoint
from engine.weights.packed_blocks import BlockReader
from engine.weights.packed_format import PackedTensor, find_packed


def open_checkpoint(directory: str | Path, device: torch.device) -> Checkpoint:
    """The checkpoint in a directory, plain or packed; a packed one is decoded on `device`. Raises as both do."""
    tensors = find_packed(Path(directory))
    return Checkpoint.open(directory) if tensors is None else PackedCheckpoint(Path(directory), tensors, device)


class PackedCheckpoint(Checkpoint):
    """A Checkpoint whose `entries` are the original's where a tensor is coded. `read_piece` also raises ValueError
    naming file and tensor of a corrupt block; it returns the coded bytes read."""

    def __init__(self, directory: Path, tensors: dict[str, PackedTensor], device: torch.device):
        entries = {name: tensor.original if tensor.coded else tensor.stored for name, tensor in tensors.items()}
        super().__init__(directory, entries)
        self._tensors, self._device, self._blocks = tensors, device, BlockReader(device)

    def finish(self) -> None:
        """Gives up the GPU memory of the threads that have read; they are gone."""
        super().finish()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _read_rows(self, name: str, row: int, col: int, out: Tensor) -> int:
        tensor = self._tensors[name]
        if not tensor.coded:
            return super()._read_rows(name, row, col, out)
        fd, step = self._fd(tensor.stored.file), tensor.blocks[0].layout.shape[0]
        stop, num_read = row + out.shape[0], 0
        for index in range(row // step, -(-stop // step)):
            block, first = tensor.blocks[index], index * step
            weights, block_bytes = self._blocks.weights(fd, tensor, block)
            start, end = max(row, first), min(stop, first + step)
            part = weights[start - first : end - first, col : col + out.shape[1]]
            out[start - row : end - row].copy_(part)
            num_read += block_bytes
        return num_read
