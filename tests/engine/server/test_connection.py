"""Connections as strangers use them: heads that are too large, what is no HTTP, bodies that nobody reads."""

import asyncio
import contextlib
import functools
import json
import socket
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from penstock.engine.server import connection, listener
from penstock.engine.server.connection import MOST_HEAD_BYTES, Connection
from penstock.engine.server.listener import bind
from uvicorn.server import ServerState

from tests.support.serving import until

ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


class Listening:
    """The shared service at a port: `connect` makes connections to it, of which `open` are those that it keeps."""

    def __init__(self, address: tuple[str, int], open_ones: set):
        self.address, self.open = address, open_ones

    def connect(self, most_bytes: int | None = None) -> socket.socket:
        """A connection, which takes so many bytes before they are read."""
        stream = socket.socket()
        stream.settimeout(30)
        if most_bytes is not None:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, most_bytes)
        stream.connect(self.address)
        return stream


@pytest.fixture
def listening(served) -> Iterator[Listening]:
    config = uvicorn.Config(served.app, http=Connection, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()

    async def listen(listener: socket.socket) -> asyncio.Server:
        made = functools.partial(Connection, config, state, {})
        return await asyncio.get_running_loop().create_server(made, sock=listener)

    async def end() -> None:
        server.close()

    state = ServerState()
    with bind("127.0.0.1", 0) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server = served.run(listen(listener))
        yield Listening(listener.getsockname(), state.connections)
        served.run(end())


@pytest.fixture
def connect(listening) -> Callable[[], socket.socket]:
    """Makes connections to the shared service."""
    return listening.connect


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(listener, "TAKES_NOTHING_S", 1)


def rest_of(stream: socket.socket) -> bytes:
    """The bytes until the server closes."""
    with contextlib.suppress(ConnectionResetError):  # it has not read all that was said
        return b"".join(iter(functools.partial(stream.recv, 65536), b""))
    return b""


def said_to(connect, text: bytes) -> tuple[int, bytes]:
    """The status and the body that come back for this."""
    with connect() as stream:
        stream.sendall(text)
        head, _, body = rest_of(stream).partition(b"\r\n\r\n")
        return int(head.split()[1]), body


def head_of(num_bytes: int, num_lines: int = 1) -> bytes:
    """The head of a good request, of so many bytes."""
    spare, lines = num_bytes - len(ASK) - 2, []
    for left in range(num_lines, 0, -1):
        length = spare // left
        lines.append(b"X: " + b"a" * (length - 5) + b"\r\n")
        spare -= length
    return ASK + b"".join(lines) + b"\r\n"


@pytest.mark.parametrize("num_lines", [1, 300])
def test_a_head_has_so_many_bytes_at_most_also_if_it_comes_at_once(connect, num_lines):
    head = head_of(MOST_HEAD_BYTES, num_lines)
    assert len(head) == MOST_HEAD_BYTES and said_to(connect, head) == (200, b"")
    for num_bytes in (MOST_HEAD_BYTES + 1, 60_000):
        status, body = said_to(connect, head_of(num_bytes, num_lines))
        assert status == 400 and str(MOST_HEAD_BYTES) in json.loads(body)["error"]["message"]


NO_HOST, NO_HEADER = b"GET / HTTP/1.1\r\n\r\n", ASK + b"a\r\n\r\n"


@pytest.mark.parametrize("said", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\0", NO_HOST, NO_HEADER])
def test_what_is_no_request_gets_an_error_in_json(connect, said):
    status, body = said_to(connect, said)
    assert (status, set(json.loads(body)["error"])) == (400, {"message", "type", "param", "code"})


@pytest.mark.parametrize("route", [b"GET /health", b"POST /v1/completions"])
def test_a_body_that_is_no_http_is_answered_once(connect, caplog, route):
    """By the connection, before the handler can."""
    head = b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect() as stream:
        stream.sendall(route + head + b"no chunk\r\n")
        answer = rest_of(stream)
    assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    assert said_to(connect, ASK + b"\r\n") == (200, b"")
    assert not [record for record in caplog.records if record.exc_info]


def test_what_follows_an_answer_and_is_no_http_ends_the_connection_alone(connect, served):
    """An answer that came before the body is the only one; nothing fails in the event loop."""
    failed = []
    served.loop.call_soon_threadsafe(served.loop.set_exception_handler, lambda loop, context: failed.append(context))
    with connect() as stream:
        stream.sendall(POST + b"Content-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        answer = stream.recv(65536)
        assert b" 400 " in answer
        stream.sendall(b"no chunk\r\n")
        assert b"HTTP/1.1" not in rest_of(stream)
    served.loop.call_soon_threadsafe(served.loop.set_exception_handler, None)
    assert said_to(connect, ASK + b"\r\n") == (200, b"") and not failed


def test_the_rest_of_a_body_that_nobody_reads_is_not_awaited_for_long(connect, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    with connect() as stream:
        stream.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\na")
        assert b" 200 " in stream.recv(65536)
        stream.sendall(b"a")
        assert rest_of(stream) == b""


def test_who_asks_for_another_protocol_is_answered_in_http(connect, caplog):
    asked = ASK.replace(b"close", b"Upgrade") + b"Upgrade: websocket\r\n\r\n" + ASK + b"\r\n"
    with connect() as stream:
        stream.sendall(asked)
        assert rest_of(stream).count(b"HTTP/1.1 200 ") == 2 and not caplog.records


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone cuts such clients off")
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "stream"])
def test_who_takes_nothing_is_cut_off(impatient, listening, served, caplog, streams):
    """A stream that is cut so counts as a client that went; a whole answer was given to the kernel before."""
    asked = {"prompt": "Return", "max_tokens": 100, "n": 6, "logprobs": 20, "ignore_eos": True, "stream": streams}
    body, kept = json.dumps(asked).encode(), served.kept
    head = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    num_records, num_disconnects = len(kept.records), kept.num_disconnects
    with listening.connect(most_bytes=4096) as stream:
        stream.sendall(POST + head + body)
        until(lambda: len(kept.records) > num_records and not listening.open)
        assert len(rest_of(stream)) < 65536
    record = kept.records[-1]
    assert (record["status"], record["error"]) == ((499, "client_disconnected") if streams else (200, None))
    assert kept.num_disconnects == num_disconnects + streams and not caplog.records
