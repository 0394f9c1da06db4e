"""The client of servers: it keeps its connections, reads chunks however they come, and sends when it is time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from scripts.bench import http_client
from scripts.bench.http_client import Client

BODY = {"max_tokens": 3}
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TOKENS = [b'data: {"choices":[{"text":"a\\n\\ndata: {"}]}\n\n'] * 3
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def in_chunks(*events: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in (*events, b""))


class Server:
    """A server that answers every request with the same bytes, `step` of them at a time; `requests` has how many came
    by each connection."""

    def __init__(self, answer: bytes, step: int = 1 << 16, closes: bool = False):
        self.answer, self.step, self.closes = answer, step, closes
        self.requests: list[int] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.requests)
        self.requests.append(0)
        while await reader.read(1 << 16):
            self.requests[number] += 1
            for start in range(0, len(self.answer), self.step):
                writer.write(self.answer[start : start + self.step])
                await writer.drain()
                await asyncio.sleep(0)
            if self.closes:
                break
        writer.close()

    def run(self, use: Any) -> Any:
        """Returns what `use` gives of a client of this server."""

        async def running() -> Any:
            async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
                client = Client(server.sockets[0].getsockname())
                try:
                    return await use(client)
                finally:
                    client.close()

        return asyncio.run(running())


async def two(client: Client) -> list[list[float]]:
    return [await client.stream(BODY), await client.stream(BODY)]


@pytest.mark.parametrize("step", [1, 7, 1 << 16])
@pytest.mark.parametrize("events", [(*TOKENS, USAGE + DONE), (b"".join(TOKENS), KEEP_ALIVE, USAGE, DONE)])
def test_a_connection_is_used_again(events, step):
    server = Server(in_chunks(*events), step)
    assert [len(times) for times in server.run(two)] == [3, 3] and server.requests == [2]


def test_no_more_connections_are_opened_than_are_used_at_once():
    server = Server(in_chunks(*TOKENS, USAGE))
    server.run(lambda client: client.send([BODY] * 12, [0.0] * 12, 3))
    assert len(server.requests) == 3 and sum(server.requests) == 12


def test_a_connection_that_the_server_has_closed_is_replaced():
    async def use(client: Client) -> Any:
        times = [await client.stream(BODY)]
        while client._free[0].is_open:
            await asyncio.sleep(0)
        return [*times, await client.stream(BODY)]

    server = Server(in_chunks(*TOKENS, USAGE), closes=True)
    assert [len(times) for times in server.run(use)] == [3, 3] and server.requests == [1, 1]


def test_a_connection_that_was_idle_for_long_is_replaced_and_closed_at_the_end(monkeypatch):
    monkeypatch.setattr(http_client, "IDLE_S", 0.0)
    server, clients = Server(in_chunks(*TOKENS, USAGE)), []

    async def use(client: Client) -> None:
        clients.append(client)
        await two(client)
        assert [connection.is_open for connection in client._free] == [True, True]

    server.run(use)
    assert server.requests == [1, 1] and not clients[0]._free


def test_an_answer_that_is_an_error_is_said_and_its_connection_kept():
    server = Server(b'HTTP/1.1 503 No\r\nContent-Length: 14\r\n\r\n{"error":"no"}', step=5)

    async def use(client: Client) -> None:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="ended with .*no"):
                await client.stream(BODY)

    server.run(use)
    assert server.requests == [2]


def test_requests_are_sent_when_it_is_time():
    arrivals = [0.0, 0.02, 0.01]
    clients: list[Client] = []

    def use(client: Client) -> Coroutine:
        clients.append(client)
        return client.send([BODY] * 3, arrivals, 3)

    times = Server(in_chunks(*TOKENS, USAGE)).run(use)
    assert all(came[0] > due for came, due in zip(times, arrivals))
    assert len(clients[0].late_s) == 3 and min(clients[0].late_s) >= 0.0
