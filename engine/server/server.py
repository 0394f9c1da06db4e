"""The life of a server's process: bind, load while it listens, serve, and end by a signal or with the engine.

    bind the port -> listen, and load the engine in its thread -> serve -> a signal: new requests get a 503, those under
    way may end until --shutdown-timeout; a second signal ends them at once -> close the engine -> exit 0

If the engine fails, clients are answered, then the process ends with the engine's exception. uvicorn's own handlers of
signals do none of that, so they are off.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import uvicorn
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.runtime.progress import Progress
from penstock.engine.server.app import make_app
from penstock.engine.server.connection import MOST_HEAD_BYTES, Connection
from penstock.engine.server.metrics import Metrics
from penstock.engine.server.options import ServeOptions
from penstock.engine.server.request_log import RequestLog, RequestNotes
from penstock.engine.server.service import Service

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ANSWER_S = 3.0  # for clients to take the last answer, once the engine has ended or all was aborted
CLOSE_S, GIVE_UP_S = 20.0, 3.0  # for the engine to end: one that serves, and one that loads or has failed
# The most that engine and event loop wait for each other's Python: by Python's default, 5 ms, that is a whole pass.
SWITCH_S = 0.5e-3
_POLL_S = 0.02


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises ValueError if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(f"--host {host} --port {port}: {error.strerror or error}") from None
    return listener


class Server:
    """One server, on the main thread. `say` shows a line to whoever started it; `log` gets a line a request, and
    `start` hears how far `make` is."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServeOptions,
        make: Callable[[], LLM],
        defaults: Mapping[str, Any],
        say: Callable[[str], None],
        log: RequestLog | None = None,
        start: Progress | None = None,
    ):
        metrics = Metrics()
        notes = RequestNotes(metrics, log)
        self.service = Service(config, options, make, defaults, self._engine_changed, metrics, notes, start)
        self.options, self._say = options, say
        self._num_signals = 0
        self._changed = asyncio.Event()
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                make_app(self.service, metrics),
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=MOST_HEAD_BYTES,
                timeout_graceful_shutdown=1,
            )
        )

    def run(self, listener: socket.socket) -> None:
        """Serves until it is told to end. Raises the exception that ended the engine."""
        before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            has_ended = asyncio.run(self._run(listener))
        finally:
            sys.setswitchinterval(before_s)
        error = self.service.engine.error
        if error is not None:
            raise error
        if not has_ended:  # it loads, and nothing can be asked of it: a thread inside a library may not see this end
            sys.stderr.flush()
            os._exit(0)

    async def _run(self, listener: socket.socket) -> bool:
        """Returns whether the engine's thread has ended."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._hear)
        serving = asyncio.create_task(self._uvicorn.serve([listener]))
        self.service.engine.start(loop)
        await self._until(lambda: self._num_signals or self.service.phase == "dead" or serving.done())
        await self._drain()
        close_s = CLOSE_S if self.service.engine.is_ready else GIVE_UP_S
        self.service.engine.stop()
        self.service.close()
        self._uvicorn.should_exit = True
        await serving
        return await asyncio.to_thread(self.service.engine.join, close_s)

    def _hear(self) -> None:
        self._num_signals += 1
        self.service.is_draining = True
        self._changed.set()

    def _engine_changed(self) -> None:
        if self.service.phase == "ready":
            took_s = time.monotonic() - self.service.started_s
            self._say(f"ready after {took_s:.1f} s")
        self._changed.set()

    async def _drain(self) -> None:
        """Lets requests end: until the time is over, a second signal comes, or the engine ends; then they are ended."""
        service = self.service
        if service.phase != "dead" and service.num_open:
            self._say(f"ending: {service.num_open} requests have {self.options.shutdown_timeout:g} s")
            await self._until(
                lambda: not service.num_open or self._num_signals > 1 or service.phase == "dead",
                self.options.shutdown_timeout,
            )
            service.abort_all()
        await self._until(lambda: not service.num_open, ANSWER_S)

    async def _until(self, is_so: Callable[[], bool], most_s: float = float("inf")) -> None:
        """Waits until something is so, or so long."""
        end_s = time.monotonic() + most_s
        while not is_so() and time.monotonic() < end_s:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._changed.wait()


class _Uvicorn(uvicorn.Server):
    """uvicorn without handlers of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
