"""Reads files that a user names, within bounds: non-files, too large ones, git-lfs pointers and bad JSON are refused.

Torch-free. Every error is a ValueError of one line that names the file, and the field where one is at fault.
"""

import contextlib
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from penstock.scheduler.units import MIB

# Of any JSON: the largest index and tokenizer files that are published have under 40 MiB and 2 million values, names of
# fields among them. One emoji makes a text take four bytes a character; a value takes up to 200 bytes beside them.
MAX_JSON_BYTES = 64 * MIB
MAX_JSON_VALUES = 4_000_000
MAX_JSON_DEPTH = 64
MAX_DIGITS = 20  # of an integer: 2**64 has as many
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


class TooLarge(float):
    """A number in JSON beyond what a field can hold: infinite, so that no check of a size or a rate takes it, and shown
    as it stands in the file."""

    def __new__(cls, text: str) -> "TooLarge":
        number = super().__new__(cls, "-inf" if text.startswith("-") else "inf")
        number.text = text if len(text) <= MAX_DIGITS else f"{text[:MAX_DIGITS]}... ({len(text)} characters)"
        return number

    def __repr__(self) -> str:
        return f"{self.text}, a number that is too large"


@contextlib.contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """A context for work on a file or directory: it turns an OSError into a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading. Raises ValueError if there is none, for a pipe, a device or a directory, and
    for a git-lfs pointer; an OSError while it is read is a ValueError too."""
    path = Path(path)
    with named_errors(path):
        check_regular(path)
        with open(path, "rb") as stream:
            check_no_pointer(path, stream.read(len(_LFS_POINTER)))
            stream.seek(0)
            yield stream


def refuse_cache_root(path: Path) -> None:
    """Raises ValueError for the directory in which a Hugging Face cache keeps all snapshots of a model."""
    snapshots = path / "snapshots"
    if snapshots.is_dir() and not (path / "config.json").exists():
        hashes = sorted(each.name for each in snapshots.iterdir())
        there = f" (there: {', '.join(hashes[:3])})" if hashes else ""
        raise ValueError(f"{path}: is a model's root in a Hugging Face cache: give {snapshots}/HASH{there}")


def check_regular(path: Path) -> None:
    """Raises ValueError if the path is no regular file: opening a pipe would wait for its writer, and a device has no
    end. Raises OSError if nothing is there."""
    if "\0" in str(path):
        raise ValueError(f"{path}: no file can have such a name")
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
        raise ValueError(f"{path}: is {kind}, and a file is expected")


def check_output(flag: str, path: str | Path) -> None:
    """Raises ValueError, naming flag and file, if no file can be written there. It is called before the work whose
    result the file will hold. Directories are not made."""
    path = Path(path)
    try:
        if not path.exists() and not path.parent.is_dir():
            raise ValueError(f"{path}: no such directory")
        if path.exists():
            check_regular(path)
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{path}: Permission denied")
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{flag} {error}") from error


def has_lone_surrogate(text: str) -> bool:
    """Tells whether a string has half of a surrogate pair, as Python's strings and JSON's escapes may, and so is no
    text."""
    try:
        text.encode()  # nothing else cannot be; to look at each letter takes a prompt a hundred times as long
    except UnicodeEncodeError:
        return True
    return False


def check_no_pointer(path: Path, start: bytes) -> None:
    """Raises ValueError if a file that starts so is a pointer, which git leaves if git-lfs did not fetch the file."""
    if start.startswith(_LFS_POINTER):
        raise ValueError(f"{path}: is a git-lfs pointer, the file itself was not fetched: run `git lfs pull` there")


def read_bytes(path: str | Path, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """A whole file. Raises ValueError as open_file does, and if it has more than `most_bytes`."""
    with open_file(path) as stream:
        content = stream.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path}: has more than {most_bytes} bytes, the most that are read of such a file")
    return content


def read_json(path: str | Path, keep_too_large: bool = False) -> dict[str, Any]:
    """A file that holds one JSON object. Raises ValueError as read_bytes and parse_json do."""
    content = parse_json(read_bytes(path), str(path), keep_too_large)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is not a JSON object")
    return content


def parse_json(text: bytes | str, where: str, keep_too_large: bool = False) -> Any:
    """Parses JSON to Python's values. Raises ValueError, beginning with `where`, if it is not UTF-8, not JSON, has more
    than MAX_JSON_BYTES or MAX_JSON_VALUES or is nested deeper than MAX_JSON_DEPTH, or has a name twice in one object or
    a number of over 20 digits or beyond a float. `keep_too_large` is for objects of which only some fields are read:
    such a number is then a TooLarge, which only the reader of its field refuses."""
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{where}: has more than {MAX_JSON_BYTES} bytes, the most that are read of JSON")
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    if sum(map(decoded.count, ",:[{")) > MAX_JSON_VALUES:
        raise ValueError(f"{where}: has more than {MAX_JSON_VALUES} values, the most that are read")
    try:
        content = (_DECODER if _may_have_large(text) else _QUICK_DECODER).decode(decoded)
    except RecursionError:
        raise ValueError(f"{where}: is nested deeper than {MAX_JSON_DEPTH} objects and lists") from None
    except _TwiceNamed as error:
        raise ValueError(f"{where}: {error} is there twice") from None
    except ValueError as error:
        raise ValueError(f"{where}: is not JSON: {error}") from None
    _check(content, where, keep_too_large)
    return content


class _TwiceNamed(Exception):
    """Its text is the name, quoted."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise _TwiceNamed(repr(twice[:200]))
    return content


def _integer(text: str) -> int | TooLarge:
    return int(text) if len(text) <= MAX_DIGITS or len(text.lstrip("-")) <= MAX_DIGITS else TooLarge(text)


def _float(text: str) -> float:
    return number if math.isfinite(number := float(text)) else TooLarge(text)


_CHECKED = (dict, list, TooLarge)  # a union takes ten times as long
_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, object_pairs_hook=_object)
_QUICK_DECODER = json.JSONDecoder(parse_float=_float, object_pairs_hook=_object)  # no call for each token of a prompt
_SAME_DIGIT = bytes.maketrans(b"123456789", b"000000000")


def _may_have_large(text: bytes | str) -> bool:
    """Tells whether there may be an integer of over MAX_DIGITS digits."""
    return isinstance(text, str) or b"0" * (MAX_DIGITS + 1) in text.translate(_SAME_DIGIT)


def _check(content: Any, where: str, keep_too_large: bool) -> None:
    """Refuses numbers and depths by the field that has them. One iterator for each object or list that is open: without
    recursion, and in little memory."""
    path, opened = [], [_parts([content])]
    while opened:
        name, value = next(opened[-1], (None, None))
        if name is None:
            opened.pop()
            path = path[:-1]
        elif isinstance(value, TooLarge):
            if not keep_too_large:
                field = ".".join(map(str, [*path, name][1:]))[:200] or "it"
                raise ValueError(f"{where}: {field} is {value!r}")
        else:
            path = [*path, name]
            if len(opened) > MAX_JSON_DEPTH:
                field = ".".join(map(str, path[1:]))[:200]
                raise ValueError(f"{where}: {field} is nested deeper than {MAX_JSON_DEPTH} objects and lists")
            opened.append(_parts(value))


def _parts(content: dict | list) -> Iterator[tuple[str | int, Any]]:
    """Says what may be at fault of an object or a list, by name or index."""
    if isinstance(content, list) and set(map(type, content)).isdisjoint(_CHECKED):  # as token ids
        return iter(())
    parts = content.items() if isinstance(content, dict) else enumerate(content)
    return ((name, part) for name, part in parts if isinstance(part, _CHECKED))
