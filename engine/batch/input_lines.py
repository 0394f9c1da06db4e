"""The rows of an input file, found once and read lazily: where each line begins, and what tells whether it has changed.

Memory is 26 bytes a row, in arrays, whatever the rows hold.
"""

import hashlib
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from penstock.engine.batch.rows import MOST_LINE_BYTES, Row
from penstock.engine.user_files import open_file

MOST_REASONS = 10  # that an error tells, each with a line at fault
MOST_NAMED = 5  # further lines with such a fault that it names
_SHOWN = re.compile(r"=.*: |(['\"]).*\1|\d\w*")  # what a line has, in the text of its fault
ReadRow = Callable[[bytes, int], Row]  # a line and its number; raises ValueError, naming both


@dataclass
class InputLines:
    """The lines of a file that are not blank, by index. `numbers` are their numbers in the file, from 1 on, `offsets`
    the bytes before them, `marks` hashes of their bytes that hold in this process alone. A row has `num_sequences`,
    each of `most_tokens` output tokens at most, 0 for as many as fit. `sha256` is that of the whole file."""

    path: Path
    sha256: str = ""
    numbers: array = field(default_factory=lambda: array("I"))
    offsets: array = field(default_factory=lambda: array("Q"))
    marks: array = field(default_factory=lambda: array("q"))
    most_tokens: array = field(default_factory=lambda: array("I"))
    num_sequences: array = field(default_factory=lambda: array("H"))

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, stream: BinaryIO, index: int) -> bytes:
        """A line. Raises ValueError if it is not what it was when the file was checked."""
        stream.seek(self.offsets[index])
        line = stream.readline(MOST_LINE_BYTES + 1)
        if hash(line) != self.marks[index]:
            raise ValueError(f"{self.path}, line {self.numbers[index]}: has changed since the job began")
        return line


def check_lines(path: str | Path, read_row: ReadRow) -> InputLines:
    """All rows of a file, each read once. Raises ValueError for a line that is at fault, or repeats a custom_id; its
    notes name lines that are for other reasons."""
    found, ids, faults = InputLines(Path(path)), array("q"), _Faults(path)
    digest = hashlib.sha256()
    with open_file(path) as stream:
        for number, offset, line in _lines(stream):
            digest.update(line)
            if not line.strip():
                continue
            try:
                row = read_row(line, number)
            except ValueError as error:
                faults.add(number, str(error))
                continue
            found.numbers.append(number)
            found.offsets.append(offset)
            found.marks.append(hash(line))
            found.most_tokens.append(row.asked.params.max_tokens or 0)
            found.num_sequences.append(row.num_sequences)
            ids.append(hash(row.custom_id))
        _check_ids(
            found, ids, lambda index: read_row(found.read(stream, index), found.numbers[index]).custom_id, faults
        )
        faults.check()
        if not found.numbers:
            raise ValueError(f"{path}: has no line with a request")
    found.sha256 = digest.hexdigest()
    return found


def _lines(stream: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Each line's number, offset and bytes, with its end. One that is too long comes in parts that have the same
    number, the first of which is too long."""
    number, offset, ended = 0, 0, True
    while line := stream.readline(MOST_LINE_BYTES + 1):
        number += ended
        yield number, offset, line
        offset += len(line)
        ended = line.endswith(b"\n")


class _Faults:
    """Lines that are at fault, found in any order, by reason: the text of the fault without what that line has."""

    def __init__(self, path: str | Path):
        self._path, self._last = path, 0
        self._alike: dict[str, _Alike] = {}
        self._num_others = 0  # lines with none of the first MOST_REASONS

    def add(self, number: int, fault: str) -> None:
        if number == self._last:  # another part of a line that is too long
            return
        self._last = number
        reason = _SHOWN.sub("", fault.split(f", line {number}: ", 1)[-1])
        if reason in self._alike or len(self._alike) < MOST_REASONS:
            self._alike.setdefault(reason, _Alike()).add(number, fault)
        else:
            self._num_others += 1

    def check(self) -> None:
        if not self._alike:
            return
        told, *notes = [alike.describe() for alike in sorted(self._alike.values(), key=lambda alike: alike.first)]
        if self._num_others:
            notes.append(f"{self._path}: lines at fault for other reasons: {self._num_others}")
        error = ValueError(told)
        for note in notes:
            error.add_note(note)
        raise error


class _Alike:
    """Lines that are at fault for one reason: how many, and the first of them, each with its fault."""

    def __init__(self):
        self.num_lines, self.first = 0, []

    def add(self, number: int, fault: str) -> None:
        self.num_lines += 1
        self.first = sorted([*self.first, (number, fault)])[: MOST_NAMED + 1]

    def describe(self) -> str:
        (_, fault), *others = self.first
        more = self.num_lines - 1
        rest = ", ..." if more > len(others) else ""
        named = f"; {more} more alike: line {', '.join(str(number) for number, _ in others)}{rest}" if more else ""
        return f"{fault}{named}"


def _check_ids(found: InputLines, ids: array, custom_id: Callable[[int], str], faults: _Faults) -> None:
    """Finds lines whose custom_id is there already. Ids of one hash are rare, and only they are read again."""
    hashes = np.frombuffer(ids, dtype=np.int64)
    order = np.argsort(hashes, kind="stable")
    in_order = hashes[order]
    for twice in np.unique(in_order[1:][in_order[1:] == in_order[:-1]]):
        first, end = np.searchsorted(in_order, twice), np.searchsorted(in_order, twice, "right")
        line_with: dict[str, int] = {}
        for index in map(int, order[first:end]):
            text, number = custom_id(index), found.numbers[index]
            first_line = line_with.setdefault(text, number)
            if first_line != number:
                fault = f"custom_id {text[:200]!r} is there already, in line {first_line}"
                faults.add(number, f"{found.path}, line {number}: {fault}")
