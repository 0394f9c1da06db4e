"""Open files and threads of this process, to be compared with those that it had before."""

import contextlib
import os
import threading
import time

WAIT_S = 60.0


def held() -> set:
    """The open files, each as its number and what it is, and the threads."""
    files = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of the listing
            files.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return files | set(threading.enumerate())


def assert_no_more_than(before: set) -> None:
    """Asserts that what came since has gone. Threads that end take their time, and so may what earlier tests left: less
    than before says nothing."""
    end_s = time.monotonic() + WAIT_S
    while more := held() - before:
        assert time.monotonic() < end_s, more
        time.sleep(0.005)
