"""How long the device side may take for what it is asked, and a connection that holds it to that."""

import socket
import time
from collections.abc import Sequence

from torch import Tensor

# Of the slowest machine that is believed: what takes longer is no work.
LEAST_WIRE_BYTES_S = 10e6
LEAST_PRODUCTS_S = 1e8
LEAST_LOAD_BYTES_S = 20e6


def load_s(weights_bytes: int) -> float:
    """Seconds for the weights to be read and laid out, at most."""
    return weights_bytes / LEAST_LOAD_BYTES_S


def call_s(sent: Sequence[Tensor], out: Tensor) -> float:
    """Seconds for a call's bytes to cross and its products to be computed, at most: each element of the first tensor
    meets the columns of the answer, or the rows of what is sent beside it."""
    moved_bytes = sum(tensor.nbytes for tensor in sent) + out.nbytes
    products = sent[0].numel() * max([out.shape[-1], *map(len, sent[1:])])
    return moved_bytes / LEAST_WIRE_BYTES_S + products / LEAST_PRODUCTS_S


class Until:
    """`connection` for the next `seconds`: TimeoutError after them, however much has come or gone by then."""

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
