"""Copies in pieces, one after another, to be run in a thread of their own while the main thread gives the device other
work.
"""

from collections import deque
from collections.abc import Iterable
from threading import Event
from time import perf_counter

import torch
from torch import Tensor


def cut(source: Tensor, target: Tensor, piece_bytes: int, total_bytes: int) -> list[tuple[Tensor, Tensor]]:
    """Cuts `source` and `target` (uint8, of equal size) into pairs of pieces, repeated up to `total_bytes` or more."""
    pieces = list(zip(source.split(piece_bytes), target.split(piece_bytes)))
    return pieces * -(-total_bytes // source.nbytes)


def copy_pieces(
    copies: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    in_flight: int | None = None,
    stop: Event | None = None,
) -> tuple[int, float]:
    """Copies every source to its target, on a stream of its own, and waits; returns the bytes and the seconds.

    At most `in_flight` pieces are enqueued at a time (None: all). An endless iterable needs `in_flight`, and `stop`,
    which ends it.
    """
    if device.type == "cpu":
        return _copy_cpu(copies, stop)
    nbytes, ahead = 0, deque()
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for source, target in copies:
            if stop is not None and stop.is_set():
                break
            if len(ahead) == in_flight:
                ahead.popleft().synchronize()
            target.copy_(source, non_blocking=True)
            nbytes += source.nbytes
            if in_flight is not None:
                ahead.append(torch.cuda.Event())
                ahead[-1].record()
        end.record()
        end.synchronize()
    return nbytes, start.elapsed_time(end) / 1e3


def _copy_cpu(copies: Iterable[tuple[Tensor, Tensor]], stop: Event | None) -> tuple[int, float]:
    nbytes, start = 0, perf_counter()
    for source, target in copies:
        if stop is not None and stop.is_set():
            break
        target.copy_(source)
        nbytes += source.nbytes
    return nbytes, perf_counter() - start
