"""Brings an answer to its client, whole or as it grows, while the engine goes on.

A client that goes away ends its request: `receive` tells, which is heard beside the work in both ways. One that takes
nothing is cut off by the kernel (listener.py), and has gone away then.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from penstock.engine.server.answers import ChatAnswer, CompletionAnswer, Usage, to_json
from penstock.engine.server.errors import ApiError, engine_dead, failed, shutting_down
from penstock.engine.server.outbox import Finish, Outbox, Piece
from penstock.engine.server.remote_engine import DEAD, SHUT_DOWN, RemoteEngine
from penstock.engine.server.sse import HEADERS, KEEP_ALIVE, Chunks, failure
from starlette.responses import JSONResponse, Response

QUIET_S = 10.0  # without news; then a comment keeps clients, and what lies between, from giving up
GONE = "the client has gone"
DISCONNECTED, DISCONNECTED_STATUS = "client_disconnected", 499  # as logs have it; nobody hears it

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass
class Delivered:
    """The end of a request, for the log."""

    status: int = 200
    error: str | None = None
    first_s: float | None = None  # time.perf_counter when the first token was sent


class Delivery(Response):
    """The response of a request whose sequences run; `on_end` is called once, whatever happens."""

    def __init__(
        self,
        engine: RemoteEngine,
        outbox: Outbox,
        answer: ChatAnswer | CompletionAnswer,
        on_end: Callable[[Delivered], None],
    ):
        self.engine, self.outbox, self.answer, self.on_end = engine, outbox, answer, on_end
        self.background = None
        self.id_header = {"x-request-id": answer.id}  # as the official client looks for it
        self.delivered = Delivered()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        try:
            await self.deliver(scope, receive, send)
        finally:
            watcher.cancel()
            self.outbox.close()
            self.engine.abort(self.outbox, GONE)
            self.on_end(self.delivered)

    async def deliver(self, scope: Message, receive: Receive, send: Send) -> None:
        """Sends the answer."""
        raise NotImplementedError

    async def _watch(self, receive: Receive) -> None:
        """Ends the sequences as soon as the client has gone."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.delivered.status, self.delivered.error = DISCONNECTED_STATUS, DISCONNECTED
        self.outbox.close()
        self.engine.abort(self.outbox, GONE)


class WholeAnswer(Delivery):
    """An answer that is sent when all of it is there."""

    async def deliver(self, scope: Message, receive: Receive, send: Send) -> None:
        outbox = self.outbox
        while not (outbox.has_ended or outbox.failure or outbox.closed):
            await outbox.wait()
            outbox.take()
        if outbox.closed:
            return
        if outbox.failure is not None:
            error = error_of(outbox.failure)
            self.delivered.status, self.delivered.error = error.status, error.code
            response = JSONResponse(error.body, error.status, error.headers | self.id_header)
        else:  # a large one must not hold up others
            body = await asyncio.to_thread(self._body)
            response = Response(body, headers=self.id_header, media_type="application/json")
        await response(scope, receive, send)

    def _body(self) -> str:
        sequences = self.outbox.sequences
        return to_json(self.answer.whole(sequences, Usage.of(sequences, self.outbox.n)))


class EventStream(Delivery):
    """An answer that is sent token by token."""

    def __init__(self, *arguments: Any, sends_usage: bool, sends_usage_always: bool):
        super().__init__(*arguments)
        self._chunks = Chunks(self.answer, self.outbox, sends_usage, sends_usage_always)
        self._moved_s = time.monotonic()  # when bytes were last given to the connection, or taken by it
        self._is_sending = self._has_ended = False

    async def deliver(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in (HEADERS | self.id_header).items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        keeper = asyncio.create_task(self._keep(send))
        try:
            await self._send(send, self._chunks.first())
            while not (self.outbox.closed or self._has_ended):
                await self.outbox.wait()
                await self._send_news(send)
        finally:
            keeper.cancel()

    async def _send_news(self, send: Send) -> None:
        """Sends what has come, with what ends a stream if that was all."""
        outbox, pieces = self.outbox, self.outbox.take()
        if outbox.failure is None:
            self._has_ended = outbox.has_ended
            data = await self._made(pieces)
            end = self._chunks.last() if self._has_ended else b""
        else:
            error = error_of(outbox.failure)
            self.delivered.status, self.delivered.error = error.status, error.code
            data = self._chunks.of([piece for piece in pieces if piece.finish is None or piece.finish.error is None])
            self._has_ended, end = True, failure(error)
        if data and self.delivered.first_s is None:
            self.delivered.first_s = time.perf_counter()
        await self._send(send, data + end)

    async def _made(self, pieces: list[Piece]) -> bytes:
        """The events of some pieces. Texts of a prompt's log probabilities take long: another thread makes them."""
        if any(piece.is_first for piece in pieces) and self.answer.gives_scores:
            return await asyncio.to_thread(self._chunks.of, pieces)
        return self._chunks.of(pieces)

    async def _send(self, send: Send, data: bytes) -> None:
        if data and not self.outbox.closed:
            self._is_sending, self._moved_s = True, time.monotonic()
            await send({"type": "http.response.body", "body": data, "more_body": not self._has_ended})
            self._is_sending, self._moved_s = False, time.monotonic()

    async def _keep(self, send: Send) -> None:
        """Sends comments in silence: one timer for a stream, where a timeout around each chunk would cost more than the
        chunk."""
        while True:
            await asyncio.sleep(QUIET_S if self._is_sending else self._moved_s + QUIET_S - time.monotonic())
            is_quiet = not self._is_sending and time.monotonic() - self._moved_s >= QUIET_S
            if is_quiet and not self._has_ended:
                await self._send(send, KEEP_ALIVE)


def error_of(finish: Finish) -> ApiError:
    """The API's error for the end of a sequence that did not end by itself."""
    known = {DEAD: engine_dead, SHUT_DOWN: shutting_down}
    return known[finish.error]() if finish.error in known else failed(finish.error)
