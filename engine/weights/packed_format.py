"""The format of a packed checkpoint: for each safetensors file of the original one of the same name, with the same
tensors, of which those that shrink are compressed. Torch-free but for reading headers.

A compressed tensor is bytes (U8, one dimension): the blobs of its blocks in a row, whole rows of the original of about
`block_bytes` each. Any other tensor is there as it was, checked in blocks too. So an index remains true, any reader of
safetensors can open the file, and a reader that takes a compressed tensor for the original stumbles over its shape. The
header's metadata say the rest (packed_metadata.py). Tensors lie in the order of their elements' sizes, so that each is
aligned.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from penstock.engine.weights.codec import CompressedLayout
from penstock.engine.weights.headers import DTYPE_BITS, TensorEntry, read_header
from penstock.engine.weights.packed_metadata import Packing, Row, dump, find_packings, read_packing, write_packing

CODED, PLAIN = "U8", "BF16"  # the dtype of a compressed tensor, and what it was
ALIGN_BYTES = 16


@dataclass(frozen=True)
class PackedBlock:
    """The `nbytes` bytes of a tensor that begin at its byte `start`, and their place in the packed file. `layout` is of
    (rows, columns); None: they are there as they were."""

    start: int
    nbytes: int
    offset: int
    checksum: int
    original_checksum: int
    layout: CompressedLayout | None

    @property
    def stored_bytes(self) -> int:
        return self.nbytes if self.layout is None else self.layout.nbytes


@dataclass(frozen=True)
class PackedTensor:
    """`original` has its offset in the original file, `stored` in the packed one, which both name as theirs."""

    name: str
    original: TensorEntry
    stored: TensorEntry
    blocks: tuple[PackedBlock, ...]

    @property
    def compressed(self) -> bool:
        return self.stored.dtype != self.original.dtype


@dataclass(frozen=True)
class StoredTensor:
    """What a writer has put into a file: `shape` of elements of `dtype`, and a row of numbers a block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    rows: tuple[Row, ...]


def step_bytes(entry: TensorEntry, compressed: bool, block_bytes: int) -> int:
    """Bytes of each block of a tensor but the last: whole rows if it is compressed."""
    row_bytes = entry.num_cols * torch.bfloat16.itemsize
    return max(1, block_bytes // row_bytes) * row_bytes if compressed else block_bytes


def cut(entry: TensorEntry, compressed: bool, block_bytes: int) -> Iterator[tuple[int, int]]:
    """First byte and number of bytes of each block of a tensor."""
    step = step_bytes(entry, compressed, block_bytes)
    return ((start, min(step, entry.nbytes - start)) for start in range(0, entry.nbytes, step))


def stored_order(entries: dict[str, TensorEntry]) -> list[str]:
    """The tensors' names as they follow each other in a packed file."""
    return sorted(entries, key=lambda name: (-DTYPE_BITS.get(entries[name].dtype, 0), entries[name].offset))


def has_gaps(entries: Iterable[TensorEntry], data_bytes: int) -> bool:
    """Are there bytes of the data that belong to none of these tensors (which do not overlap)?"""
    return sum(entry.nbytes for entry in entries) != data_bytes


def reserve_bytes(text: str, entries: dict[str, TensorEntry], block_bytes: int) -> int:
    """No less than the length prefix and the header that `render` will make for tensors of such an original."""
    num_blocks = sum(-(-2 * entry.nbytes // block_bytes) + 1 for entry in entries.values())
    return _round_up(1024 + 4 * len(json.dumps(text)) + 128 * len(entries) + 64 * num_blocks)


def render(text: str, tensors: Iterable[StoredTensor], block_bytes: int, reserved: int) -> bytes:
    """The first `reserved` bytes of a packed file, padded with spaces; the tensors' data follow in this order."""
    entries, rows, offset = {}, {}, 0
    for tensor in tensors:
        offsets = [offset, offset := offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
        rows[tensor.name] = tensor.rows
    metadata = write_packing(text, block_bytes, rows)
    header = dump({"__metadata__": metadata} | entries).encode()
    assert len(header) <= reserved - 8, (len(header), reserved)
    return struct.pack("<Q", reserved - 8) + header.ljust(reserved - 8)


def find_packed(directory: Path) -> dict[str, PackedTensor] | None:
    """Every tensor of the packed checkpoint in a directory, by name, or None where a plain one is there.

    Raises ValueError as find_packings does, and naming the file, and the tensor, that is not packed as it should be.
    """
    _, packings = find_packings(directory)
    if not packings:
        return None
    return {name: tensor for file, packing in packings.items() for name, tensor in _tensors(file, packing).items()}


def read_packed(file: Path) -> dict[str, PackedTensor]:
    """The tensors of a packed file. Raises ValueError naming the file, and the tensor if one is at fault."""
    return _tensors(file, read_packing(file))


def _tensors(file: Path, packing: Packing) -> dict[str, PackedTensor]:
    stored, original, data_start = read_header(file), packing.originals, 8 + len(packing.text)
    data_end = max((entry.offset + entry.nbytes for entry in original.values()), default=data_start)
    if stored.keys() != original.keys() or has_gaps(original.values(), data_end - data_start):
        raise ValueError(f"{file}: corrupt header: its tensors are not those of the original")
    return {name: _packed_tensor(name, original[name], stored[name], packing) for name in original}


def _packed_tensor(name: str, original: TensorEntry, stored: TensorEntry, packing: Packing) -> PackedTensor:
    compressed, rows = (stored.dtype, original.dtype) == (CODED, PLAIN) and original.nbytes > 0, packing.rows[name]
    num_blocks = -(-original.nbytes // step_bytes(original, compressed, packing.block_bytes))
    blocks, offset, sound = (
        [],
        stored.offset,
        compressed or (stored.dtype, stored.shape) == (original.dtype, original.shape),
    )
    if len(rows) == num_blocks and all(len(row) in ((2, 4) if compressed else (1,)) for row in rows):
        for (start, nbytes), row in zip(cut(original, compressed, packing.block_bytes), rows):
            layout = _layout(original.num_cols, nbytes, row) if compressed else None
            blocks.append(PackedBlock(start, nbytes, offset, row[0], row[1] if compressed else row[0], layout))
            offset += blocks[-1].stored_bytes
            sound = sound and blocks[-1].stored_bytes < nbytes + ALIGN_BYTES  # a block never grows
    if not sound or offset != stored.offset + stored.nbytes:
        raise ValueError(f"{stored.file}: corrupt header: {name} does not have the blocks that it is said to have")
    return PackedTensor(name, original, stored, tuple(blocks))


def _layout(num_cols: int, nbytes: int, row: Row) -> CompressedLayout:
    shape = (nbytes // torch.bfloat16.itemsize // num_cols, num_cols)
    return CompressedLayout(shape, torch.bfloat16, len(row) == 2, *row[2:])


def _round_up(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
