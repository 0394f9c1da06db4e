"""A client of an OpenAI-compatible server that costs the machine little: it notes when lines come, and reads none."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

TOKEN, USAGE = b"data: {", b'"choices":[],'
PAUSE_S = 1e-3  # between two calls, which others would wait for else


async def stream(address: tuple[str, int], body: dict[str, Any]) -> list[float]:
    """Sends a completion that is streamed. Returns time.perf_counter of each of its tokens. Raises RuntimeError unless
    the server says that it gave as many as were asked for."""
    reader, writer = await asyncio.open_connection(*address)
    asked = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    writer.write(head("POST", "/v1/completions", len(asked)) + asked)
    times, usage, last = [], b"", b""
    try:
        while line := await reader.readline():
            last = line.strip() or last
            if line.startswith(TOKEN):
                times.append(time.perf_counter())
                usage = line
    finally:
        writer.close()
    if USAGE not in usage:
        raise RuntimeError(f"the answer ended with {usage or last!r}")
    num_tokens = json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"]
    if num_tokens != body["max_tokens"]:
        raise RuntimeError(f"asked for {body['max_tokens']} tokens, got {num_tokens}")
    del times[-1]
    return times + times[-1:] * (num_tokens - len(times))  # the last ones may have come as one


async def poll(address: tuple[str, int], path: str, most: int, ended: asyncio.Event) -> list[float]:
    """Seconds of each of up to `most` calls, one after another on one connection, PAUSE_S apart, until all has `ended`;
    of one call at least."""
    reader, writer = await asyncio.open_connection(*address)
    took: list[float] = []
    try:
        while not took or (len(took) < most and not ended.is_set()):
            start = time.perf_counter()
            writer.write(head("GET", path, 0, "keep-alive"))
            said = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not said.startswith(b"http/1.1 200") or b"content-length: 0" not in said:
                raise RuntimeError(f"GET {path}: {said!r}")
            took.append(time.perf_counter() - start)
            await asyncio.sleep(PAUSE_S)
    finally:
        writer.close()
    return took


def head(method: str, path: str, length: int, connection: str = "close") -> bytes:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length}\r\nConnection: {connection}\r\n\r\n"
    ).encode()


async def send(
    address: tuple[str, int], bodies: Sequence[dict[str, Any]], arrivals: Sequence[float], most_open: int
) -> list[list[float]]:
    """Sends each request when its time has come, in seconds from the start, and no more than `most_open` at once.
    Returns the seconds from the start at which the tokens of each came."""
    start, room = time.perf_counter(), asyncio.Semaphore(most_open)

    async def one(body: dict[str, Any], arrival: float) -> list[float]:
        await asyncio.sleep(arrival - (time.perf_counter() - start))
        async with room:
            return [at - start for at in await stream(address, body)]

    return list(await asyncio.gather(*map(one, bodies, arrivals)))
