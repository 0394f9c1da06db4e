"""Several ranks in one process and on one device, whose kernels push to each other, one phase after the other."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from penstock.parallel.push_reduce import EMPTY, MAX_PROGRAMS, NUM_HALVES, PART_WORDS, PeerBuffers
from penstock.parallel.two_step_reduce import STEPS, buffer_shape
from torch import Tensor

from tests.support.kernel_proof import CONTIGUOUS, DEVICE, Layout

HANG_S = 30
SIZES = (2, 3, 4, 8)  # ranks
DENSE = (CONTIGUOUS, Layout("viewed", before=64), Layout("from any word", before=2))  # of what is summed


def connect_ranks(size: int) -> list[PeerBuffers]:
    return _connected(size, (NUM_HALVES, size, PART_WORDS))


def connect_sharing_ranks(size: int, most_bytes: int) -> list[PeerBuffers]:
    """Ranks that sum parts of so many bytes at most in two steps."""
    return _connected(size, buffer_shape(size, most_bytes))


def _connected(size: int, shape: tuple[int, ...]) -> list[PeerBuffers]:
    words = [torch.full(shape, EMPTY, dtype=torch.int32, device=DEVICE) for _ in range(size)]
    others = [tuple(words[(rank + step) % size].data_ptr() for step in range(1, size)) for rank in range(size)]
    halves = torch.zeros(size, MAX_PROGRAMS, dtype=torch.int32, device=DEVICE)
    goes_on = torch.zeros(1, dtype=torch.int32, pin_memory=torch.device(DEVICE).type == "cuda")
    return [PeerBuffers(rank, size, words[rank], others[rank], halves[rank], goes_on) for rank in range(size)]


def run_together(ranks: Iterable[Callable[..., None]]) -> None:
    """Makes one call on every rank: all push, then all collect."""
    ranks = list(ranks)
    with no_hang():
        for rank in ranks:
            rank(pushes=True, collects=False)
        for rank in ranks:
            rank(pushes=False, collects=True)


def run_in_steps(ranks: Iterable[Callable[..., None]]) -> None:
    """Makes one call on every rank: all do a step before any does the next one."""
    ranks = list(ranks)
    with no_hang():
        for step in STEPS:
            for rank in ranks:
                rank(steps=(step,))


def write_late(seconds: float, words: Tensor, part: Tensor) -> threading.Timer:
    """Starts a thread that writes the words of `part` after so long; on a GPU beside the kernel that waits for them."""
    late = part.view(torch.int32).clone()

    def write() -> None:
        with torch.cuda.stream(torch.cuda.Stream() if words.is_cuda else None):
            words.copy_(late)

    timer = threading.Timer(seconds, write)
    timer.start()
    return timer


def assert_at_rest(peers: list[PeerBuffers], num_calls: int) -> None:
    """Asserts that every word is empty again and every entry of `half` names the next half."""
    for buffers in peers:
        assert (buffers.words == EMPTY).all()
        assert (buffers.half == num_calls % NUM_HALVES).all()


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """Sums parts in rank order in fp32, and rounds once."""
    total = 0.0
    for part in parts:
        total = total + part.float()
    return total.to(part.dtype)


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    """Makes an interpreted kernel fail that waits for words which never come."""

    def fail(*_):
        raise AssertionError(f"still waiting for a part after {HANG_S} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(HANG_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
