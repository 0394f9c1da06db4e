"""The values of a GGUF header, one after another, read within bounds. Torch-free.

A header has no length of its own, so it is read as far as it is asked for, and no further than MAX_HEADER_BYTES. What
a count promises is compared with the bytes that are left before anything is made of it.
"""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

from penstock.scheduler.units import MIB, show_value

# The largest headers that are published have 20 MiB and a million values: a vocabulary of 262k and its merges.
MAX_HEADER_BYTES = 128 * MIB
MAX_VALUES = 4_000_000
MAX_DEPTH = 4  # of arrays in arrays
MAX_NAME_BYTES = 256  # of a key or a tensor's name
_READ_BYTES = MIB
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LENGTH = struct.Struct("<Q")  # of a string


class HeaderValues:
    """A cursor over a header. Every error is a ValueError of one line that begins with the file and `field`, which the
    reader of a value sets."""

    def __init__(self, file: str, stream: BinaryIO, size: int):
        self.file, self.size, self.field = file, size, "header"
        self.position = 0
        self._stream, self._data = stream, bytearray()
        self._num_values = 0

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.file}: {self.field}: {message}")

    def numbers(self, code: str, count: int = 1) -> tuple:
        """The next `count` numbers of a struct code."""
        layout = f"<{count}{code}"
        return struct.unpack_from(layout, self._data, self._take(struct.calcsize(layout)))

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def name(self, what: str) -> str:
        """The next string, which is a key or a tensor's name."""
        self.field = what
        length = self.number("Q")
        if not 0 < length <= MAX_NAME_BYTES:
            raise self.error(f"its name is said to have {length} bytes, and a name has 1 to {MAX_NAME_BYTES}")
        name = self._text(length)
        if not name.isprintable():  # messages of one line show it
            raise self.error(f"its name is {show_value(name)}")
        return name

    def value(self) -> Any:
        """The next value behind its type: a number, a bool, a string or a list."""
        return self._value(self.number("I"), 0)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _NUMBERS:
            self._counted(1, 1)
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self._strings(1)[0]
        if kind == _ARRAY:
            return self._array(depth + 1)
        raise self.error(f"there is no type of value {kind}")

    def _array(self, depth: int) -> list:
        if depth > MAX_DEPTH:
            raise self.error(f"arrays are nested deeper than {MAX_DEPTH}")
        kind, count = self.numbers("I")[0], self.number("Q")
        if kind in _NUMBERS:
            self._counted(count, struct.calcsize(_NUMBERS[kind]))
            return list(self.numbers(_NUMBERS[kind], count))
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            self._counted(count, 12)
            return [self._array(depth + 1) for _ in range(count)]
        raise self.error(f"there is no type of value {kind}")

    def _strings(self, count: int) -> list[str]:
        """A loop of few calls: a vocabulary and its merges are half a million strings."""
        self._counted(count, 8)
        data, end, texts = self._data, self.position, []
        with self._utf8():
            for _ in range(count):
                start = end + 8
                if start > len(data):
                    self._read(start)
                end = start + _LENGTH.unpack_from(data, end)[0]
                if end > len(data):
                    self._read(end)
                texts.append(data[start:end].decode())
        self.position = end
        return texts

    def _text(self, length: int) -> str:
        start = self._take(length)
        with self._utf8():
            return self._data[start : start + length].decode()

    @contextlib.contextmanager
    def _utf8(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            raise self.error(f"a string is not UTF-8: {show_value(bytes(error.object[:40]))}") from None

    def _counted(self, count: int, least_bytes: int) -> None:
        """Raises ValueError unless so many values, of at least so many bytes each, can follow."""
        self._num_values += count
        if count * least_bytes > self.size - self.position:
            raise self.error(
                f"{count} values are said to follow, and the file ends {self.size - self.position} bytes on"
            )
        if self._num_values > MAX_VALUES:
            raise self.error(f"{self._num_values} values, and {MAX_VALUES} are the most that are read of a header")

    def _take(self, nbytes: int) -> int:
        """Moves behind the next bytes, which are in memory then; returns where they start."""
        start, end = self.position, self.position + nbytes
        if end > len(self._data):
            self._read(end)
        self.position = end
        return start

    def _read(self, end: int) -> None:
        if end > self.size:
            raise self.error(f"truncated: it ends at byte {end}, but the file has {self.size} bytes")
        if end > MAX_HEADER_BYTES:
            raise self.error(f"it ends at byte {end}, and {MAX_HEADER_BYTES} are the most that are read of a header")
        self._data += self._stream.read(max(end - len(self._data), _READ_BYTES))
        if end > len(self._data):
            raise self.error("the file became shorter while it was read")
