"""Safetensors checkpoints, read with preadv straight to where the weights are wanted.

The safetensors library maps files, and mapped pages that were touched count as resident memory. Here only the bytes
that are asked for are read, and only headers until every expected tensor is known to be present and whole.
This file does not know what a tensor is for: pieces come from the layout.
"""

import contextlib
import ctypes
import math
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from penstock.engine.model.shard import Piece
from penstock.engine.weights.headers import DTYPES, TensorEntry, check_entries, find_entries, listed
from penstock.engine.weights.views import TORCH_DTYPES
from penstock.scheduler.units import MIB
from torch import Tensor

FILE_DTYPES = {name: TORCH_DTYPES[dtype] for name, dtype in DTYPES.items()}
CONVERT_BYTES = 8 * MIB  # a thread's buffer for conversion: 8 threads stay well under the 200 MB that loading may take


class Checkpoint:
    """A directory of safetensors files. `open` reads the headers, `check` compares them with what a model expects,
    then any number of threads may call `read_piece`. It is a context manager that closes the files at its end."""

    dtypes: Mapping[str, torch.dtype] = FILE_DTYPES  # that are read, by the files' names

    def __init__(self, directory: Path, entries: dict[str, TensorEntry]):
        self.directory, self.entries = directory, entries
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._not_finite: dict[str, str] = {}

    @classmethod
    def open(cls, directory: str | Path) -> "Checkpoint":
        """Reads the headers of model.safetensors, of the files of model.safetensors.index.json, or of the only
        *.safetensors file there is. Raises ValueError naming the file or tensor that is missing or broken."""
        directory = Path(directory)
        return cls(directory, find_entries(directory))

    def check(self, expected: Mapping[str, tuple[int, ...]], ignorable: tuple[str, ...]) -> None:
        """Raises ValueError as check_entries does, for a dtype that is not read."""
        check_entries(self.directory, self.entries, expected, ignorable, self.dtypes)

    def read_piece(self, piece: Piece, out: Tensor) -> int:
        """Reads a rectangle into `out`, a CPU view (num_rows, num_cols) of any float dtype whose rows are contiguous;
        of bytes, if the tensor is quantised.

        Returns the bytes read: those of the rectangle, no more. Values that are not finite are remembered for
        `finish`. Raises ValueError if the file ends early and OSError if it cannot be read, naming file and tensor.
        """
        entry = self.entries[piece.tensor]
        dtype = self.dtypes[entry.dtype]
        with _naming(entry.file, piece.tensor):
            if out.dtype == dtype:
                num_read = self._read_rows(piece.tensor, piece.row, piece.col, out)
            else:
                num_read = self._read_converted(piece, dtype, out)
        # One sum costs a fraction of the read, and NaN and inf survive it; only then is each value looked at.
        if dtype.is_floating_point and not math.isfinite(out.sum().item()):
            self._look_closer(piece.tensor, entry, out)
        return num_read

    def note_scales(self, tensor: str) -> None:
        self._not_finite[tensor] = "scales that are NaN or inf"

    def finish(self) -> None:
        """Warns once, after the last read, and names the first tensors in which NaN or inf was found."""
        if self._not_finite:
            found = sorted(f"{name} has {what}" for name, what in self._not_finite.items())
            warnings.warn(f"{self.directory}: {listed(found)}; the output will be wrong", stacklevel=2)

    def close(self) -> None:
        with self._lock:
            for fd in self._files.values():
                os.close(fd)
            self._files.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fd(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[file]

    def _read_rows(self, name: str, row: int, col: int, out: Tensor) -> int:
        """Fills `out`, of the file's dtype, with the rectangle that starts at (row, col); returns the bytes read."""
        entry = self.entries[name]
        fd, itemsize = self._fd(entry.file), out.element_size()
        (num_rows, num_cols), pitch = out.shape, out.stride(0) * itemsize
        target = _bytes_of(out)
        row_bytes, file_pitch = num_cols * itemsize, self._row_bytes(entry)
        start = entry.offset + row * file_pitch + col * itemsize
        if row_bytes == file_pitch and out.is_contiguous():
            _read_exactly(fd, target, start)
        else:
            for i in range(num_rows):
                _read_exactly(fd, target[i * pitch : i * pitch + row_bytes], start + i * file_pitch)
        return num_rows * row_bytes

    def _row_bytes(self, entry: TensorEntry) -> int:
        """Bytes of a whole row in the file."""
        return entry.num_cols * self.dtypes[entry.dtype].itemsize

    def _read_converted(self, piece: Piece, dtype: torch.dtype, out: Tensor) -> int:
        """Fills `out` through this thread's buffer, as many rows at a time as it holds; returns the bytes read."""
        step, num_read = max(1, CONVERT_BYTES // (piece.num_cols * dtype.itemsize)), 0
        for first in range(0, piece.num_rows, step):
            part = out[first : first + step]
            buffer = self._buffer(part.numel() * dtype.itemsize).view(dtype).view(part.shape)
            num_read += self._read_rows(piece.tensor, piece.row + first, piece.col, buffer)
            part.copy_(buffer)
        return num_read

    def _buffer(self, nbytes: int) -> Tensor:
        held = getattr(self._local, "buffer", None)
        if held is None or held.numel() < nbytes:
            held = self._local.buffer = torch.empty(max(nbytes, CONVERT_BYTES), dtype=torch.uint8)
        return held[:nbytes]

    def _look_closer(self, name: str, entry: TensorEntry, out: Tensor) -> None:
        if out.isnan().any():
            self._not_finite[name] = "NaN"
        elif out.isinf().any() and name not in self._not_finite:
            target = str(out.dtype).removeprefix("torch.")
            converted = FILE_DTYPES[entry.dtype] != out.dtype
            self._not_finite[name] = f"inf (after conversion from {entry.dtype} to {target})" if converted else "inf"


def _bytes_of(out: Tensor) -> memoryview:
    """The memory from the first to the last element of a view; it holds no reference to the tensor."""
    assert out.device.type == "cpu" and out.stride(1) == 1, "rows of the destination must be contiguous"
    num_elements = (out.shape[0] - 1) * out.stride(0) + out.shape[1]
    return memoryview((ctypes.c_char * (num_elements * out.element_size())).from_address(out.data_ptr())).cast("B")


@contextlib.contextmanager
def _naming(file: Path, tensor: str) -> Iterator[None]:
    """Names a tensor and its file in errors of the reads inside: OSError, or ValueError where the file ends."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{file}: cannot read {tensor}: {error}") from error
    except EOFError as error:
        raise ValueError(f"{file}: the file ends inside {tensor}: truncated?") from error


def _read_exactly(fd: int, target: memoryview, offset: int) -> None:
    """Fills `target` with the file's bytes from `offset` on. Raises EOFError if the file ends before."""
    done = os.preadv(fd, [target], offset)
    while done < len(target):
        num_read = os.preadv(fd, [target[done:]], offset + done)
        if num_read == 0:
            raise EOFError
        done += num_read
