"""Sends tensors over a socket as frames: a small binary header, then their raw bytes. Nothing is pickled. A frame has:

number of the call (uint32), operation length (uint8), layer_idx (int16), number of tensors (uint8) | operation (ascii)
for each tensor: dtype (uint8), number of dims (uint8) | dims (uint32 each)
for each tensor: its bytes, row by row, in this machine's byte order
"""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from penstock.parallel.ledger import Site
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
_START, _TENSOR = struct.Struct("<IBhB"), struct.Struct("<BB")

Shape = tuple[torch.dtype, tuple[int, ...]]


class Header(NamedTuple):
    """The header of a frame. An answer has the number of its call."""

    site: Site
    shapes: tuple[Shape, ...]
    number: int = 0

    @staticmethod
    def of(site: Site, tensors: Sequence[Tensor], number: int = 0) -> "Header":
        return Header(site, tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors), number)

    def pack(self) -> bytes:
        name = self.site.operation.encode("ascii")
        parts = [_START.pack(self.number, len(name), self.site.layer_idx, len(self.shapes)), name]
        for dtype, dims in self.shapes:
            parts += [_TENSOR.pack(DTYPES.index(dtype), len(dims)), struct.pack(f"<{len(dims)}I", *dims)]
        return b"".join(parts)


class Connection(Protocol):
    """A socket, as far as frames need one."""

    def sendall(self, data: bytes) -> None: ...

    def recv_into(self, buffer: memoryview) -> int: ...


def send(connection: Connection, site: Site, tensors: Sequence[Tensor], number: int = 0) -> None:
    """Sends tensors of the dtypes in DTYPES, none of them empty, as one frame."""
    connection.sendall(Header.of(site, tensors, number).pack())
    for tensor in tensors:
        data = bytearray(tensor.nbytes)
        torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)
        connection.sendall(data)


def receive_header(connection: Connection) -> Header:
    """Waits for the next frame. Raises EOFError if the other side has closed or broken the connection, ValueError for a
    frame that `send` cannot have sent."""
    number, name_bytes, layer_idx, num_tensors = _START.unpack(_receive(connection, _START.size))
    operation = _receive(connection, name_bytes).decode("ascii")
    shapes = []
    for _ in range(num_tensors):
        dtype, num_dims = _TENSOR.unpack(_receive(connection, _TENSOR.size))
        if dtype >= len(DTYPES):
            raise ValueError(f"a frame with dtype {dtype}")
        dims = struct.unpack(f"<{num_dims}I", _receive(connection, 4 * num_dims))
        shapes.append((DTYPES[dtype], dims))
    return Header(Site(operation, layer_idx), tuple(shapes), number)


def receive_tensors(connection: Connection, header: Header) -> list[Tensor]:
    """The tensors of the frame whose header was received. A header that is not trusted is checked before this."""
    tensors = []
    for dtype, dims in header.shapes:
        data = _receive(connection, math.prod(dims) * dtype.itemsize)
        tensors.append(torch.frombuffer(data, dtype=dtype).view(dims))
    return tensors


def _receive(connection: Connection, num_bytes: int) -> bytearray:
    data = bytearray(num_bytes)
    rest = memoryview(data)
    while rest:
        try:
            received = connection.recv_into(rest)
        except ConnectionError as error:
            raise EOFError(str(error)) from error
        if not received:
            raise EOFError("the connection is closed")
        rest = rest[received:]
    return data
