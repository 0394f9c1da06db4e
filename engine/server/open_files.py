"""The files that a server may have open, of which each connection is one."""

import errno
import resource
import time
from collections.abc import Callable
from typing import Any

MOST_FILES = 65536
QUIET_S = 60.0  # between two lines that say the same
NONE_LEFT = (errno.EMFILE, errno.ENFILE)


def allow_many() -> None:
    """Raises the limit of open files as far as this process may, to MOST_FILES at most: by default it is 1024."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class LoopErrors:
    """A handler of errors in an event loop. Connections that no file is left for wait until one is; it says so in one
    line, where asyncio shows a traceback for each try, thousands a second."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._said_s = say, float("-inf")

    def __call__(self, loop: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in NONE_LEFT):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said_s >= QUIET_S:
            self._said_s = time.monotonic()
            self._say("connections wait: no more files may be open (ulimit -n is the limit)")
