"""Threads of our own for work on blocks: torchrun sets OMP_NUM_THREADS=1, and reads do not use torch's."""

import concurrent.futures
import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

MAX_THREADS = 16  # for work that holds some blocks in memory for each of them
Item, Result = TypeVar("Item"), TypeVar("Result")


@contextlib.contextmanager
def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Iterator[Result]]:
    """The iterator of work(item) of each item, in their order, from up to MAX_THREADS threads; none runs after it.

    Two items a thread are under way, or done and not yet taken, no more. The first error is raised in its place.
    """
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    executor = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="blocks")
    with single_threaded_ops():
        try:
            yield _results(executor, 2 * num_threads, work, items)
        finally:
            executor.shutdown(cancel_futures=True)


def _results(
    executor: concurrent.futures.Executor, most: int, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    waiting: deque[concurrent.futures.Future[Result]] = deque()
    for item in items:
        waiting.append(executor.submit(work, item))
        if len(waiting) == most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def single_threaded_ops() -> Iterator[None]:
    """Each thread would otherwise start a team of threads of its own for a conversion or a sum."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
