"""Processes as Linux sees them: their host, and whether one is stopped or gone. Torch-free."""

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GONE, STOPPED, ALIVE, UNKNOWN = "gone", "stopped", "alive", "unknown"
_PROC = Path("/proc")


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
