"""The engine's process as the front starts, watches and ends it. Torch-free.

It is a session of its own: signals of a terminal are the front's. It ends when the front says so or closes its
standard input, on purpose or by its own end, and its ranks end with it.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys

from penstock.engine.config import EngineConfig
from penstock.engine.server.channel import Channel
from penstock.parallel.failure import PEER_LOST_EXIT, describe_exit
from penstock.parallel.launch import python_path
from penstock.parallel.processes import Process, Watched, host_id
from penstock.parallel.pulse import STOPPED_S, stopped_for

HEAR_S = 1.0  # for it to see that its standard input is closed
COMMAND = (sys.executable, "-P", "-m", "penstock", "engine")


class EngineProcess:
    """A process that loads the engine of a config. `channel` is the front's end."""

    def __init__(self, config: EngineConfig):
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                COMMAND,
                env=os.environ | {"PYTHONPATH": python_path()},
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            message = {"channel": theirs.fileno(), "config": config.to_dict()}
            with contextlib.suppress(BrokenPipeError):  # it died at once, which the channel tells
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()
        self.channel = Channel(ours)
        self._watched = Watched(Process(host_id(), self._process.pid))

    def fault(self) -> str | None:
        """Says, after "the engine", that it has been stopped for STOPPED_S, as far as it was looked at. To be called
        about twice a second."""
        return stopped_for(STOPPED_S) if self._watched.stopped_s() > STOPPED_S else None

    def end(self, most_s: float) -> None:
        """Waits so long for its end, and then ends it, and its ranks. Idempotent."""
        has_ended = self._has_ended(most_s)
        with contextlib.suppress(OSError):  # what it never read cannot be flushed
            self._process.stdin.close()
        if not has_ended and not self._has_ended(HEAR_S):
            self._process.kill()
            self._process.wait()

    def _has_ended(self, within_s: float) -> bool:
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def exit_status(self) -> int:
        """The exit status with which the front ends as well, if the engine failed: the engine's, or 1."""
        code = self._process.returncode
        return code if code is not None and code > 0 and code != PEER_LOST_EXIT else 1

    @property
    def unexplained_end(self) -> str | None:
        """Says how it ended, where it could not say that itself; None where it did."""
        code = self._process.returncode
        return describe_exit(code) if code is not None and code <= 0 else None
