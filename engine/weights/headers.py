"""Headers of safetensors files: which tensors there are, and at which bytes. Torch-free but for reading the files.

A file is 8 bytes of header length (little endian), the header as JSON, then the data; offsets in the header count
from the data's start. Everything that a header can get wrong is refused here, before a byte of data is read.
"""

import math
import os
import re
import reprlib
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine.model.config_fields import FROM_GGUF_ALONE
from penstock.engine.model.families import HEADS
from penstock.engine.user_files import MAX_JSON_BYTES, named_errors, open_file, parse_json, read_json

MAX_DIMS = 64  # of a tensor, as torch has it
MAX_NAME = 1000  # characters of a tensor's name
MAX_NAMED = 20  # files that a message lists
NUM_NAMED = 5  # tensors that a message lists
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r".+-\d+-of-0*([2-9]|[1-9]\d+)\.safetensors")
DTYPE_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8, "F4": 4,
}  # fmt: skip

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of weights, as a ModelSpec has them


@dataclass(frozen=True)
class TensorEntry:
    """Holds where a tensor lies: `offset` is bytes from the start of `file`, `dtype` the format's name (F32, BF16,
    ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def num_cols(self) -> int:
        """Elements of a row; a 1-D tensor of n elements counts as (n, 1), as in `Piece`."""
        return math.prod(self.shape[1:])


def find_entries(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint in `directory`, by name. Raises ValueError naming the file or tensor at fault."""
    with named_errors(directory):
        if not directory.is_dir():
            raise ValueError(f"{directory}: no such directory")
        if os.path.lexists(directory / SINGLE):
            return read_header(directory / SINGLE)
        if os.path.lexists(directory / INDEX):
            return _indexed_entries(directory / INDEX)
        files = sorted(directory.glob("*.safetensors"))
        if len(files) == 1 and not _SHARD.fullmatch(files[0].name):
            return read_header(files[0])
        names = sorted(path.name for path in directory.iterdir())
        there = f"(there: {listed(names, MAX_NAMED) or 'nothing'})"
        ggufs = gguf_names(directory)
    if files:
        which = "several safetensors files" if len(files) > 1 else f"{files[0].name} is one shard of several,"
        raise ValueError(f"{directory}: {which} but no {INDEX} {there}")
    if ggufs:
        raise ValueError(f"{directory}: no safetensors file, but {listed(ggufs, MAX_NAMED)}: give the GGUF file itself")
    others = "other formats, like pytorch_model.bin, are not read: save_pretrained of transformers writes safetensors"
    raise ValueError(f"{directory}: no safetensors file {there}; {others}")


def has_weights(directory: Path) -> bool:
    """Tells whether there is anything in a directory that find_entries would read."""
    return os.path.lexists(directory / INDEX) or any(directory.glob("*.safetensors"))


def gguf_names(directory: Path) -> list[str]:
    """The GGUF files of a directory that may be given as a model: those that are a model's vision part are left out
    where there are others."""
    names = sorted(path.name for path in directory.glob("*.gguf"))
    return [name for name in names if "mmproj" not in name.lower()] or names


def listed(names: list[str], most: int = NUM_NAMED) -> str:
    """So many names for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_entries(
    where: Path,
    found: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[int, ...]],
    ignorable: tuple[str, ...],
    dtypes: Collection[str],
) -> None:
    """Raises ValueError unless every tensor of `expected` (name -> global shape) is there, with that shape and one of
    these dtypes, and every other one matches (whole name) a regular expression of `ignorable`."""

    def refuse(names: list[str], why: str) -> None:
        if names:
            raise ValueError(f"{where}: {len(names)} tensor(s) {why}: {listed(names)}")

    refuse([name for name in expected if name not in found], "missing from the checkpoint")
    wrong = [
        f"{name} has shape {found[name].shape}, the config asks for {tuple(shape)} ({found[name].file.name})"
        for name, shape in expected.items()
        if found[name].shape != tuple(shape)
    ]
    refuse(wrong, "with a wrong shape")
    wrong = [
        f"{name} is {found[name].dtype} ({found[name].file.name})"
        for name in expected
        if found[name].dtype not in dtypes
    ]
    refuse(wrong, f"with a dtype other than {', '.join(DTYPES)} ({FROM_GGUF_ALONE})")
    patterns = [re.compile(pattern) for pattern in ignorable]
    left = [name for name in found if name not in expected and not any(p.fullmatch(name) for p in patterns)]
    refuse(left, "that this model does not have: refused, for a weight left out would change the output")


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one file. Raises ValueError naming the file, and the tensor if one is at fault."""
    text, size = _read_text(file), file.stat().st_size
    header = _parse(file, text)
    header.pop("__metadata__", None)
    _check_lengths(f"{file}: corrupt header", header)
    entries = {name: _entry(file, name, info, 8 + len(text), size) for name, info in header.items()}
    check_overlaps(entries)
    return entries


