"""The log of requests: a JSON object a line, for each that ended or was refused, with numbers and codes. Nothing that a
client wrote, and nothing that was answered, is in it.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any, TextIO

FIELDS = (
    "request_id",
    "route",
    "status",
    "streamed",
    "num_prompts",
    "n",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "finish_reasons",
    "came",
    "duration_s",
    "first_token_s",
    "error",
    "param",
)


class RequestLog:
    """Writes to a text stream. One that takes no more ends the log, not the server."""

    def __init__(self, stream: TextIO):
        self._stream: TextIO | None = stream

    def write(self, record: dict[str, Any]) -> None:
        """Writes the FIELDS of a record, and no other, in one line."""
        if self._stream is None:
            return
        line = json.dumps({name: record.get(name) for name in FIELDS}, allow_nan=False, default=str)
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, SystemExit) as error:  # standard output raises the latter (streams.py)
            self._stream = None
            why = error.strerror if isinstance(error, OSError) else "standard output takes no more"
            print(f"penstock serve: the request log ends: {why}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def request_log(where: str | None) -> Iterator[RequestLog | None]:
    """The log that lines are appended to: a file, "-" for standard output, or None. Raises ValueError, naming
    request_log, for a file that cannot be written to."""
    if where is None:
        yield None
    elif where == "-":
        yield RequestLog(sys.stdout)
    else:
        try:
            stream = open(where, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"request_log={where!r}: cannot be written to ({error.strerror})") from None
        with stream:
            yield RequestLog(stream)
