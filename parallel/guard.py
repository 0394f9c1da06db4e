"""The guard, which brings threads out of what ranks do together when a rank has failed. Torch-free.

      0 s   the actions of `on_failure` run: they set the abort word, cut connections and end children. A thread that
            waits for another rank gets PeerLost
      1 s   a thread that is still inside is computing: PeerLost is raised in it, at the next line of Python it runs
    3.5 s   a thread that is still inside will run no such line (its kernel never ends): the failure is shown, and
            os._exit ends the process

Where no thread is inside, the failure is shown, and raised in the next thread that comes in. A thread that leaves the
group gets no exception, since torch does not make a group anew that is half left, and has LEAVE_S. This file does not
know how a failure comes to light (pulse.py, children.py).
"""

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from penstock.parallel.failure import PeerLost, RankFailed, exit_after, is_shown_by_parent

INTERRUPT_S = 1.0
EXIT_S = 2.5
LEAVE_S = 20.0  # to free what the group held, after the exception
_POLL_S = 0.05


class Guard:
    """The guard of one launch. `failure` is set once, by any thread. Where no thread is inside it is shown after
    `show_after_s`, since a launcher may report it first."""

    def __init__(self, show_after_s: float = 0.0):
        self.failure: RankFailed | None = None
        self._known = threading.Event()
        self._actions: list[Callable[[], None]] = []
        self._inside: set[int] = set()  # identifiers of threads
        self._interrupted: set[int] = set()  # those of them that get an exception, or had it
        self._leaving: set[int] = set()
        self._lock = threading.Lock()
        self._told = False  # a caller has the failure, and raises it
        self._shown = self._closed = False
        self._show_after_s = show_after_s

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """A context for all that waits for other ranks; contexts may be nested."""
        me = threading.get_ident()
        outermost = me not in self._inside
        self._inside.add(me)
        try:
            yield
        finally:
            if outermost:
                self.come_out()

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """A context for what leaves the group, with the other ranks or without them, and frees what it held. This
        thread comes out of all other contexts for good."""
        self.come_out()
        me = threading.get_ident()
        with self._lock:
            self._leaving.add(me)
            has_failed = self.failure is not None
        if has_failed:
            self._bound_leaving()
        try:
            yield
        finally:
            self._leaving.discard(me)

    def come_out(self) -> None:
        """Takes this thread out of all contexts: it leaves them with the failure, and no longer waits for a rank."""
        me = threading.get_ident()
        try:
            self._come_out(me)
        except PeerLost:  # the interrupt of _interrupt, which comes once
            self._come_out(me)

    @property
    def busy(self) -> bool:
        """Tells whether another thread is inside, or leaves."""
        return bool((self._inside | self._leaving) - {threading.get_ident()})

    def on_failure(self, action: Callable[[], None]) -> None:
        """Adds an action that runs as soon as a failure is known, in a thread of its own."""
        self._actions.append(action)

    def fail(self, failure: RankFailed) -> None:
        """Takes the failure of another rank, runs the actions and brings threads out. Only the first failure counts."""
        with self._lock:
            if self.failure is not None or self._closed:
                return
            self.failure = failure
            leaves = bool(self._leaving)
        if leaves:
            self._bound_leaving()
        self._start(self._act).join(INTERRUPT_S)
        self._known.set()
        self._start(self._get_out if self._inside else self._show_late)

    def wait(self, seconds: float) -> RankFailed | None:
        """Waits for a failure for so many seconds at most; returns it, for the caller to raise, or None."""
        self._told = True
        self._known.wait(seconds)
        return self.failure

    def check(self) -> None:
        """Raises the failure, if there is one."""
        if self.failure is not None:
            self._told = True
            raise self.failure

    def show(self, failure: RankFailed) -> None:
        """Shows the failure on stderr, once, unless the parent of this process does."""
        if not self._shown and not is_shown_by_parent(failure):
            self._shown = True
            print(f"penstock: {failure}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes no more failures."""
        self._closed = True
        self._actions.clear()

    def _act(self) -> None:
        for action in list(self._actions):
            with contextlib.suppress(Exception):  # the interrupt and the exit below remain
                action()

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name="guard", daemon=True)
        thread.start()
        return thread

    def _get_out(self) -> None:
        if not self._wait_for_exit(self._inside, INTERRUPT_S):
            self._interrupt()
            self._end_process(self._inside, EXIT_S)

    def _bound_leaving(self) -> None:
        self._start(lambda: self._end_process(self._leaving, LEAVE_S))

    def _show_late(self) -> None:
        time.sleep(self._show_after_s)
        if not self._told:
            self.show(self.failure)

    def _end_process(self, threads: set[int], seconds: float) -> None:
        if not self._wait_for_exit(threads, seconds):
            self._start(lambda: self.show(self.failure))  # in a thread, since stderr may be a pipe that nobody reads
            time.sleep(_POLL_S)
            os._exit(exit_after(self.failure))

    def _wait_for_exit(self, threads: set[int], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while threads and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return not threads

    def _interrupt(self) -> None:
        with self._lock:
            for thread in list(self._inside):
                self._interrupted.add(thread)
                _raise_in(thread, PeerLost)

    def _come_out(self, thread: int) -> None:
        with self._lock:
            self._inside.discard(thread)
            was_interrupted = thread in self._interrupted
            self._interrupted.discard(thread)
        if was_interrupted:
            _drop_interrupt(thread)


class _Dropped(BaseException):
    """Stands in for an interrupt that nobody needs any more."""


def _raise_in(thread: int, error: type[BaseException]) -> None:
    """Raises `error` in a thread when that next runs Python, in place of one that has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))


def _drop_interrupt(thread: int) -> None:
    """Takes back what this thread has not raised yet, by an exception that ends here. (Taken back by NULL, it would
    leave CPython 3.11 to look for it at every call, and a call that is traced or profiled would never begin.)"""
    with contextlib.suppress(_Dropped):
        _raise_in(thread, _Dropped)
        while True:
            time.sleep(0)
