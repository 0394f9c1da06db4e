"""uvicorn's HTTP connection with what it lacks: a size and a time within which the head of a request must have come, a
time for a body that nobody reads, and an error in JSON for what is no request. Between requests it is kept for longer.
"""

import asyncio
import json
from typing import Any

import h11
from penstock.engine.server.errors import refused
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_HEAD_BYTES = 32 * 1024
HEAD_S = 20.0
KEEP_ALIVE_S = 75  # without a request; longer than clients keep one, which might use it again while it is closed
NO_REQUEST = refused(f"expected an HTTP request, with a head of at most {MOST_HEAD_BYTES} bytes")


class Connection(H11Protocol):
    """A connection that is closed if a request's head does not come in time, from its first byte on, or from the
    connection's start; and if the rest of a body does not, once it is answered without."""

    _timer: asyncio.TimerHandle | None = None

    def __init__(self, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.conn = _Http(h11.SERVER, MOST_HEAD_BYTES)

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.timeout_keep_alive = KEEP_ALIVE_S
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, unless it follows an answer, and closes. A running handler has nobody to answer."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(NO_REQUEST.body).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            answer = h11.Response(status_code=400, headers=list(headers.items()))
            for part in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(part))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        """No: there is nothing but HTTP here, and nobody needs to hear of who asks."""
        return False

    def _awaits(self) -> bool:
        """Tells whether something is to come that no handler waits for."""
        theirs = self.conn.their_state
        return theirs is h11.IDLE or (theirs is h11.SEND_BODY and self.conn.our_state in (h11.DONE, h11.MUST_CLOSE))

    def _watch(self) -> None:
        """Starts the timer where something is awaited, and stops it where nothing is any more."""
        if not self._awaits():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self._end)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer = None
        if self._awaits() and not self.transport.is_closing():
            self.transport.close()


class _Http(h11.Connection):
    """h11's reader of requests, which by itself bounds only heads that are not whole yet."""

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request) and _head_bytes(event) > MOST_HEAD_BYTES:
            raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
        return event


def _head_bytes(request: h11.Request) -> int:
    """The bytes of a head, without spaces that mean nothing."""
    lines = sum(len(name) + len(value) + len(b": \r\n") for name, value in request.headers)
    return lines + len(request.method) + len(request.target) + len(b"  HTTP/1.1\r\n\r\n")
