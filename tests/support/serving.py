"""A service on the demo model without a port: its routes are called in an event loop of their own, through httpx, or as
ASGI has it where a client goes away in the middle or reads slowly. The work of the engine's process is done in a thread
here, where tests can reach it; the two still have nothing but their channel."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
from penstock.engine.config import EngineConfig
from penstock.engine.llm import LLM
from penstock.engine.server.app import make_app
from penstock.engine.server.channel import Channel
from penstock.engine.server.engine_work import EngineWork
from penstock.engine.server.metrics import Metrics
from penstock.engine.server.options import ServeOptions
from penstock.engine.server.service import Service
from penstock.engine.server.sse import KEEP_ALIVE

CONFIG = EngineConfig(
    model="demo",
    device="cpu",
    dtype="float32",
    max_model_len=256,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    scheduling_policy="priority",
)
WAIT_S = 60.0


class Kept(Metrics):
    """Metrics, and a log of requests, that tests look at."""

    def __init__(self):
        super().__init__()
        self.rejected: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.num_disconnects = 0
        self.passes: list[set[int]] = []  # the requests that each gave a token
        self.journeys: list[Any] = []

    def request_rejected(self, reason: str) -> None:
        super().request_rejected(reason)
        self.rejected.append(reason)

    def client_disconnected(self) -> None:
        super().client_disconnected()
        self.num_disconnects += 1

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def observe_pass(self, *told: Any) -> None:
        super().observe_pass(*told)
        self.passes.append({journey.sequence.request.id for journey in told[-1]})

    def sequence_ended(self, journey: Any) -> None:
        super().sequence_ended(journey)
        self.journeys.append(journey)


class Serving:
    """A service, and the event loop that it lives in; `start` loads its engine, by `make`. `llm` is the engine's own,
    and `error` what ended it."""

    def __init__(self, config: EngineConfig = CONFIG, make: Callable[[], LLM] | None = None, **options: Any):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.kept = Kept()
        self.service = Service(config, ServeOptions(**options), {}, self.kept, self.kept)
        self.app = make_app(self.service)
        ours, theirs = map(Channel, socket.socketpair())
        self._channels = ours, theirs
        self.work = EngineWork(lambda progress: make() if make else LLM(**config.to_dict(), progress=progress), theirs)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            self.work.run()
        except BaseException as error:
            self.error = error

    def begin(self) -> "Serving":
        """Begins to load the engine."""

        async def attach() -> None:
            self.service.engine.attach(self._channels[0])

        self.run(attach())
        asyncio.run_coroutine_threadsafe(self.service.open(), self.loop)
        self._thread.start()
        return self

    def start(self) -> "Serving":
        """Loads the engine."""
        self.begin()
        until(lambda: self.service.phase != "loading")
        assert self.service.phase == "ready", self.error
        return self

    @property
    def llm(self) -> LLM:
        return self.work.llm

    def close(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self.service.engine.stop)
            self._thread.join(WAIT_S)
            assert not self._thread.is_alive()
        self.service.close()
        self.loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        for channel in self._channels:
            self.loop.remove_reader(channel.fileno())
            channel.close()
        self.loop.stop()

    def run(self, work: Coroutine, most_s: float = WAIT_S) -> Any:
        """Runs a coroutine in the event loop, and returns what it gives."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(most_s)

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The response to one request."""

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=WAIT_S) as client:
                return await client.request(method, path, **request)

        return self.run(ask())

    def post(self, path: str, **body: Any) -> httpx.Response:
        """The response to a body of these fields."""
        return self.call("POST", path, json=body)

    def answer(self, path: str, **body: Any) -> dict[str, Any]:
        """The body of a good answer."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a good answer, before [DONE]."""
        response = self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        return chunks_of(response.text)

    def at_rest(self) -> bool:
        """Tells whether no row and no page is held."""
        scheduler = self.llm.loop.scheduler
        free = scheduler.num_free_pages == scheduler.pool.num_usable
        return not (scheduler.num_running or scheduler.num_waiting or self.service.engine.num_unfinished) and free

    def abandoned(self, path: str, when: Callable[["Client"], bool], **body: Any) -> "Client":
        """A client that goes away as soon as `when` is so."""
        client = Client(path, body, when)
        self.run(client.ask(self.app))
        return client


class Client:
    """A client as ASGI sees it: `bodies` are the bytes that it got. It goes away when `leaves` says so; `takes` is
    awaited whenever it is to take bytes."""

    def __init__(
        self,
        path: str,
        body: dict[str, Any],
        leaves: Callable[["Client"], bool] = lambda client: False,
        takes: Callable[[], Coroutine] | None = None,
    ):
        self.path, self.body, self.leaves, self.takes = path, body, leaves, takes
        self.status: int | None = None
        self.bodies: list[bytes] = []

    async def ask(self, app: Any) -> "Client":
        """Sends the request, and returns when the application has ended."""
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": json.dumps(self.body).encode(), "more_body": False}
            while not self.leaves(self):
                await asyncio.sleep(0.001)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            else:
                if self.takes is not None:
                    await self.takes()
                self.bodies.append(message.get("body", b""))

        headers = [(b"content-type", b"application/json"), (b"host", b"localhost:80")]
        scope = {"type": "http", "method": "POST", "path": self.path, "raw_path": self.path.encode()}
        scope |= {"query_string": b"", "root_path": "", "scheme": "http", "headers": headers, "http_version": "1.1"}
        await app(scope | {"asgi": {"version": "3.0"}, "server": ("server", 80), "client": ("c", 1)}, receive, send)
        return self

    @property
    def text(self) -> str:
        return b"".join(self.bodies).decode()


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well. Asserts that nothing else is in it, but for what keeps a connection open
    where tokens take long."""
    events = text.replace(KEEP_ALIVE.decode(), "").split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""], events[-2:]
    assert all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def until(is_so: Callable[[], Any], most_s: float = WAIT_S) -> None:
    """Waits until something is so; fails if it takes too long."""
    end_s = time.monotonic() + most_s
    while not is_so():
        assert time.monotonic() < end_s, "it did not come to be so"
        time.sleep(0.002)


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Serving]:
    """A service that is loaded, and is ended at the end."""
    served = Serving(**options).start()
    try:
        yield served
    finally:
        served.close()
