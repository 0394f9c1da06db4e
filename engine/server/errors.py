"""Errors as clients get them: a status, and `{"error": {"message", "type", "param", "code"}}`.

The official SDK sends a request again after 408, 409, 429, 500 and above unless `x-should-retry` says no: it does for
what would fail again. Nothing here knows HTTP's libraries.
"""

import math
from dataclasses import dataclass
from typing import Any

from penstock.engine.streams import one_line
from penstock.scheduler.units import show_value

RETRY_AFTER_S = (1, 60)  # what clients are told to wait, at least and at most


@dataclass
class ApiError(Exception):
    """A request that is not answered, or not to its end. `param` is the field at fault; `wait_s` the seconds after
    which another try makes sense, where one does. `place` says where a chat template failed by itself, to who runs
    this and not to clients."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    wait_s: float | None = None
    more_headers: tuple[tuple[str, str], ...] = ()
    place: str | None = None

    def __post_init__(self):
        self.message = one_line(self.message)  # it may show a value of megabytes
        super().__init__(self.message)

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        given = dict(self.more_headers)
        if self.wait_s is not None:
            least, most = RETRY_AFTER_S
            given["Retry-After"] = str(min(max(math.ceil(self.wait_s), least), most))
        elif self.status >= 500:
            given["x-should-retry"] = "false"
        return given


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that cannot be meant."""
    return ApiError(400, message, param, code)


def unauthorised() -> ApiError:
    """The error of a request without the key."""
    return ApiError(
        401,
        "give a valid API key: Authorization: Bearer KEY",
        code="invalid_api_key",
        more_headers=(("WWW-Authenticate", "Bearer"),),
    )


def model_not_found(name: str, served: list[str]) -> ApiError:
    """The error of a request for another model."""
    why = f"the model {show_value(name)} is not served; there is {', '.join(served)}"
    return ApiError(404, why, "model", "model_not_found")


def failed(why: str) -> ApiError:
    """The error of a request that failed alone: it would fail again."""
    return ApiError(500, why, code="request_failed")


def engine_dead() -> ApiError:
    """The error of all requests once the engine has ended."""
    return ApiError(503, "the engine has ended by an error; the server is going down", code="engine_dead")


def shutting_down(wait_s: float = 1.0) -> ApiError:
    """The error of requests that come, or are still there, when the server ends."""
    return ApiError(503, "the server is shutting down", code="shutting_down", wait_s=wait_s)


def loading(wait_s: float) -> ApiError:
    """The error of requests that come too early."""
    return ApiError(503, "the model is loading", code="loading", wait_s=wait_s)


def queue_full(why: str, wait_s: float) -> ApiError:
    """The error of requests that would wait too long."""
    return ApiError(503, why, code="queue_full", wait_s=wait_s)
