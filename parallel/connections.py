"""The sockets by which this process talks to other ranks, found so that another thread can cut them.

A call of gloo, or of torch's store, may wait for a rank that is stopped, or that has failed and lives on. Its process
group's abort() does not end the wait. If its connection is cut, the other end looks closed to it, and it returns with
an error. Cutting calls shutdown(2) and closes nothing: the sockets still belong to their owners. Without /proc we find
no sockets, and cut none.
"""

import contextlib
import os
import socket
from collections.abc import Callable

_FOLDER = "/proc/self/fd"
Ports = tuple[int, int]  # the port of this end, and of the other end


def open_sockets() -> dict[int, str]:
    """The sockets of this process by file descriptor: each has a name that no other socket has."""
    found = {}
    with contextlib.suppress(OSError):
        for entry in os.listdir(_FOLDER):
            with contextlib.suppress(OSError):
                name = os.readlink(f"{_FOLDER}/{entry}")
                if name.startswith("socket:"):
                    found[int(entry)] = name
    return found


class Connections:
    """The sockets that were opened after this object was made, and of them those that `keep` selects by their ports."""

    def __init__(self):
        self._before = open_sockets()
        self._ours: dict[int, str] = {}

    def ports(self) -> list[Ports]:
        return list(self._opened())

    def keep(self, is_ours: Callable[[Ports], bool]) -> None:
        self._ours = {fd: name for ports, (fd, name) in self._opened().items() if is_ours(ports)}

    def cut(self) -> None:
        """Ends all calls that wait on the selected sockets. It leaves alone a descriptor that stands for something else
        by now."""
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
