"""uvicorn's HTTP connection with what it lacks: a time within which the head of a request must have come. Between
requests it is kept for longer."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_HEAD_BYTES = 32 * 1024
HEAD_S = 20.0
KEEP_ALIVE_S = 75  # without a request; longer than clients keep one, which might use it again while it is closed


class Connection(H11Protocol):
    """A connection that is closed if a request's head does not come in time, from its first byte on, or from the
    connection's start."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.timeout_keep_alive = KEEP_ALIVE_S
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """Starts the timer where a head is awaited, and stops it where one has come."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self._end)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
