"""Lets signals end a job: its rows after the pass that runs now, all else (loading, sorting) at once."""

import contextlib
from collections.abc import Iterator
from typing import Self

from penstock.engine.server.signals import heard_by


class Stopped(BaseException):
    """The end of a job by a signal where no rows run. As KeyboardInterrupt is, it is no Exception: nothing failed."""


class Stopping:
    """A context in which the first of the signals that end a job sets `is_asked`, and raises Stopped but in `awaited`;
    later ones do nothing more."""

    def __init__(self):
        self.is_asked = self._is_awaited = False
        self._signals = heard_by(self._hear)

    def __enter__(self) -> Self:
        self._signals.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._signals.__exit__(*exc)

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