def _read_text(file: Path) -> bytes:
    """The header's bytes, padding included. Raises ValueError naming the file if it is too short for one, or if the
    header is longer than JSON that is read."""
    with open_file(file) as stream:
        size, prefix = os.fstat(stream.fileno()).st_size, stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{file}: truncated: {size} bytes are no safetensors file")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > min(size - 8, MAX_JSON_BYTES):
            longer = f"the file ({size})" if header_bytes > size - 8 else f"is read of a header ({MAX_JSON_BYTES})"
            raise ValueError(
                f"{file}: the header is said to have {header_bytes} bytes, more than {longer}: "
                "truncated, or not a safetensors file"
            )
        return stream.read(header_bytes)


def _indexed_entries(index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(index, keep_too_large=True).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index}: corrupt: no weight_map from tensor to file name")
    _check_lengths(f"{index}: corrupt", weight_map)
    entries: dict[str, TensorEntry] = {}
    for file_name in sorted(set(weight_map.values())):
        file = index.parent / file_name
        if Path(file_name).name != file_name:
            raise ValueError(f"{index}: the shard file {file_name!r} is not in the checkpoint's directory")
        if not os.path.lexists(file):
            raise ValueError(f"{file}: missing shard file, named in {index.name}")
        for name, entry in read_header(file).items():
            if name in entries:
                raise ValueError(f"{name} is there twice: in {entries[name].file} and in {file}")
            entries[name] = entry
    for name, file_name in weight_map.items():
        if name in HEADS and name not in entries:
            continue  # some savers leave a tied head out of the shards only; `check` misses one that is needed
        if name not in entries or entries[name].file.name != file_name:
            raise ValueError(f"{index.parent / file_name}: has no tensor {name}, though {index.name} says so")
    return entries


def _check_lengths(where: str, names: Iterable[str]) -> None:
    longest = max(map(len, names), default=0)
    if longest > MAX_NAME:
        raise ValueError(f"{where}: a tensor's name has {longest} characters, more than {MAX_NAME}")


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    header = parse_json(text, f"{file}: corrupt header")
    if not isinstance(header, dict):
        raise ValueError(f"{file}: corrupt header: not a JSON object")
    return header


def _entry(file: Path, name: str, info: object, data_start: int, size: int) -> TensorEntry:
    try:
        dtype, shape, (start, stop) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        sound = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        sound = sound and len(shape) <= MAX_DIMS
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound or start > stop:
        raise ValueError(f"{file}: corrupt header: {name} is described as {reprlib.repr(info)}")
    if data_start + stop > size:
        raise ValueError(f"{file}: truncated: {name} ends at byte {data_start + stop}, but the file has {size} bytes")
    bits = DTYPE_BITS.get(dtype)
    if bits is not None and (stop - start) * 8 != math.prod(shape) * bits:
        raise ValueError(
            f"{file}: corrupt header: {name} of shape {shape} and dtype {dtype} cannot have {stop - start} bytes"
        )
    return TensorEntry(file, dtype, shape, data_start + start, stop - start)


def check_overlaps(entries: dict[str, TensorEntry]) -> None:
    """Raises ValueError, naming file and tensors, if two tensors of a file share bytes."""
    last_name, end = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < end and entry.nbytes:
            raise ValueError(f"{entry.file}: corrupt header: {name} overlaps the bytes of {last_name}")
        if entry.offset + entry.nbytes > end:
            last_name, end = name, entry.offset + entry.nbytes
