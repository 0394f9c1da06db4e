"""More connections than files may be open: they wait, and one line says so."""

import asyncio
import contextlib
import resource
import socket

import pytest
from penstock.engine.server import open_files
from penstock.engine.server.listener import bind
from penstock.engine.server.open_files import LoopErrors, allow_many

MANY = 8


@pytest.fixture
def limit():
    """Keeps this process' own limit: what is set is given back."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_and_never_lowered(limit, monkeypatch):
    _, most = limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most))
    monkeypatch.setattr(open_files, "MOST_FILES", 300)
    allow_many()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, most)
    monkeypatch.setattr(open_files, "MOST_FILES", 200)
    allow_many()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, most)


def test_connections_without_a_file_wait_and_are_one_line(limit, caplog):
    lines = []

    async def take_all() -> None:
        loop, taken = asyncio.get_running_loop(), []
        loop.set_exception_handler(LoopErrors(lines.append))

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:
                taken.append(transport)

        clients = [socket.create_connection(listener.getsockname()) for _ in range(MANY)]
        with contextlib.closing(socket.socket()) as last:  # the next file would have this number or a higher one
            next_file = last.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, limit[1]))
        async with await loop.create_server(Protocol, sock=listener, backlog=MANY):
            while not lines:
                await asyncio.sleep(0.01)
            assert not taken
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            while len(taken) < MANY:
                await asyncio.sleep(0.01)
            for connection in (*clients, *taken):
                connection.close()

    with bind("127.0.0.1", 0) as listener:
        asyncio.run(take_all())
    assert len(lines) == 1 and "ulimit -n" in lines[0] and not caplog.records


def test_other_errors_are_shown_as_ever(caplog):
    async def fail() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(LoopErrors(pytest.fail))
        loop.call_exception_handler({"message": "something else", "exception": ConnectionError()})

    asyncio.run(fail())
    assert "something else" in caplog.text
