"""Writes a packed checkpoint from a plain one, block by block (packed_format.py says what it is like)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from penstock.engine.kernels.codec_tile import TILE
from penstock.engine.model.compressed_size import WEIGHT_BITS
from penstock.engine.weights.blocks import BLOCK_BYTES
from penstock.engine.weights.checkpoint import naming, read_exactly
from penstock.engine.weights.codec import checksum, compress
from penstock.engine.weights.headers import MAX_HEADER_BYTES, TensorEntry, parse_header, read_header_text
from penstock.engine.weights.packed_format import (
    CODED,
    PLAIN,
    StoredTensor,
    cut,
    has_gaps,
    render,
    reserve_bytes,
    stored_order,
)
from penstock.engine.weights.packed_metadata import Row
from penstock.engine.weights.threads import in_order
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """What came of a file: bytes of it and of the packed one; weights that were bf16, and the bytes that they take."""

    original_bytes: int = 0
    packed_bytes: int = 0
    num_weights: int = 0
    weights_bytes: int = 0
    num_tensors: int = 0
    num_raw: int = 0

    def __add__(self, other: "Packed") -> "Packed":
        return Packed(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def least_bytes(entries: dict[str, TensorEntry]) -> int:
    """What the tensors take at least once they are packed."""
    return sum(entry.nbytes * WEIGHT_BITS // 16 if _is_codable(entry) else entry.nbytes for entry in entries.values())


def pack_file(file: Path, target: Path, device: torch.device, progress: Callable[[int], None]) -> Packed:
    """Writes `target`, a packed safetensors file; `progress` is called with bytes that add up to the tensors'.

    Blocks are compressed on `device`. Raises ValueError naming the file, and the tensor, that cannot be packed, and
    OSError if reading or writing fails.
    """
    text, size = read_header_text(file), file.stat().st_size
    entries = parse_header(file, text, size)
    if has_gaps(entries.values(), size - 8 - len(text)):
        raise ValueError(f"{file}: not packed: some of its bytes belong to no tensor")
    reserved = reserve_bytes(text.decode(), entries, BLOCK_BYTES)
    if reserved > MAX_HEADER_BYTES:
        raise ValueError(f"{file}: not packed: a packed file's header could not hold its own of {len(text)} bytes")
    with open(file, "rb") as source, open(target, "wb") as sink:
        sink.seek(reserved)
        stored = list(_store_tensors(source.fileno(), entries, sink, device, progress))
        sink.truncate()  # of a tensor that did not shrink, more may have been written
        sink.seek(0)
        sink.write(render(text.decode(), stored, BLOCK_BYTES, reserved))
    weights = [tensor for tensor in stored if entries[tensor.name].dtype == PLAIN]
    return Packed(
        original_bytes=size,
        packed_bytes=target.stat().st_size,
        num_weights=sum(math.prod(entries[tensor.name].shape) for tensor in weights),
        weights_bytes=sum(tensor.nbytes for tensor in weights),
        num_tensors=len(stored),
        num_raw=sum(tensor.dtype == entries[tensor.name].dtype for tensor in stored),
    )


@dataclass(frozen=True)
class _Block:
    entry: TensorEntry
    name: str
    compressed: bool
    start: int
    nbytes: int


def _blocks(name: str, entry: TensorEntry, compressed: bool) -> list[_Block]:
    return [_Block(entry, name, compressed, *place) for place in cut(entry, compressed, BLOCK_BYTES)]


def _store_tensors(
    fd: int, entries: dict[str, TensorEntry], sink: BinaryIO, device: torch.device, progress: Callable[[int], None]
) -> Iterator[StoredTensor]:
    """Writes the tensors' data and says, of one after another, what was written."""
    pack_block = partial(_pack_block, fd, device)
    tensors = [(name, _blocks(name, entries[name], _is_codable(entries[name]))) for name in stored_order(entries)]
    with in_order(pack_block, [block for _, blocks in tensors for block in blocks]) as packed:
        for name, blocks in tensors:
            entry, begin, rows = entries[name], sink.tell(), []
            for block in blocks:
                rows.append(_write(sink, next(packed)))
                progress(block.nbytes)
            compressed = _is_codable(entry)
            if compressed and sink.tell() - begin >= entry.nbytes:
                compressed = False
                sink.seek(begin)
                rows = [_write(sink, pack_block(block)) for block in _blocks(name, entry, compressed)]
            nbytes = sink.tell() - begin
            shape = (nbytes,) if compressed else entry.shape
            yield StoredTensor(name, CODED if compressed else entry.dtype, shape, nbytes, tuple(rows))


def _is_codable(entry: TensorEntry) -> bool:
    return entry.dtype == PLAIN and math.prod(entry.shape) >= TILE


def _pack_block(fd: int, device: torch.device, block: _Block) -> tuple[Row, Tensor]:
    """A block's row of numbers, and the bytes to write."""
    memory = torch.empty(block.nbytes, dtype=torch.uint8)
    with naming(block.entry.file, block.name):
        read_exactly(fd, memoryview(memory.numpy()), block.entry.offset + block.start)
    original = checksum(memory)
    if not block.compressed:
        return (original,), memory
    layout, blob = compress(memory.view(torch.bfloat16).to(device))
    blob = blob.cpu()
    counts = () if layout.raw else (layout.num_escapes, layout.num_patches)
    return (checksum(blob), original, *counts), blob


def _write(sink: BinaryIO, packed: tuple[Row, Tensor]) -> Row:
    row, memory = packed
    sink.write(memory.numpy())
    return row
