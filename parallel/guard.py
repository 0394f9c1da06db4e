"""How a thread gets out of what ranks do together when one of them has failed: an exception first. No torch.

      0 s   the actions of `on_failure`: the abort word is set, connections are cut, children are ended. Whoever waits
            for another rank gets PeerLost
      1 s   who is still inside computes: PeerLost is raised in that thread, at the next line of Python that it runs
    3.5 s   who is still inside will not run one (a kernel that never ends): message, os._exit

Where nobody is inside the failure is shown, and raised when somebody comes in. What it does not know: how a failure
comes to light (pulse.py, children.py).
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
LEAVE_S = 20.0  # to free what was held, after the exception
_POLL_S = 0.05


class Guard:
    """`failure` is set once, from any thread."""

    def __init__(self):
        self.failure: RankFailed | None = None
        self.show_after_s = 0.0  # where nobody is inside: a launcher may speak first
        self._known = threading.Event()
        self._actions: list[Callable[[], None]] = []
        self._inside: set[int] = set()  # threads
        self._lock = threading.Lock()
        self._told = False  # somebody raises it
        self._shown = self._closed = False

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Around all that waits for other ranks, or leaves them; may be nested."""
        me = threading.get_ident()
        outermost = me not in self._inside
        self._inside.add(me)
        if outermost and self.failure is not None:  # leaving after it must not hang either
            self._start(lambda: self._end_process(LEAVE_S))
        try:
            yield
        finally:
            if outermost:
                try:
                    self._come_out(me)
                except PeerLost:  # the interrupt, of which there is but one
                    self._come_out(me)

    @property
    def busy(self) -> bool:
        """Whether another thread is inside."""
        return bool(self._inside - {threading.get_ident()})

    def on_failure(self, action: Callable[[], None]) -> None:
        """To be done at once when a failure is known, in a thread of its own."""
        self._actions.append(action)

    def fail(self, failure: RankFailed) -> None:
        """Another rank has failed; only the first failure counts."""
        with self._lock:
            if self.failure is not None or self._closed:
                return
            self.failure = failure
        self._start(self._act).join(INTERRUPT_S)
        self._known.set()
        self._start(self._get_out if self._inside else self._show_late)

    def wait(self, seconds: float) -> RankFailed | None:
        """The failure, as soon as it is known, for the caller to raise."""
        self._told = True
        self._known.wait(seconds)
        return self.failure

    def check(self) -> None:
        """Raises the failure, if there is one."""
        if self.failure is not None:
            self._told = True
            raise self.failure

    def show(self, failure: RankFailed) -> None:
        """On stderr, once, unless this process' parent does."""
        if not self._shown and not is_shown_by_parent(failure):
            self._shown = True
            print(f"penstock: {failure}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """From now on nothing is a failure."""
        self._closed = True
        self._actions.clear()

    def _act(self) -> None:
        for action in list(self._actions):
            with contextlib.suppress(Exception):  # it helps, or it does not: what follows gets us out
                action()

    def _start(self, work: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=work, name="guard", daemon=True)
        thread.start()
        return thread

    def _get_out(self) -> None:
        if not self._wait_for_exit(INTERRUPT_S):
            self._interrupt()
            self._end_process(EXIT_S)

    def _show_late(self) -> None:
        time.sleep(self.show_after_s)
        if not self._told:
            self.show(self.failure)

    def _end_process(self, seconds: float) -> None:
        if not self._wait_for_exit(seconds):
            self._start(lambda: self.show(self.failure))  # stderr may be a pipe that nobody reads
            time.sleep(_POLL_S)
            os._exit(exit_after(self.failure))

    def _wait_for_exit(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self._inside and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return not self._inside

    def _interrupt(self) -> None:
        with self._lock:
            for thread in list(self._inside):
                _raise_in(thread, PeerLost)

    def _come_out(self, thread: int) -> None:
        with self._lock:
            self._inside.discard(thread)
            _raise_in(thread, None)  # an interrupt that has not come yet is taken back


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raises in another thread when it next runs Python; None takes it back."""
    which = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), which)
