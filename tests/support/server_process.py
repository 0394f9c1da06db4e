"""`penstock serve` as a process of its own, on a free port."""

import contextlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.support.commands import Command

START_S = 60.0
OPTIONS = (
    "--port",
    "0",
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--max-num-seqs",
    "4",
    "--max-model-len",
    "256",
)


class ServerProcess:
    """A server that listens; `url` is its address. `text` is what it has said so far."""

    def __init__(self, folder: Path, *arguments: str, model: str = "demo", **settings: Any):
        folder.mkdir(exist_ok=True)
        self.command = Command(folder, "serve", model, *OPTIONS, *arguments, **settings)
        self.text = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._await(lambda: "listening on" in self.text)
        self.url = re.search(r"listening on (http://\S+),", self.text)[1]

    def _read(self) -> None:
        for line in self.command.process.stderr:
            self.text += line.decode()

    def _await(self, is_so) -> None:
        end_s = time.monotonic() + START_S
        while not is_so():
            assert time.monotonic() < end_s and self.command.process.poll() is None, self.text
            time.sleep(0.01)

    def wait_ready(self) -> "ServerProcess":
        """Waits until it serves."""
        self._await(lambda: self.health() == 200)
        return self

    def health(self) -> int:
        """The status of GET /health."""
        return httpx.get(f"{self.url}/health", timeout=START_S).status_code

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.command.process.send_signal(number)

    def pid(self, rank: int = 0) -> int:
        """The process of a rank; rank 0 is the engine's, not the front that was started."""
        found = [pid for pid in self.command.pids() if (self.command.folder / f"rank_of{pid}").read_text() == str(rank)]
        assert len(found) == 1, (rank, found, self.text)
        return found[0]

    def exit_code(self) -> int:
        """Waits for its end, and returns its exit status."""
        code = self.command.process.wait(START_S)
        self._reader.join(START_S)
        return code


@contextlib.contextmanager
def server_process(folder: Path, *arguments: str, **settings: Any) -> Iterator[ServerProcess]:
    """A server, which is killed at the end if it is still there."""
    server = ServerProcess(folder, *arguments, **settings)
    try:
        yield server
    finally:
        server.command.kill()
