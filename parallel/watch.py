"""Decides which ranks are stopped while ranks meet, before a pulse lets them hear of each other. Torch-free.

A rank is looked at from when its process is known: to a child that of rank 0 at once, any other when it has said who it
is. What it does not know: ranks that are gone (launchers see those), and what becomes of this one (guard.py).
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

from penstock.parallel.failure import RankFailed
from penstock.parallel.processes import Process, Watched
from penstock.parallel.pulse import BEAT_S, STOPPED_S, stopped_for

Know = Callable[[int, Process], None]


@contextlib.contextmanager
def watch(on_failure: Callable[[RankFailed], None]) -> Iterator[Know]:
    """Looks at processes while inside; gives what is to be told of them, rank and process. `on_failure` is called once,
    in another thread, for the first that has been stopped for STOPPED_S."""
    watched: dict[int, Watched] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(BEAT_S):
            for rank, one in list(watched.items()):
                if one.stopped_s() > STOPPED_S:
                    on_failure(RankFailed(rank, stopped_for(STOPPED_S), stopped=True))
                    return

    def know(rank: int, process: Process) -> None:
        watched[rank] = Watched(process)

    threading.Thread(target=look, name="watch", daemon=True).start()
    try:
        yield know
    finally:
        ended.set()
