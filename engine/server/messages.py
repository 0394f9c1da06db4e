"""The messages between the two processes of a server: the front, which owns sockets and texts, and the engine's, in
which passes run.

    front -> engine   Add, Abort, Stop
    engine -> front   Loading, Ready, Scores, Outputs, Dead

A message is a line of JSON, a list of its name and its fields. What a pass gave is one message, column by column: it is
made while the next pass waits, or runs.
"""

import json
from typing import Any, NamedTuple

_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder each time


class Add(NamedTuple):
    """Lets sequences run: of each prompt, as token ids, as many as `params` (SamplingParams' fields) says; `ids` are
    those of their requests, in order."""

    ids: list[int]
    prompts: list[list[int]]
    params: dict[str, Any]


class Abort(NamedTuple):
    """Ends sequences, for a reason; those that have ended are left alone."""

    ids: list[int]
    why: str


class Stop(NamedTuple):
    """Lets the engine close and its process end, after the pass that is under way."""


class Loading(NamedTuple):
    """Says how far the start is: Progress' fields."""

    progress: dict[str, Any]


class Ready(NamedTuple):
    """Says that requests are taken: EngineFacts' fields, and EngineState's."""

    facts: dict[str, Any]
    state: list[Any]


class Scores(NamedTuple):
    """Tells log probabilities of the next tokens of a request's prompt, before the token that follows it: packed
    (packed_scores.py), as base64."""

    id: int
    packed: str


class Outputs(NamedTuple):
    """Tells what came of a turn of the loop. The columns `ids`, `counts`, `tokens` and `texts` have a request, its
    number of tokens, the last of them and new text for each event. `logprobs` have (token, logprob, rank, text) of each
    candidate there, if asked for, by request id; `ends` are (id, finish reason, stop reason, error), `rows` (id, cached
    tokens) of those that got their first row. `passed` is the pass that ended, if one did (pass_told), and `state`
    EngineState's fields."""

    ids: list[int]
    counts: list[int]
    tokens: list[int]
    texts: list[str]
    logprobs: list[tuple[int, list[Any]]]
    ends: list[tuple[int, str, int | str | None, str | None]]
    rows: list[tuple[int, int]]
    passed: list[Any] | None
    state: list[Any]


class Dead(NamedTuple):
    """Says that the engine has failed, and that its process is about to end."""


Message = Add | Abort | Stop | Loading | Ready | Scores | Outputs | Dead
_KINDS = {kind.__name__: kind for kind in (Add, Abort, Stop, Loading, Ready, Scores, Outputs, Dead)}


def to_line(message: Message) -> bytes:
    """The bytes of a message."""
    if isinstance(message, Scores):  # of megabytes the encoder would look at each character
        return b'["Scores",%d,"%b"]\n' % (message.id, message.packed.encode())
    return _encode([type(message).__name__, *message]).encode() + b"\n"


def of_line(line: bytes) -> Message:
    """The inverse of `to_line`; without the line's end."""
    kind, *fields = json.loads(line)
    return _KINDS[kind](*fields)
