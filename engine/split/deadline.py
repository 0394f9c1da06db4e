"""Deadlines of the device side: the seconds that it may take for a call, and a connection that enforces them."""

import socket
import time
from collections.abc import Sequence

from torch import Tensor

# Rates of the slowest machine that is allowed for; a device side that takes longer counts as failed.
LEAST_WIRE_BYTES_S = 10e6
LEAST_PRODUCTS_S = 1e8
LEAST_LOAD_BYTES_S = 20e6


def load_s(weights_bytes: int) -> float:
    """The most seconds that reading and laying out the weights may take."""
    return weights_bytes / LEAST_LOAD_BYTES_S


def call_s(sent: Sequence[Tensor], out: Tensor) -> float:
    """The most seconds that a call may take for its bytes to cross and its products to be computed: each element of the
    first tensor meets the columns of the answer, or the rows of the other tensors."""
    moved_bytes = sum(tensor.nbytes for tensor in sent) + out.nbytes
    products = sent[0].numel() * max([out.shape[-1], *map(len, sent[1:])])
    return moved_bytes / LEAST_WIRE_BYTES_S + products / LEAST_PRODUCTS_S


class Until:
    """A connection that works for the next `seconds`. After them it raises TimeoutError, even in the middle of a
    frame."""

    def __init__(self, connection: socket.socket, seconds: float):
        self._connection, self._end = connection, time.monotonic() + seconds

    def sendall(self, data: bytes) -> None:
        self._limit()
        self._connection.sendall(data)

    def recv_into(self, buffer: memoryview) -> int:
        self._limit()
        return self._connection.recv_into(buffer)

    def _limit(self) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
