"""Blocks of packed tensors read from their file, checked, and decompressed on a device."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from penstock.engine.weights.checkpoint import read_exactly
from penstock.engine.weights.codec import check, check_bytes, checksum, decompress
from penstock.engine.weights.packed_format import PackedBlock, PackedTensor
from torch import Tensor


class BlockReader:
    """For any number of threads: each has buffers of its own, and what it was given is good until it asks for more."""

    def __init__(self, device: torch.device):
        self._device = device
        self._local = threading.local()
        self._launching = threading.Lock()

    def read(self, fd: int, tensor: PackedTensor, block: PackedBlock) -> tuple[Tensor, int]:
        """A whole block that is what its checksum says, and the bytes read: none for the block that this thread had
        last. Of a compressed tensor bf16 (rows, columns) on the device, of any other its bytes, uint8 on the CPU.

        Raises ValueError naming file and tensor if it is corrupt, OSError and EOFError if it cannot be read.
        """
        if getattr(self._local, "last", None) == (tensor.name, block.start):
            return self._local.values, 0
        self._local.last = None
        stored = self._buffer("stored", block.stored_bytes, torch.device("cpu"))
        read_exactly(fd, memoryview(stored.numpy()), block.offset)
        if block.layout is None:
            check_bytes(_where(tensor, block), stored, block.checksum)
            values = stored
        else:
            check(_where(tensor, block), block.layout, stored, block.checksum)
            values = self._decompress(block, stored)
        self._local.last, self._local.values = (tensor.name, block.start), values
        return values, block.stored_bytes

    def original(self, fd: int, tensor: PackedTensor, block: PackedBlock) -> Tensor:
        """The bytes that the block had in the original, uint8 on the CPU, by their checksum. Raises as `read`."""
        memory = self.read(fd, tensor, block)[0].view(-1).view(torch.uint8).cpu()
        found = checksum(memory)
        if found != block.original_checksum:
            where = _where(tensor, block)
            raise ValueError(f"{where}: corrupt: not what was packed: {found:08x}, not {block.original_checksum:08x}")
        return memory

    def _decompress(self, block: PackedBlock, stored: Tensor) -> Tensor:
        weights = self._buffer("decompressed", block.nbytes, self._device).view(torch.bfloat16).view(block.layout.shape)
        blob = stored.to(self._device)
        with self._on_device():
            decompress(block.layout, blob, weights)
        return weights

    def _buffer(self, name: str, nbytes: int, device: torch.device) -> Tensor:
        held = getattr(self._local, name, None)
        if held is None or held.numel() < nbytes:
            held = torch.empty(nbytes, dtype=torch.uint8, device=device)
            setattr(self._local, name, held)
        return held[:nbytes]

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Kernels go to the thread's current GPU, and are compiled by one thread; a CPU decompresses in all at once."""
        if self._device.type != "cuda":
            yield
            return
        with self._launching, torch.cuda.device(self._device):
            yield


def _where(tensor: PackedTensor, block: PackedBlock) -> str:
    return f"{tensor.stored.file}: {tensor.name}, bytes {block.start} to {block.start + block.nbytes}"
