"""The way from the engine to one client: what its sequences gave, piece by piece, kept until the client takes it.

The engine never waits for a client. Each token is a piece of its own while a client keeps up; once many pieces lie
here, what follows joins the last piece of its choice, so an outbox is bounded by the answer that it holds.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.engine.output import Logprob, Sequence

LATE, LATE_EACH = 64, 4  # pieces that a client has not taken, and more of these for each choice of its answer


class Finish(NamedTuple):
    """The end of a sequence; `error` says why, where it did not end by itself."""

    reason: str
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass
class Piece:
    """News of choice `choice`: the text of some tokens (usually one), their log probabilities if asked for, and the
    end. `num_tokens` counts all tokens of the choice so far; `is_first`: nothing of the choice came before."""

    choice: int
    texts: list[str]
    logprobs: list[dict[int, Logprob]]
    num_tokens: int
    finish: Finish | None = None
    is_first: bool = False

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def join(self, later: "Piece") -> None:
        """Takes in the next piece of the same choice."""
        self.texts += later.texts
        self.logprobs += later.logprobs
        self.num_tokens, self.finish = later.num_tokens, later.finish


@dataclass
class Outbox:
    """One client's pieces; of the event loop alone. `sequences` are those of its choices, in order, `n` of each prompt.
    `failure` is the first end of a choice that did not end by itself. `closed`: nobody takes anything any more."""

    sequences: list[Sequence]
    n: int
    failure: Finish | None = None
    closed: bool = False
    num_ended: int = 0
    on_ended: Callable[[], None] | None = None  # called when all sequences have ended
    _pieces: deque[Piece] = field(default_factory=deque)
    _last: dict[int, Piece] = field(default_factory=dict)  # of each choice, among those pieces
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def has_ended(self) -> bool:
        """Tells whether all sequences have ended; their last pieces may still lie here."""
        return self.num_ended >= len(self.sequences)

    def put(self, piece: Piece) -> None:
        """Takes news in."""
        if piece.finish is not None:
            self.num_ended += 1
            self.failure = self.failure or (piece.finish if piece.finish.error is not None else None)
        is_late = len(self._pieces) >= LATE + LATE_EACH * len(self.sequences)
        last = self._last.get(piece.choice) if is_late else None
        if last is not None:
            last.join(piece)
        else:
            self._pieces.append(piece)
            self._last[piece.choice] = piece
        self._news.set()
        if self.has_ended and self.on_ended is not None:
            self.on_ended()

    def take(self) -> list[Piece]:
        """All pieces that lie here, in order."""
        pieces = list(self._pieces)
        self._pieces.clear()
        self._last.clear()
        self._news.clear()
        return pieces

    def close(self) -> None:
        """Says that nobody takes anything any more."""
        self.closed = True
        self._news.set()

    async def wait(self) -> None:
        """Waits until there is news that nobody has taken, or nobody will."""
        await self._news.wait()
