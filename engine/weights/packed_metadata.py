"""What the files of a packed checkpoint say of their originals (packed_format.py), as metadata of their headers:

    penstock_packed     the version of this format
    penstock_header     the original file's header, to the last space
    penstock_blocks     block_bytes, and for each tensor a row of numbers a block: the checksum of what is here; if
                        compressed, that of what it was; if the block is not raw, its number of escapes and of patches
    penstock_checksum   of the two before, in hexadecimal

Checksums are CRC-32. Torch-free but for reading headers.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine.user_files import parse_json
from penstock.engine.weights.headers import TensorEntry, find_entries, parse_header, read_metadata
from penstock.scheduler.units import GIB

PACKED, HEADER, BLOCKS, CHECKSUM = (f"penstock_{name}" for name in ("packed", "header", "blocks", "checksum"))
VERSION = "1"
MAX_BLOCK_BYTES = GIB  # a reader has some of them in memory

Row = tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """How a file was packed: its original's header, and the tensors there, bytes of a block, and each tensor's rows."""

    text: bytes
    originals: dict[str, TensorEntry]
    block_bytes: int
    rows: dict[str, list[Row]]

    def original_checksums(self, name: str) -> tuple[int, ...]:
        """block_bytes, and the checksum that each block of a tensor had in the original."""
        return self.block_bytes, *(row[1] if len(row) > 1 else row[0] for row in self.rows[name])


def find_packings(directory: Path) -> tuple[dict[str, TensorEntry], dict[Path, Packing]]:
    """Every tensor of the checkpoint in a directory as its original has it, by name, and the packing of each file; no
    packings where a plain one is there. Raises ValueError as find_entries and read_packing do, and if only some of the
    files are packed."""
    entries = find_entries(directory)
    files = sorted({entry.file for entry in entries.values()})
    metadata = {file: read_metadata(file) for file in files}
    packed = [file for file in files if PACKED in metadata[file]]
    plain = sorted(set(files) - set(packed))
    if packed and plain:
        raise ValueError(f"{plain[0]}: not packed, but {packed[0].name} beside it is")
    if not packed:
        return entries, {}
    packings = {file: _packing(file, metadata[file]) for file in files}
    return {name: entry for each in packings.values() for name, entry in each.originals.items()}, packings


def read_packing(file: Path) -> Packing:
    """Of a file that is packed. Raises ValueError naming it if that is not whole."""
    return _packing(file, read_metadata(file))


def write_packing(text: str, block_bytes: int, rows: dict[str, tuple[Row, ...]]) -> dict[str, str]:
    """The metadata that say so; `text` is the original's header."""
    blocks = dump({"block_bytes": block_bytes, "tensors": rows})
    return {PACKED: VERSION, HEADER: text, BLOCKS: blocks, CHECKSUM: checksum(text, blocks)}


def checksum(text: str, blocks: str) -> str:
    return f"{zlib.crc32(blocks.encode(), zlib.crc32(text.encode())):08x}"


def dump(value: dict) -> str:
    return json.dumps(value, separators=(",", ":"))


def _packing(file: Path, metadata: dict[str, Any]) -> Packing:
    if metadata[PACKED] != VERSION:
        raise ValueError(
            f"{file}: packed in version {str(metadata[PACKED])[:20]!r} of the format; {VERSION} is read here"
        )
    try:
        text, blocks = metadata[HEADER], metadata[BLOCKS]
        intact = metadata[CHECKSUM] == checksum(text, blocks)
        table = parse_json(blocks, str(file))
        block_bytes, rows = table["block_bytes"], table["tensors"]
        all_rows = [row for tensor in rows.values() for row in tensor]
        numbers = [block_bytes - 1, *(n for row in all_rows for n in row)]
        sound = intact and all(type(n) is int and n >= 0 for n in numbers) and block_bytes <= MAX_BLOCK_BYTES
        sound = sound and all(len(row) in (1, 2, 4) for row in all_rows)
    except (KeyError, TypeError, AttributeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{file}: corrupt header: what it says of the packing is not whole")
    originals = parse_header(file, text.encode())
    if originals.keys() != rows.keys():
        raise ValueError(f"{file}: corrupt header: its tensors are not those of the original")
    return Packing(text.encode(), originals, block_bytes, rows)
