"""The door of the server: the key that a request must bring, where one is set, the name by which it asks, and its body,
read within bounds of size and time.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any

from penstock.engine.server.errors import ApiError, refused, unauthorised
from penstock.engine.user_files import has_lone_surrogate, parse_json
from penstock.scheduler.units import MIB
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

MOST_BODY_BYTES = 32 * MIB
BODY_S = 60.0  # in which a body must have come
SMALL_BYTES = 64 * 1024  # of a body that is parsed at once; a larger one must not hold up others
OPEN = ("/", "/health")  # routes without a key
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # what half of a surrogate pair is written as
_CLOSE = (("Connection", "close"),)  # what is left of the body is not read


class Guard:
    """An ASGI application in front of another, which lets requests through that its subclass has no `fault` in. `note`
    hears of the others: their scopes and errors."""

    def __init__(self, app: Callable[..., Awaitable[None]], note: Callable[[dict[str, Any], ApiError], None]):
        self._app, self._note = app, note

    def fault(self, scope: dict[str, Any]) -> ApiError | None:
        """The error of a request that is to be refused."""
        raise NotImplementedError

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (error := self.fault(scope)) is not None:
            self._note(scope, error)
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class KeyGuard(Guard):
    """A guard that only those pass who send the key. The keys are compared by their digests, in a time that tells
    nothing."""

    def __init__(self, app: Any, note: Any, key: str, open_routes: tuple[str, ...]):
        super().__init__(app, note)
        self._digest, self._open = _digest(key.encode()), open_routes

    def fault(self, scope: dict[str, Any]) -> ApiError | None:
        return None if scope["path"] in self._open or self._has_key(scope["headers"]) else unauthorised()

    def _has_key(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = dict(headers).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key.strip()), self._digest)


class HostGuard(Guard):
    """A guard of an application that listens on this machine alone, without a key: a page of another site may have its
    name lead to this machine, and would then be let in by the browser. A request under such a name is refused;
    addresses and localhost cannot be made to lead elsewhere."""

    def fault(self, scope: dict[str, Any]) -> ApiError | None:
        if _is_own(dict(scope["headers"]).get(b"host", b"").decode("latin-1")):
            return None
        return refused("Host: expected an address or localhost; for other names set --api-key or --host")


def _is_own(host: str) -> bool:
    """Tells whether a Host header names an address, or localhost."""
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or is_address(name)


def is_address(name: str) -> bool:
    """Tells whether this is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Tells whether only this machine can reach that address."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def read_body(request: Request) -> Any:
    """The JSON of a request. Raises ApiError for another kind of body, one that is too large, that does not come, or
    that is not JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site may send other kinds without asking
        raise refused("Content-Type: expected application/json")
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told[:20]) > MOST_BODY_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_S):
            body = await _read(request)
    except TimeoutError:
        raise ApiError(400, f"the body did not come within {BODY_S:g} s", more_headers=_CLOSE) from None
    except ClientDisconnect:
        raise refused("the body ended early") from None  # nobody hears it
    return parse(body) if len(body) <= SMALL_BYTES else await asyncio.to_thread(parse, body)


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BODY_BYTES:
            raise _too_large()
    return bytes(body)


def _too_large() -> ApiError:
    return ApiError(413, f"the body has more than {MOST_BODY_BYTES} bytes", more_headers=_CLOSE)


def parse(body: bytes) -> Any:
    """The JSON of a body. Raises ApiError."""
    try:
        content = parse_json(body, "body")
    except ValueError as error:
        raise refused(str(error)) from None
    if _HALF.search(body) and has_lone_surrogate(json.dumps(content, ensure_ascii=False)):
        raise refused("body: has half of a surrogate pair, which is no text")
    return content
