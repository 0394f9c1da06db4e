"""The sockets by which this process talks to other ranks, found so that another thread can cut them.

A call of gloo, or of torch's store, that waits for a rank that is stopped, or that fails and lives on, has no other way
out: its process group's abort() does not reach it. Cut, the connection looks to it as if the other end had closed.
Cutting says shutdown(2) and closes nothing: the sockets stay their owner's. Without /proc none is found.
"""

import contextlib
import os
import socket
from collections.abc import Callable

_FOLDER = "/proc/self/fd"
Ports = tuple[int, int]  # this end's, the other end's


def open_sockets() -> dict[int, str]:
    """What each file descriptor that is a socket is: a name that no other socket has."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in os.listdir(_FOLDER):
            with contextlib.suppress(OSError):
                name = os.readlink(f"{_FOLDER}/{entry}")
                if name.startswith("socket:"):
                    found[int(entry)] = name
    return found


class Connections:
    """Those among the sockets that were opened since this was made of which `is_ours`, given their ports, holds."""

    def __init__(self):
        self._before = open_sockets()
        self._ours: dict[int, str] = {}

    def ports(self) -> list[Ports]:
        return list(self._opened())

    def keep(self, is_ours: Callable[[Ports], bool]) -> None:
        self._ours = {fd: name for ports, (fd, name) in self._opened().items() if is_ours(ports)}

    def cut(self) -> None:
        """Ends what waits on them; those that were closed meanwhile, and what has their numbers now, are left alone."""
        for fd, name in self._ours.items():
            with contextlib.suppress(OSError):
                if os.readlink(f"{_FOLDER}/{fd}") == name:
                    with socket.socket(fileno=os.dup(fd)) as copy:
                        copy.shutdown(socket.SHUT_RDWR)

    def _opened(self) -> dict[Ports, tuple[int, str]]:
        found = {}
        for fd, name in open_sockets().items():
            if self._before.get(fd) != name:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6):
                        found[copy.getsockname()[1], copy.getpeername()[1]] = (fd, name)
        return found
