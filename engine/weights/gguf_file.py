"""Headers of GGUF files: metadata, and which tensors there are at which bytes. Torch-free; the data is not read.

A file is magic, version, the numbers of tensors and of keys; the keys with their values; the table of tensors; and,
from a multiple of general.alignment on, the data. Everything that a header can get wrong is refused here, in one line
that names the file and the field. A model in several files (NAME-00001-of-00003.gguf) is opened by any of them.
"""

import functools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine.kernels.ggml_types import GGML_TYPES, GGMLType
from penstock.engine.user_files import open_file
from penstock.engine.weights.gguf_values import HeaderValues
from penstock.engine.weights.headers import TensorEntry, check_overlaps
from penstock.scheduler.units import show_value

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_TENSORS = 100_000
MAX_SHARDS = 999
MAX_DIMS = 4
ALIGNMENT = 32  # where general.alignment says nothing
MAX_ALIGNMENT = 2**20
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF model. `metadata` maps keys to Python's values (numbers, bools, strings, lists of these), of
    the first file where there are several; `tensors` maps the file's own names to entries whose `dtype` is a type's
    name (F32, Q4_K ...), whose shape is torch's order (rows first) and whose offset counts from the file's start."""

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]


def is_gguf(path: str | Path) -> bool:
    """Tells whether a path names a GGUF file: by its ending alone, whether or not it is there."""
    return Path(path).suffix.lower() == ".gguf"


def gguf_files(path: str | Path) -> list[Path]:
    """The file, or all shards of the model that it is one of. Raises ValueError if one of them is missing."""
    return _shards(Path(path)) or [Path(path)]


def read_gguf(path: str | Path) -> GGUFHeader:
    """The header of a model, of one file or of all its shards. Raises ValueError naming the file, and the key or tensor
    that is at fault. The last one is kept, and read again once a file is another one: a start asks for it five times,
    and a large vocabulary takes a tenth of a second."""
    path = Path(path)
    shards = _shards(path)
    return _read(path, tuple(shards), tuple(map(_state, shards or [path])))


@functools.lru_cache(maxsize=1)
def _read(path: Path, shards: tuple[Path, ...], states: tuple) -> GGUFHeader:
    """The header of files in these states."""
    if not shards:
        header = _read_one(path)
        count = header.metadata.get("split.count", 1)
        if count not in (0, 1):
            why = f"split.count is {show_value(count)}, so it is a shard, and its name is not NAME-00001-of-0000N.gguf"
            raise ValueError(f"{path}: {why}")
        return header
    return _joined([_read_shard(shard, number, len(shards)) for number, shard in enumerate(shards)])


def _state(file: Path) -> tuple[int, ...] | None:
    """The state of a file, another one once it has been replaced or written to; None if there is none, as its reader
    will say."""
    try:
        found = file.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _shards(path: Path) -> list[Path]:
    """The files of the model that `path` is a shard of; empty if its name is not that of a shard."""
    named = _SHARD.fullmatch(path.name)
    if named is None:
        return []
    number, count = int(named["number"]), int(named["count"])
    if not 0 < number <= count <= MAX_SHARDS:
        raise ValueError(f"{path}: a shard has a number of 1 to its count, {MAX_SHARDS} at most")
    files = [path.with_name(f"{named['stem']}-{index:05}-of-{count:05}.gguf") for index in range(1, count + 1)]
    if missing := [file for file in files if not os.path.lexists(file)]:
        raise ValueError(f"{missing[0]}: missing: {path.name} is one of {count} shards")
    return files


def _read_shard(file: Path, number: int, count: int) -> GGUFHeader:
    header = _read_one(file)
    for key, expected in (("split.no", number), ("split.count", count)):
        found = header.metadata.get(key)
        if found != expected:
            raise ValueError(f"{file}: {key} is {show_value(found)}, and by its name it is {expected}")
    return header


def _joined(shards: list[GGUFHeader]) -> GGUFHeader:
    """All shards as one. A shard of another model shows by its number of tensors, a name that is there twice, or a key
    (other than split.*) with another value."""
    first, tensors = shards[0], {}
    for shard in shards:
        for key in ("split.tensors.count", *(key for key in shard.metadata if not key.startswith("split."))):
            if shard.metadata.get(key) != first.metadata.get(key):
                raise ValueError(
                    f"{shard.file}: {key} is another one than in {first.file.name}: a shard of another model"
                )
        for name, entry in shard.tensors.items():
            if name in tensors:
                raise ValueError(f"{shard.file}: {name} is in {tensors[name].file.name} too: a shard of another model")
            tensors[name] = entry
    stated = first.metadata.get("split.tensors.count")
    if stated != len(tensors):
        raise ValueError(
            f"{first.file}: split.tensors.count is {show_value(stated)}, and the shards have {len(tensors)}"
        )
    return GGUFHeader(first.file, first.metadata, tensors)


def _read_one(file: Path) -> GGUFHeader:
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        values = HeaderValues(str(file), stream, size)
        num_tensors, num_keys = _read_counts(values)
        metadata = _read_metadata(values, num_keys)
        alignment = _read_alignment(values, metadata)
        described = _read_table(values, num_tensors)
    data_start = math.ceil(values.position / alignment) * alignment
    tensors = {name: _entry(file, name, each, data_start, alignment, size) for name, each in described.items()}
    check_overlaps(tensors)
    return GGUFHeader(file, metadata, tensors)


def _read_counts(values: HeaderValues) -> tuple[int, int]:
    """The numbers of tensors and of keys."""
    if values.size < len(MAGIC) or (magic := bytes(values.numbers("B", len(MAGIC)))) != MAGIC:
        found = show_value(magic) if values.size >= len(MAGIC) else f"has {values.size} bytes"
        raise ValueError(f"{values.file}: is no GGUF file: it does not begin with {MAGIC!r} ({found})")
    version = values.number("I")
    if version not in VERSIONS:
        told = "is big-endian, which is not read" if version >> 16 else "is not read"
        raise ValueError(f"{values.file}: version: {version} {told}; read are {' and '.join(map(str, VERSIONS))}")
    num_tensors, num_keys = values.numbers("Q", 2)
    for what, count, least in (("number of tensors", num_tensors, 32), ("number of keys", num_keys, 13)):
        if count > min(MAX_TENSORS, values.size // least):
            raise ValueError(f"{values.file}: {what}: {count} is more than a file of {values.size} bytes can have")
    return num_tensors, num_keys


def _read_metadata(values: HeaderValues, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(num_keys):
        key = values.name(f"key {index}")
        values.field = key
        if key in metadata:
            raise values.error("is there twice")
        metadata[key] = values.value()
    return metadata


def _read_alignment(values: HeaderValues, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        found = show_value(alignment)
        raise ValueError(
            f"{values.file}: general.alignment must be a power of two from 8 to {MAX_ALIGNMENT}, not {found}"
        )
    return alignment


def _read_table(values: HeaderValues, num_tensors: int) -> dict[str, tuple[GGMLType, tuple[int, ...], int]]:
    """Each tensor's type, shape and offset in the data, by name."""
    described: dict[str, tuple[GGMLType, tuple[int, ...], int]] = {}
    for index in range(num_tensors):
        name = values.name(f"tensor {index}")
        values.field = name
        if name in described:
            raise values.error("is there twice")
        num_dims = values.number("I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise values.error(f"{num_dims} dimensions, and a tensor has 1 to {MAX_DIMS}")
        shape = values.numbers("Q", num_dims)[::-1]
        kind, offset = values.number("I"), values.number("Q")
        if kind not in GGML_TYPES:
            raise values.error(f"there is no type {kind}")
        if not 0 < math.prod(shape) < 2**48 or shape[-1] % GGML_TYPES[kind].block:
            told = f"a row of {GGML_TYPES[kind].name} has a multiple of {GGML_TYPES[kind].block} weights"
            raise values.error(f"its shape {shape} cannot be: {told}")
        described[name] = GGML_TYPES[kind], shape, offset
    return described


def _entry(
    file: Path, name: str, described: tuple[GGMLType, tuple[int, ...], int], data_start: int, alignment: int, size: int
) -> TensorEntry:
    kind, shape, offset = described
    nbytes = kind.row_bytes(math.prod(shape))
    if offset % alignment:
        raise ValueError(f"{file}: {name}: its offset {offset} is no multiple of general.alignment, {alignment}")
    end = data_start + offset + nbytes
    if end > size:
        raise ValueError(f"{file}: {name}: truncated: it ends at byte {end}, but the file has {size} bytes")
    return TensorEntry(file, kind.name, shape, data_start + offset, nbytes)
