"""Notes of requests, for metrics and the log."""

import time
from typing import Any

from penstock.engine.server.answers import Usage
from penstock.engine.server.delivery import Delivered
from penstock.engine.server.errors import ApiError
from penstock.engine.server.metrics import INVALID, REJECTIONS
from penstock.engine.server.outbox import Outbox
from penstock.engine.server.requests import Chat, Completion


def rejection(error: ApiError) -> str:
    """The reason of a request that was not taken in."""
    return error.code if error.code in REJECTIONS else INVALID


def record_of_refused(route: str, error: ApiError) -> dict[str, Any]:
    """A request that was not taken in, for a log: without the message, which may show what a client wrote."""
    why = {"error": error.code or INVALID, "param": error.param}
    return {"route": route, "status": error.status, "came": time.time()} | why


def record_of(
    request_id: str, asked: Completion | Chat, outbox: Outbox, delivered: Delivered, came_s: float
) -> dict[str, Any]:
    """A request that has ended, for a log: numbers and codes, and nothing that a client wrote. `came_s` is
    time.perf_counter's."""
    now_s, usage = time.perf_counter(), Usage.of(outbox.sequences, outbox.n)
    return {
        "request_id": request_id,
        "route": "completions" if isinstance(asked, Completion) else "chat/completions",
        "status": delivered.status,
        "streamed": asked.streams,
        "num_prompts": len(outbox.sequences) // outbox.n,
        "n": outbox.n,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "finish_reasons": [sequence.request.finish_reason for sequence in outbox.sequences],
        "came": time.time() - (now_s - came_s),
        "duration_s": now_s - came_s,
        "first_token_s": None if delivered.first_s is None else delivered.first_s - came_s,
        "error": delivered.error,
    }
