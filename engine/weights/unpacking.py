"""The original of a packed checkpoint: written back, byte for byte, or compared."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from penstock.engine.weights.checkpoint import naming, read_exactly
from penstock.engine.weights.packed_blocks import BlockReader
from penstock.engine.weights.packed_format import PackedBlock, PackedTensor, read_packed
from penstock.engine.weights.packed_metadata import read_packing
from penstock.engine.weights.threads import in_order
from torch import Tensor

Use = Callable[[PackedTensor, PackedBlock, Tensor], None]


def unpack_file(file: Path, target: Path, device: torch.device, progress: Callable[[int], None]) -> None:
    """Writes the original of a packed file, decompressed on `device`; `progress` is called with bytes that add up to
    the tensors'. Raises ValueError naming file and tensor that are corrupt, and OSError if reading or writing fails."""
    text = read_packing(file).text
    with open(target, "wb") as sink:
        sink.write(struct.pack("<Q", len(text)) + text)
        sink.flush()

        def write(tensor: PackedTensor, block: PackedBlock, memory: Tensor) -> None:
            _write_exactly(sink.fileno(), memoryview(memory.numpy()), tensor.original.offset + block.start)

        _use_blocks(file, device, write, progress)


def verify_file(file: Path, original: Path | None, device: torch.device, progress: Callable[[int], None]) -> None:
    """Decompresses all of a packed file and compares it with its checksums, and with `original` bit for bit if there is
    one. Raises as unpack_file does, and ValueError naming the original and the tensor that is not the same."""
    if original is None:
        _use_blocks(file, device, lambda tensor, block, memory: None, progress)
        return
    text = read_packing(file).text
    with open(original, "rb") as source:
        if source.read(8 + len(text)) != struct.pack("<Q", len(text)) + text:
            raise ValueError(f"{file}: its header is not that of {original}")

        def compare(tensor: PackedTensor, block: PackedBlock, memory: Tensor) -> None:
            expected = torch.empty_like(memory)
            with naming(original, tensor.name):
                start = tensor.original.offset + block.start
                read_exactly(source.fileno(), memoryview(expected.numpy()), start)
            if not torch.equal(memory, expected):
                raise ValueError(f"{file}: {tensor.name} does not decompress to what it is in {original}")

        _use_blocks(file, device, compare, progress)


def _use_blocks(file: Path, device: torch.device, use: Use, progress: Callable[[int], None]) -> None:
    """Calls `use` with each block's original bytes, from many threads."""
    reader = BlockReader(device)
    with open(file, "rb") as source:

        def read_and_use(place: tuple[PackedTensor, PackedBlock]) -> int:
            tensor, block = place
            with naming(file, tensor.name):
                memory = reader.original(source.fileno(), tensor, block)
            use(tensor, block, memory)
            return block.nbytes

        places = [(tensor, block) for tensor in read_packed(file).values() for block in tensor.blocks]
        with in_order(read_and_use, places) as done:
            for nbytes in done:
                progress(nbytes)


def _write_exactly(fd: int, source: memoryview, offset: int) -> None:
    done = 0
    while done < len(source):
        done += os.pwrite(fd, source[done:], offset + done)
