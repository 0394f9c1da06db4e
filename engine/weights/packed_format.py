"""The format of a packed checkpoint: for each safetensors file of the original one of the same name, with the same
tensors, of which those that shrink are coded. PURE but for reading headers.

A coded tensor is bytes (U8, one dimension): the blobs of its blocks in a row, whole rows of the original of about
`block_bytes` each. Any other tensor is there as it was, checked in blocks too. So an index remains true, any reader of
safetensors can open the file, and a reader that takes a coded tensor for the original stumbles over its shape. The
header's metadata say the rest:

    penstock_packed     the version of this format
    penstock_header     the original file's header, to the last space
    penstock_blocks     block_bytes, and for each tensor a row of numbers a block: the checksum of what is here; if
                        coded, that of what it was; if the block is not raw, its number of escapes and of patches
    penstock_checksum   of the two before, in hexadecimal

Checksums are CRC-32. Tensors lie in the order of their elements' sizes, so each is aligned.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.weights.codec import CodeLayout
from engine.weights.safetensors_header import (
    DTYPE_BITS,
    TensorEntry,
    find_entries,
    parse_header,
    read_header,
    read_metadata,
)

PACKED, HEADER, BLOCKS, CHECKSUM = (f"penstock_{name}" for name in ("packed", "header", "blocks", "checksum"))
VERSION = "1"
CODED, PLAIN = "U8", "BF16"  # the dtype of a coded tensor, and what it was
ALIGN_BYTES = 16

Row = tuple[int, ...]


@dataclass(frozen=True)
class PackedBlock:
    """The `nbytes` bytes of a tensor that begin at its byte `start`, and their place in the packed file. `layout` is of
    (rows, columns); None: they are there as they were."""

    start: int
    nbytes: int
    offset: int
    checksum: int
    original_checksum: int
    layout: CodeLayout | None

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
    def coded(self) -> bool:
        return self.stored.dtype != self.original.dtype


@dataclass(frozen=True)
class StoredTensor:
    """What a writer has put into a file: `shape` of elements of `dtype`, and a row of numbers a block."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    rows: tuple[Row, ...]


def cut(entry: TensorEntry, coded: bool, block_bytes: int) -> Iterator[tuple[int, int]]:
    """First byte and number of bytes of each block of a tensor: whole rows if it is coded."""
    step = block_bytes
    if coded:
        row_bytes = entry.num_cols * torch.bfloat16.itemsize
        step = max(1, block_bytes // row_bytes) * row_bytes
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
    blocks = _dump({"block_bytes": block_bytes, "tensors": rows})
    metadata = {PACKED: VERSION, HEADER: text, BLOCKS: blocks, CHECKSUM: _checksum(text, blocks)}
    header = _dump({"__metadata__": metadata} | entries).encode()
    assert len(header) <= reserved - 8, (len(header), reserved)
    return struct.pack("<Q", reserved - 8) + header.ljust(reserved - 8)


def find_packed(directory: Path) -> dict[str, PackedTensor] | None:
    """Every tensor of the packed checkpoint in a directory, by name, or None where a plain one is there.

    Raises ValueError as find_entries does, and naming the file, and the tensor, that is not packed as it should be.
    """
    files = sorted({entry.file for entry in find_entries(directory).values()})
    packed = [file for file in files if PACKED in read_metadata(file)]
    plain = sorted(set(files) - set(packed))
    if packed and plain:
        raise ValueError(f"{plain[0]}: not packed, but {packed[0].name} beside it is")
    return {name: tensor for file in packed for name, tensor in read_packed(file).items()} if packed else None


def original_header(file: Path) -> bytes:
    """The original header's bytes, as a packed file keeps them; `read_packed` checks them."""
    return read_metadata(file)[HEADER].encode()


def read_packed(file: Path) -> dict[str, PackedTensor]:
    """The tensors of a packed file. Raises ValueError naming the file, and the tensor if one is at fault."""
    text, block_bytes, rows = _packing(file, read_metadata(file))
    stored, original = read_header(file), parse_header(file, text)
    data_start = 8 + len(text)
    data_end = max((entry.offset + entry.nbytes for entry in original.values()), default=data_start)
    if not stored.keys() == original.keys() == rows.keys() or has_gaps(original.values(), data_end - data_start):
        raise ValueError(f"{file}: corrupt header: its tensors are not those of the original")
    return {name: _packed_tensor(name, original[name], stored[name], rows[name], block_bytes) for name in original}


def _packing(file: Path, metadata: dict[str, object]) -> tuple[bytes, int, dict[str, list[Row]]]:
    """The original header, block_bytes, and the rows of each tensor."""
    if metadata[PACKED] != VERSION:
        raise ValueError(f"{file}: packed in version {metadata[PACKED]!r} of the format; {VERSION} is read here")
    try:
        text, blocks = metadata[HEADER], metadata[BLOCKS]
        intact = metadata[CHECKSUM] == _checksum(text, blocks)
        table = json.loads(blocks)
        block_bytes, rows = table["block_bytes"], table["tensors"]
        numbers = [block_bytes - 1, *(n for tensor in rows.values() for row in tensor for n in row)]
        sound = intact and all(type(n) is int and n >= 0 for n in numbers)
    except (KeyError, TypeError, AttributeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{file}: corrupt header: what it says of the packing is not whole")
    return text.encode(), block_bytes, rows


def _packed_tensor(
    name: str, original: TensorEntry, stored: TensorEntry, rows: list[Row], block_bytes: int
) -> PackedTensor:
    coded = (stored.dtype, original.dtype) == (CODED, PLAIN) and original.nbytes > 0
    ranges = list(cut(original, coded, block_bytes))
    blocks, offset = [], stored.offset
    if len(rows) == len(ranges) and all(len(row) in ((2, 4) if coded else (1,)) for row in rows):
        for (start, nbytes), row in zip(ranges, rows):
            layout = _layout(original.num_cols, nbytes, row) if coded else None
            blocks.append(PackedBlock(start, nbytes, offset, row[0], row[1] if coded else row[0], layout))
            offset += blocks[-1].stored_bytes
    same = coded or (stored.dtype, stored.shape) == (original.dtype, original.shape)
    if not same or offset != stored.offset + stored.nbytes:
        raise ValueError(f"{stored.file}: corrupt header: {name} does not have the blocks that it is said to have")
    return PackedTensor(name, original, stored, tuple(blocks))


def _layout(num_cols: int, nbytes: int, row: Row) -> CodeLayout:
    shape = (nbytes // torch.bfloat16.itemsize // num_cols, num_cols)
    return CodeLayout(shape, torch.bfloat16, len(row) == 2, *row[2:])


def _checksum(text: str, blocks: str) -> str:
    return f"{zlib.crc32(blocks.encode(), zlib.crc32(text.encode())):08x}"


def _dump(value: dict) -> str:
    return json.dumps(value, separators=(",", ":"))


def _round_up(nbytes: int) -> int:
    return -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
