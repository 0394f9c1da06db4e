"""A small server with the page, metrics and status of the real one: an engine on the demo model in a thread, a chat
that streams, and a key if one is wanted. `failing` makes answers fail in their middle."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from penstock.engine.output import Sequence
from penstock.engine.server.metrics import Metrics
from penstock.engine.server.pages import add_routes
from penstock.engine.server.status import describe

from penstock import LLM, SamplingParams

OPTIONS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 512, "resident": "none"}


class SmallServer:
    """It serves at `url` until it is closed."""

    def __init__(self):
        self.llm, self.key, self.failing, self.phase = LLM("demo", **OPTIONS), None, False, "ready"
        self._stops, self._ended = threading.Event(), {}
        self.app = self._make_app()
        self._engine = threading.Thread(target=self._run_engine)
        self._engine.start()
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="error", timeout_graceful_shutdown=1))
        self._http = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._http.start()

    def _run_engine(self) -> None:
        while not self._stops.is_set():
            for event in self.llm.loop.advance() if self.llm.loop.has_unfinished else []:
                if event.is_last:
                    self._ended[event.sequence.request.id] = True
            time.sleep(0.002)

    def _make_app(self) -> FastAPI:
        app = FastAPI()
        add_routes(app, self._service(), Metrics())

        @app.middleware("http")
        async def check_key(request: Request, go_on: Any) -> Response:
            open_to_all = self.key is None or request.url.path == "/"
            if open_to_all or request.headers.get("authorization") == f"Bearer {self.key}":
                return await go_on(request)
            return JSONResponse({"error": {"message": "no key"}}, 401)

        @app.get("/status")
        async def status() -> Response:
            return JSONResponse(describe(self._service()))

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            (rendered,) = self.llm.render_chat((await request.json())["messages"])
            (sequence,) = self.llm.sequences(rendered, SamplingParams(max_tokens=40, ignore_eos=True, seed=1))
            self.llm.loop.add(sequence)
            return StreamingResponse(self._chunks(sequence), media_type="text/event-stream")

        return app

    def _service(self) -> SimpleNamespace:
        return SimpleNamespace(
            phase=self.phase,
            names=["penstock-demo"],
            started_s=time.monotonic() - 100.0,
            engine=SimpleNamespace(llm=self.llm, num_rowless=self.llm.loop.scheduler.num_waiting),
            admission=SimpleNamespace(predicted_wait_s=lambda: 0.0),
            progress=lambda: {"elapsed_s": 1.0, "loaded_bytes": 1 << 30, "total_bytes": 4 << 30},
        )

    async def _chunks(self, sequence: Sequence) -> AsyncIterator[str]:
        text, is_last = "", False
        while not is_last:
            is_last = self._ended.pop(sequence.request.id, False)
            new, text = sequence.output().text[len(text) :], sequence.output().text
            yield _chunk({"choices": [{"delta": {"content": new}, "finish_reason": "length" if is_last else None}]})
            if self.failing:
                yield _chunk({"error": {"message": "the row failed"}})
                return
            await asyncio.sleep(0.02)
        yield _chunk({"choices": [], "usage": {"completion_tokens": len(sequence.request.output_token_ids)}})
        yield "data: [DONE]\n\n"

    def stop_http(self) -> None:
        """Ends all answers; the engine goes on."""
        self._server.should_exit = True
        self._http.join(20)

    def close(self) -> None:
        self.stop_http()
        self._stops.set()
        self._engine.join(20)
        self.llm.close()


def _chunk(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told)}\n\n"


@contextlib.contextmanager
def small_server() -> Iterator[SmallServer]:
    """A server that is closed in the end."""
    server = SmallServer()
    try:
        yield server
    finally:
        server.close()
