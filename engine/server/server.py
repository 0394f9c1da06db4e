"""The life of a server's front: listen while the engine loads in its process, serve, and end by a signal or with the
engine.

    the port is bound, the engine's process runs -> listen -> serve -> a signal: new requests get a 503, those under way
    may end until --shutdown-timeout; a second signal ends them at once -> end the engine's process -> exit 0

If the engine fails, its process says why on standard error; clients are answered, then the front ends as well.
uvicorn's own handlers of signals do none of that, so they are off.
"""

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

import uvicorn
from penstock.engine.runtime import heap
from penstock.engine.server.app import make_app
from penstock.engine.server.connection import Connection
from penstock.engine.server.engine_process import EngineProcess
from penstock.engine.server.open_files import LoopErrors
from penstock.engine.server.service import Service
from penstock.engine.server.signals import not_ignored

ANSWER_S = 3.0  # for clients to take the last answer, once the engine has ended or all was aborted
# For the engine's process to end: one that serves, one that has failed and says why, and one that loads or is stopped.
CLOSE_S, FAIL_S, GIVE_UP_S = 20.0, 5.5, 0.0
# The most that event loop and workers wait for each other's Python: by Python's default, 5 ms, that is a whole pass.
SWITCH_S = 0.5e-3
LOOK_S = 0.5  # between two looks at the engine's process
_POLL_S = 0.02


class Server:
    """One server, on the main thread. `say` shows a line to whoever started it."""

    def __init__(self, service: Service, process: EngineProcess, say: Callable[[str], None]):
        self.service, self.process, self._say = service, process, say
        self._num_signals = 0
        self._is_stopped = False  # the engine's process
        self._error: Exception | None = None  # of the front's own start
        self._changed = asyncio.Event()
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                make_app(service),
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )

    def run(self, listener: socket.socket) -> int:
        """Serves until it is told to end. Returns the exit status: that of the engine, or 1, if it failed. Raises
        ValueError for a tokenizer that cannot be read."""
        before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            has_failed = asyncio.run(self._run(listener))
        finally:
            sys.setswitchinterval(before_s)
            self.process.end(GIVE_UP_S)
        if self._error is not None:
            raise self._error
        if not has_failed:
            return 0
        if not self._is_stopped and (how := self.process.unexplained_end) is not None:
            self._say(f"the engine {how}")
        return self.process.exit_status

    async def _run(self, listener: socket.socket) -> bool:
        """Returns whether the engine has failed."""
        loop, service = asyncio.get_running_loop(), self.service
        loop.set_exception_handler(LoopErrors(self._say))
        for number in not_ignored():
            loop.add_signal_handler(number, self._hear, number)
        serving = asyncio.create_task(self._uvicorn.serve([listener]))
        service.engine.attach(self.process.channel)
        others = [asyncio.create_task(self._open()), asyncio.create_task(self._watch())]
        await self._until(lambda: self._num_signals or service.phase == "dead" or serving.done() or self._error)
        ends_s = time.monotonic()
        await self._drain()
        has_failed, most_s = service.engine.has_failed, self._time_to_end(time.monotonic() - ends_s)
        service.engine.stop()
        service.close()
        for task in others:
            task.cancel()
        self._uvicorn.should_exit = True
        await serving
        await asyncio.to_thread(self.process.end, most_s)
        return has_failed

    def _hear(self, number: int) -> None:
        if number == signal.SIGHUP and self._num_signals:  # of one terminal that is gone, more than one may come
            return
        self._num_signals += 1
        self.service.is_draining = True
        self._changed.set()

    async def _open(self) -> None:
        try:
            await self.service.open()
        except Exception as error:
            self._error = error
        self._changed.set()
        if self.service.phase == "ready":
            heap.set_aside()
            took_s = time.monotonic() - self.service.started_s
            self._say(f"ready after {took_s:.1f} s")

    async def _watch(self) -> None:
        """Gives up an engine whose process does nothing any more; the channel tells if it is gone."""
        while (fault := self.process.fault()) is None:
            await asyncio.sleep(LOOK_S)
        self._say(f"the engine {fault}")
        self._is_stopped = True
        self.service.engine.fail()

    def _time_to_end(self, passed_s: float) -> float:
        """The seconds that the engine's process has to end by itself, when so many have passed since it failed, or the
        server was told to end."""
        has_failed = self.service.engine.has_failed
        if self._is_stopped or (self.service.model is None and not has_failed):
            return GIVE_UP_S
        return max(FAIL_S - passed_s, GIVE_UP_S) if has_failed else CLOSE_S

    async def _drain(self) -> None:
        """Lets requests end: until the time is over, a second signal comes, or the engine ends; then they are ended."""
        service = self.service
        if service.phase != "dead" and service.num_open:
            may_take = f"may take {service.options.shutdown_timeout:g} s more; a second signal ends them at once"
            self._say(f"ending: requests under way ({service.num_open}) {may_take}")
            await self._until(
                lambda: not service.num_open or self._num_signals > 1 or service.phase == "dead",
                self.service.options.shutdown_timeout,
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
