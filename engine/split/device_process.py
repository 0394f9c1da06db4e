"""The process of the device side. It is not trusted: it is told little, may say little, and ends with its channel.

This file does not know what the two sides say to each other.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import weakref
from typing import Any, BinaryIO

from penstock.parallel.launch import WORKER_COMMAND, python_path
from penstock.scheduler.units import show_text

DEVICE_COMMAND = (*WORKER_COMMAND[:-1], "split-device")
CLOSE_S = 5.0
# All environment variables that it gets: those that say where programs and libraries are, and those that the bits of a
# sum depend on.
PASSED = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
PASSED += ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "ATEN_CPU_CAPABILITY")
_TAIL_BYTES = 2000


class DeviceProcess:
    """A process at the other end of `connection`. It reads `told` as a line of JSON on stdin, with the descriptor of
    its own end as `socket`. It ends with this process, or when the connection is closed."""

    def __init__(self, told: dict[str, Any]):
        self.connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                DEVICE_COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
            told = told | {"socket": theirs.fileno()}
        self._end = weakref.finalize(self, _end, self.process, os.getpid())  # it ends even if nobody closes it
        self._tail = bytearray()
        listening = (self.process.stderr, self._tail)  # not this object: a reference to it would keep the process alive
        self._listener = threading.Thread(target=_listen, args=listening, name="device-side-stderr", daemon=True)
        self._listener.start()
        with contextlib.suppress(BrokenPipeError):  # it died at once: the first call says so
            self.process.stdin.write(json.dumps(told).encode() + b"\n")
            self.process.stdin.flush()

    def how_it_ended(self) -> str:
        """Ends the process, from which nothing comes any more, and says why: its exit code, and its last words."""
        try:
            ended = f"exit code {self.process.wait(CLOSE_S)}"
        except subprocess.TimeoutExpired:
            ended = "it closed the connection"
        self.kill()
        lines = self._tail.decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), None)
        return ended if said is None else f"{ended}, its last words: {show_text(said)}"

    def close(self) -> None:
        """Lets the process end by itself, and kills it if it does not. Idempotent."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSE_S)
        self.kill()

    def kill(self) -> None:
        """Kills the process, with all that it has started in its session. Idempotent."""
        self.connection.close()
        self._end()
        self._listener.join(CLOSE_S)


def _end(process: subprocess.Popen, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the owner ends, not the owner
    with contextlib.suppress(ProcessLookupError, PermissionError):  # there is nobody left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in PASSED if name in os.environ} | {"PYTHONPATH": python_path()}


def _listen(stderr: BinaryIO, tail: bytearray) -> None:
    """Keeps the end of what is written to stderr, a pipe that must not fill up."""
    with stderr:
        while piece := os.read(stderr.fileno(), 4096):
            tail += piece
            del tail[:-_TAIL_BYTES]
