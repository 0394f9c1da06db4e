"""Packed checkpoints as sources of weights: of a tensor those blocks are read and checked that a piece touches.

A block is read whole, and of a compressed tensor it is whole rows: where columns are cut, every rank reads every block.
"""

from pathlib import Path

import torch
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.packed_blocks import BlockReader
from penstock.engine.weights.packed_format import PackedTensor, find_packed
from torch import Tensor


def open_checkpoint(directory: str | Path, device: torch.device) -> Checkpoint:
    """The checkpoint in a directory, plain or packed; a packed one is decompressed on `device`. Raises as both do."""
    tensors = find_packed(Path(directory))
    return Checkpoint.open(directory) if tensors is None else PackedCheckpoint(Path(directory), tensors, device)


class PackedCheckpoint(Checkpoint):
    """A Checkpoint whose `entries` are the original's where a tensor is compressed. `read_piece` also raises ValueError
    naming file and tensor of a corrupt block; it returns the bytes read, those of whole blocks."""

    def __init__(self, directory: Path, tensors: dict[str, PackedTensor], device: torch.device):
        entries = {name: tensor.original if tensor.compressed else tensor.stored for name, tensor in tensors.items()}
        super().__init__(directory, entries)
        self._tensors, self._device, self._blocks = tensors, device, BlockReader(device)

    def finish(self) -> None:
        """Gives up the GPU memory of the threads that have read; they are gone."""
        super().finish()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _read_rows(self, name: str, row: int, col: int, out: Tensor) -> int:
        tensor = self._tensors[name]
        fd = self._fd(tensor.stored.file)
        return (self._read_compressed if tensor.compressed else self._read_bytes)(fd, tensor, row, col, out)

    def _read_compressed(self, fd: int, tensor: PackedTensor, row: int, col: int, out: Tensor) -> int:
        step, stop, num_read = tensor.blocks[0].layout.shape[0], row + out.shape[0], 0
        for index in range(row // step, -(-stop // step)):
            block, first = tensor.blocks[index], index * step
            weights, block_bytes = self._blocks.read(fd, tensor, block)
            start, end = max(row, first), min(stop, first + step)
            part = weights[start - first : end - first, col : col + out.shape[1]]
            out[start - row : end - row].copy_(part)
            num_read += block_bytes
        return num_read

    def _read_bytes(self, fd: int, tensor: PackedTensor, row: int, col: int, out: Tensor) -> int:
        """A block may begin and end inside a row: rows that follow each other in file and memory go as one."""
        itemsize, num_cols = out.element_size(), tensor.original.num_cols
        rows = out.view(1, -1) if out.is_contiguous() and out.shape[1] == num_cols else out
        starts = range((row * num_cols + col) * itemsize, tensor.original.nbytes, num_cols * itemsize)
        return sum(self._read_range(fd, tensor, start, target) for start, target in zip(starts, rows.view(torch.uint8)))

    def _read_range(self, fd: int, tensor: PackedTensor, start: int, target: Tensor) -> int:
        """Fills `target`, uint8 in a row, with the tensor's bytes from `start` on."""
        step, stop, num_read = tensor.blocks[0].nbytes, start + len(target), 0
        for block in tensor.blocks[start // step : -(-stop // step)]:
            memory, block_bytes = self._blocks.read(fd, tensor, block)
            first, last = max(start, block.start), min(stop, block.start + block.nbytes)
            target[first - start : last - start].copy_(memory[first - block.start : last - block.start])
            num_read += block_bytes
        return num_read
