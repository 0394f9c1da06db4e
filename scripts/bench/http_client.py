"""A client of an OpenAI-compatible server that costs the machine little: it notes when tokens come, and reads none.

As the clients of users do, it keeps its connections and uses them again, the one that was used last first: a request
waits for a new one only where more are open than there were shortly before. Those that lie idle for long are closed at
the end: hundreds at once keep client and server busy for tens of milliseconds, which their requests would wait for.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

TOKEN, USAGE = b"data: {", b'"choices":[],'
HEAD_END, LAST_CHUNK = b"\r\n\r\n", b"0\r\n\r\n"
PAUSE_S = 1e-3  # between two calls, which others would wait for else
IDLE_S = 4.0  # that a connection may lie unused: by uvicorn's default servers close it after 5 s
SHORTLY_S = 2e-3  # before a request is due: from here on the event loop looks, since its timers are a millisecond late
_LENGTH = re.compile(rb"content-length: *(\d+)")


class Connection(asyncio.Protocol):
    """A connection that gets one answer after another. Of the newest one it has the events' time.perf_counter, `times`,
    but for those that are no object, the last of these, `final`, and the last line of any kind."""

    def __init__(self):
        self.is_open, self.used_s = True, time.perf_counter()
        self._ended: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    async def ask(self, request: bytes) -> None:
        """Sends a request, and waits until its answer or the connection has ended."""
        self.times: list[float] = []
        self.final = self.last = self._unread = self._line = b""
        self._has_head = self._in_chunks = False
        self._num_left = -1  # bytes of an answer that has not come in chunks; below 0 if it ends with the connection
        self._ended = asyncio.get_running_loop().create_future()
        if self.is_open:
            self.transport.write(request)
            await self._ended
        self.used_s = time.perf_counter()

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        self._unread += data
        if not self._has_head and not self._take_head():
            return
        *lines, self._line = (self._line + (self._chunks() if self._in_chunks else self._all())).split(b"\n")
        for line in lines:
            if line.startswith(TOKEN):
                self.times.append(now_s)
                self.final = line
            self.last = line or self.last
        if self._unread == LAST_CHUNK if self._in_chunks else self._num_left == 0:
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._end()

    def _end(self) -> None:
        if self._ended is not None and not self._ended.done():
            self.last = self._line or self.last
            self._ended.set_result(None)

    def _take_head(self) -> bool:
        """Reads how the answer will end, once its head is there."""
        head, self._has_head, rest = map(bytes, self._unread.partition(HEAD_END))
        if self._has_head:
            head = head.lower()
            self._in_chunks, length = b"transfer-encoding: chunked" in head, _LENGTH.search(head)
            self._num_left = int(length[1]) if length else -1
            self._unread = rest
        return bool(self._has_head)

    def _all(self) -> bytes:
        body, self._unread = self._unread, b""
        self._num_left -= len(body) if self._num_left > 0 else 0
        return body

    def _chunks(self) -> bytes:
        """The contents of the chunks that are there whole."""
        body, start = [], 0
        while (end := self._unread.find(b"\r\n", start)) >= 0:
            size = int(self._unread[start:end], 16)
            if not size or len(self._unread) < end + size + 4:
                break
            body.append(self._unread[end + 2 : end + 2 + size])
            start = end + size + 4
        self._unread = self._unread[start:]
        return b"".join(body)


class Client:
    """A client of one server, of one event loop. `late_s`: by how much each of the requests that were sent last went
    out after its time."""

    def __init__(self, address: tuple[str, int]):
        self._address = address
        self._free: list[Connection] = []
        self.late_s: list[float] = []

    async def send(
        self, bodies: Sequence[dict[str, Any]], arrivals: Sequence[float], most_open: int
    ) -> list[list[float]]:
        """Sends each request when its time has come, in seconds from the start, and no more than `most_open` at once.
        Returns the seconds from the start at which the tokens of each came."""
        requests, room = [request_of(body) for body in bodies], asyncio.Semaphore(most_open)
        self.late_s, start = [], time.perf_counter()

        async def one(body: dict[str, Any], request: bytes, arrival: float) -> list[float]:
            await until(start + arrival)
            async with room:
                self.late_s.append(time.perf_counter() - start - arrival)
                return [at - start for at in await self._stream(request, body["max_tokens"])]

        return list(await asyncio.gather(*map(one, bodies, requests, arrivals)))

    async def stream(self, body: dict[str, Any]) -> list[float]:
        """Sends a completion that is streamed. Returns time.perf_counter of each of its tokens. Raises RuntimeError
        unless the server says that it gave as many as were asked for."""
        return await self._stream(request_of(body), body["max_tokens"])

    async def _stream(self, request: bytes, num_asked: int) -> list[float]:
        connection = self._take() or await self._open()
        await connection.ask(request)
        self._free.append(connection)
        if USAGE not in connection.final:
            raise RuntimeError(f"the answer ended with {(connection.final or connection.last).strip()!r}")
        num_tokens = json.loads(connection.final.removeprefix(b"data: "))["usage"]["completion_tokens"]
        if num_tokens != num_asked:
            raise RuntimeError(f"asked for {num_asked} tokens, got {num_tokens}")
        times = connection.times[:-1]
        return times + times[-1:] * (num_tokens - len(times))  # the last ones may have come as one

    def _take(self) -> Connection | None:
        """The free connection that was used last; None if there is none that the server surely keeps."""
        while self._free and not self._free[-1].is_open:
            self._free.pop()
        is_fresh = bool(self._free) and time.perf_counter() - self._free[-1].used_s < IDLE_S
        return self._free.pop() if is_fresh else None

    async def _open(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return connection

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._free:
            connection.transport.close()
        self._free.clear()


async def until(due_s: float) -> None:
    """Waits until that time of time.perf_counter, as exactly as others of the event loop let it."""
    await asyncio.sleep(due_s - SHORTLY_S - time.perf_counter())
    while time.perf_counter() < due_s:
        await asyncio.sleep(0)


async def poll(address: tuple[str, int], path: str, most: int, ended: asyncio.Event) -> list[float]:
    """Seconds of each of up to `most` calls, one after another on one connection, PAUSE_S apart, until all has `ended`;
    of one call at least. Raises RuntimeError unless each gives 200 and nothing else."""

    def check(said: bytes, body: bytes) -> None:
        if not said.startswith(b"http/1.1 200") or body:
            raise RuntimeError(f"GET {path}: {said!r}")

    return await _call_again(address, head("GET", path, 0), check, most, ended)


async def be_refused(address: tuple[str, int], body: dict[str, Any], num_calls: int) -> list[float]:
    """Seconds in which each of so many requests is refused, one after another on one connection, PAUSE_S apart. Raises
    RuntimeError if one is not, by a 503 that says when to come again."""

    def check(said: bytes, body: bytes) -> None:
        if not said.startswith(b"http/1.1 503") or b"\nretry-after: " not in said or b"queue_full" not in body:
            raise RuntimeError(f"a request was not refused: {said!r}")

    return await _call_again(address, request_of(body), check, num_calls, asyncio.Event())


async def fill(address: tuple[str, int], body: dict[str, Any]) -> list[asyncio.StreamWriter]:
    """Sends requests, each on a connection of its own, until one is refused; these connections, which keep the others
    alive until they are closed."""
    writers: list[asyncio.StreamWriter] = []
    while True:
        reader, writer = await asyncio.open_connection(*address)
        writers.append(writer)
        writer.write(request_of(body))
        if not (await reader.readline()).startswith(b"HTTP/1.1 200"):
            return writers


async def _call_again(
    address: tuple[str, int], request: bytes, check: Callable[[bytes, bytes], None], most: int, ended: asyncio.Event
) -> list[float]:
    reader, writer = await asyncio.open_connection(*address)
    took: list[float] = []
    try:
        while not took or (len(took) < most and not ended.is_set()):
            start = time.perf_counter()
            writer.write(request)
            said = (await reader.readuntil(HEAD_END)).lower()
            length = _LENGTH.search(said)
            body = await reader.readexactly(int(length[1]) if length else 0)
            took.append(time.perf_counter() - start)
            check(said, body)
            await asyncio.sleep(PAUSE_S)
    finally:
        writer.close()
    return took


def request_of(body: dict[str, Any]) -> bytes:
    """A completion that is streamed, as bytes."""
    asked = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    return head("POST", "/v1/completions", len(asked)) + asked


def head(method: str, path: str, length: int) -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()
