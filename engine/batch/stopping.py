"""Lets signals end a job: its rows after the pass that runs now, all else (loading, sorting) at once."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last when its terminal is gone


class Stopped(BaseException):
    """The end of a job by a signal where no rows run. As KeyboardInterrupt is, it is no Exception: nothing failed."""


class Stopping:
    """A context in which the first of the SIGNALS sets `is_asked`, and raises Stopped but in `awaited`; later ones do
    nothing more. One that is ignored, as SIGHUP by `nohup` or SIGINT in the background of a script, stays so."""

    def __init__(self):
        self.is_asked = self._is_awaited = False
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: self._hear())
        return self

    def __exit__(self, *exc) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """A context that looks at `is_asked` again and again, and is not interrupted."""
        self._is_awaited = True
        try:
            yield
        finally:
            self._is_awaited = False

    def _hear(self) -> None:
        if not self.is_asked:
            self.is_asked = True
            if not self._is_awaited:
                raise Stopped
