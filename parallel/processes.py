"""Processes as Linux sees them: on which host, whether one is stopped or gone, and for how long. Torch-free."""

import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GONE, STOPPED, ALIVE, UNKNOWN = "gone", "stopped", "alive", "unknown"
_PROC = Path("/proc")
_LOOK_S = 1.0  # that a look counts at most: whoever looks may have been stopped as well


@dataclass(frozen=True)
class Process:
    """A process on any host. Two have the same `host` if one table of process ids has both."""

    host: str
    pid: int

    def state(self) -> str:
        """The state: GONE, STOPPED (by SIGSTOP, not by a debugger) or ALIVE; UNKNOWN on another host."""
        return process_state(self.pid) if self.host == host_id() else UNKNOWN

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Watched:
    """A process that is looked at again and again, about twice a second."""

    def __init__(self, process: Process):
        self.process = process
        self._looked_at, self._stopped_s = time.monotonic(), 0.0

    def stopped_s(self) -> float:
        """Looks. Returns the seconds for which it has been stopped, 0 if it is not."""
        now = time.monotonic()
        elapsed_s, self._looked_at = min(now - self._looked_at, _LOOK_S), now
        self._stopped_s = self._stopped_s + elapsed_s if self.process.state() == STOPPED else 0.0
        return self._stopped_s


def this_process() -> Process:
    return Process(host_id(), os.getpid())


def process_state(pid: int) -> str:
    """The state of a process on this host."""
    try:
        letter = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return GONE if (_PROC / "self").exists() else UNKNOWN
    return {"T": STOPPED, "Z": GONE, "X": GONE}.get(letter, ALIVE)


def host_id() -> str:
    """The identity of this machine's boot and of its process ids; without /proc the host's name."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return socket.gethostname()
