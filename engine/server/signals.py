"""The signals that end a server or a batch job. One that is ignored, as SIGHUP by `nohup` or SIGINT in the background
of a script, stays so."""

import contextlib
import signal
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last when its terminal is gone


def not_ignored() -> list[signal.Signals]:
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


@contextlib.contextmanager
def heard_by(hear: Callable[[], object]) -> Iterator[None]:
    """A context in which each of them calls `hear`."""
    before = {number: signal.signal(number, lambda *_: hear()) for number in not_ignored()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore() -> None:
    """Ignores them from now on: another process hears them, and says when this one ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
