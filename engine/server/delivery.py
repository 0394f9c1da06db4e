"""Brings an answer to its client, whole or as it grows, while the engine goes on.

A client that goes away ends its request: `receive` tells, which is heard beside the work in both ways. One that takes
nothing for WRITE_S is given up.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from penstock.engine.server.answers import ChatAnswer, CompletionAnswer, Usage
from penstock.engine.server.engine_thread import DEAD, SHUT_DOWN, EngineThread
from penstock.engine.server.errors import ApiError, engine_dead, failed, shutting_down
from penstock.engine.server.outbox import Finish, Outbox
from penstock.engine.server.sse import HEADERS, KEEP_ALIVE, Chunks, failure
from starlette.responses import JSONResponse, Response

QUIET_S = 10.0  # without news; then a comment keeps clients, and what lies between, from giving up
WRITE_S = 60.0
GONE = "the client has gone"

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
        engine: EngineThread,
        outbox: Outbox,
        answer: ChatAnswer | CompletionAnswer,
        on_end: Callable[[Delivered], None],
    ):
        self.engine, self.outbox, self.answer, self.on_end = engine, outbox, answer, on_end
        self.background = None
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
        self.delivered.status, self.delivered.error = 499, "client_disconnected"
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
            response = JSONResponse(error.body, error.status, error.headers)
        else:
            response = JSONResponse(self.answer.whole(outbox.sequences, Usage.of(outbox.sequences, outbox.n)))
        async with asyncio.timeout(WRITE_S):
            await response(scope, receive, send)


class EventStream(Delivery):
    """An answer that is sent token by token."""

    def __init__(self, *arguments: Any, sends_usage: bool, sends_usage_always: bool):
        super().__init__(*arguments)
        self._chunks = Chunks(self.answer, self.outbox, sends_usage, sends_usage_always)

    async def deliver(self, scope: Message, receive: Receive, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with contextlib.suppress(TimeoutError):  # it takes nothing any more
            await self._send(send, self._chunks.first())
            while not self.outbox.closed:
                if await self._send_news(send):
                    break

    async def _send_news(self, send: Send) -> bool:
        """Sends what has come, or after a while that nothing has. Returns whether that was the end."""
        outbox = self.outbox
        try:
            async with asyncio.timeout(QUIET_S):
                await outbox.wait()
        except TimeoutError:
            await self._send(send, KEEP_ALIVE)
            return False
        pieces = outbox.take()
        whole = [piece for piece in pieces if piece.finish is None or piece.finish.error is None]
        if whole and self.delivered.first_s is None:
            self.delivered.first_s = time.perf_counter()
        if outbox.failure is not None:
            error = error_of(outbox.failure)
            self.delivered.status, self.delivered.error = error.status, error.code
            await self._send(send, self._chunks.of(whole) + failure(error), is_last=True)
            return True
        if outbox.has_ended:
            await self._send(send, self._chunks.of(whole) + self._chunks.last(), is_last=True)
            return True
        await self._send(send, self._chunks.of(whole))
        return False

    async def _send(self, send: Send, data: bytes, is_last: bool = False) -> None:
        """Sends bytes. Raises TimeoutError if the client takes nothing."""
        if data and not self.outbox.closed:
            async with asyncio.timeout(WRITE_S):
                await send({"type": "http.response.body", "body": data, "more_body": not is_last})


def error_of(finish: Finish) -> ApiError:
    """The API's error for the end of a sequence that did not end by itself."""
    known = {DEAD: engine_dead, SHUT_DOWN: shutting_down}
    return known[finish.error]() if finish.error in known else failed(finish.error)
