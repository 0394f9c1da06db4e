"""An answer as it grows, as server-sent events: one chunk a token, `data: [DONE]` at the end.

Only `data:` lines and comments are sent. Once the first byte is out an error can only be an event, and the stream ends
with it.
"""

from collections.abc import Iterator
from typing import Any

from penstock.engine.server.answers import ChatAnswer, CompletionAnswer, Usage, to_json
from penstock.engine.server.errors import ApiError
from penstock.engine.server.outbox import Outbox, Piece

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


def event(content: dict[str, Any]) -> bytes:
    """One event."""
    return f"data: {to_json(content)}\n\n".encode()


class Chunks:
    """Turns the pieces of an outbox into events. `sends_usage`: a chunk at the end tells the tokens; with
    `sends_usage_always` every chunk does."""

    def __init__(
        self, answer: ChatAnswer | CompletionAnswer, outbox: Outbox, sends_usage: bool, sends_usage_always: bool
    ):
        self._answer, self._outbox = answer, outbox
        self._sends_usage, self._always = sends_usage, sends_usage_always
        self._counts = [0] * len(outbox.sequences)  # tokens of each choice that were sent
        self._head = to_json(answer.part()).removesuffix("]}")  # what all chunks begin with

    def first(self) -> bytes:
        """The events before all pieces."""
        firsts = (self._answer.first(index) for index in range(len(self._counts)))
        return b"".join(self._event(choice) for choice in firsts if choice is not None)

    def of(self, pieces: list[Piece]) -> bytes:
        """The events of some pieces."""
        return b"".join(self._of(pieces))

    def last(self) -> bytes:
        """The events after all pieces."""
        usage = self._usage().to_dict()
        return (event(self._answer.part() | {"usage": usage}) if self._sends_usage else b"") + DONE

    def _usage(self) -> Usage:
        return Usage.of(self._outbox.sequences, self._outbox.n)

    def _of(self, pieces: list[Piece]) -> Iterator[bytes]:
        for piece in pieces:
            self._counts[piece.choice] = piece.num_tokens
            yield self._event(self._answer.chunk(piece))

    def _event(self, choice: dict[str, Any]) -> bytes:
        usage = ""
        if self._always:
            usage = f',"usage":{to_json(self._usage().to_dict(sum(self._counts)))}'
        elif self._sends_usage:
            usage = ',"usage":null'
        return f"data: {self._head}{to_json(choice)}]{usage}}}\n\n".encode()


def failure(error: ApiError) -> bytes:
    """The event that ends a stream."""
    return event(error.body)
