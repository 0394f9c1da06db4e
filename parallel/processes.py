"""Processes as Linux sees them: on which host, and whether one is stopped or gone. No torch."""

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

GONE, STOPPED, ALIVE, UNKNOWN = "gone", "stopped", "alive", "unknown"
_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process, wherever it is. `host` is equal where process ids mean the same."""

    host: str
    pid: int

    def state(self) -> str:
        """GONE, STOPPED (SIGSTOP; one that a debugger holds is not) or ALIVE; UNKNOWN on another host."""
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
    """The boot of this machine and the namespace of its process ids; the host's name where Linux does not say."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return socket.gethostname()
