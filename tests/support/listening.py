"""A served model that listens: what a browser talks to."""

import asyncio
import dataclasses
import socket
from typing import Any

import uvicorn
from penstock.engine.server.access import OPEN, KeyGuard

from tests.support.serving import CONFIG, Serving


class Listening:
    """A service at `url`, until it is closed. `key` may be set while it serves."""

    def __init__(self, **options: Any):
        self.serving, self.key = Serving(dataclasses.replace(CONFIG, **options)).start(), None
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        settings = {"interface": "asgi3", "log_level": "error", "lifespan": "off", "timeout_graceful_shutdown": 1}
        self._server = uvicorn.Server(uvicorn.Config(self._answer, **settings))
        self._http = asyncio.run_coroutine_threadsafe(self._server.serve([listener]), self.serving.loop)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        app = self.serving.app if self.key is None else KeyGuard(self.serving.app, self.key, OPEN)
        await app(scope, receive, send)

    def stop_http(self) -> None:
        """Ends all answers; the engine goes on."""
        self._server.should_exit = True
        self._http.result(20)

    def close(self) -> None:
        self.stop_http()
        self.serving.close()
