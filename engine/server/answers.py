"""Bodies of answers: completions and chat completions, whole or in chunks, as OpenAI's API has them.

Log probabilities are keyed by texts there; of two tokens with one text the likelier is kept.
"""

import functools
import itertools
import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from penstock.engine.output import Logprob, Sequence
from penstock.engine.server.journey import finish_of
from penstock.engine.server.outbox import Finish, Piece

LEAST_LOGPROB = -9999.0
to_json = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder each time
Position = dict[int, Logprob]  # a token's log probability first, then those of the most likely ones


@dataclass
class Usage:
    """Tokens of a request: a prompt counts once, whatever n is."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @staticmethod
    def of(sequences: list[Sequence], n: int) -> "Usage":
        firsts = [sequence.request for sequence in sequences[::n]]
        return Usage(
            sum(len(request.prompt_token_ids) for request in firsts),
            sum(len(sequence.request.output_token_ids) for sequence in sequences),
            sum(request.num_cached_tokens or 0 for request in firsts),
        )

    def to_dict(self, completion_tokens: int | None = None) -> dict[str, Any]:
        completed = self.completion_tokens if completion_tokens is None else completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completed,
            "total_tokens": self.prompt_tokens + completed,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class _Answer:
    """The fields that all bodies of one answer share. `model` is the name by which it was asked for, `num_top` how many
    of the most likely tokens are told."""

    model: str
    num_top: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)

    gives_scores: ClassVar[bool] = False  # whether log probabilities of prompts are given back
    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __post_init__(self):
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def whole(self, sequences: list[Sequence], usage: Usage) -> dict[str, Any]:
        """The body of an answer that is sent at once."""
        choices = [self.choice(index, sequence) for index, sequence in enumerate(sequences)]
        return self._body(self.kind, choices) | {"usage": usage.to_dict()}

    def part(self, *choices: dict[str, Any]) -> dict[str, Any]:
        """The body of a chunk."""
        return self._body(self.chunk_kind, list(choices))

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


@dataclass
class CompletionAnswer(_Answer):
    """The bodies of a completion. `echoes` stand before the choices, where that was asked for."""

    echoes: list["Echo"] | None = None
    _ends: dict[int, int] = field(init=False, default_factory=dict)  # of the tokens that chunks told, by choice

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    @property
    def gives_scores(self) -> bool:
        return any(echo.is_scored for echo in self.echoes or ())

    def choice(self, index: int, sequence: Sequence) -> dict[str, Any]:
        """The choice of a sequence that has ended."""
        output = sequence.output()
        return self._choice(index, output.text, output.logprobs, finish_of(sequence), is_first=True)

    def first(self, index: int) -> None:
        """Nothing: there is no chunk before all others."""

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """The choice of a chunk; the prompt is in the first one, as in vLLM."""
        choice = self._choice(piece.choice, piece.text, piece.logprobs or None, piece.finish, piece.is_first)
        if (told := choice["logprobs"]) is not None:
            self._ends[piece.choice] = told["text_offset"][-1] + len(told["tokens"][-1])
        return choice

    def _choice(
        self, index: int, text: str, positions: list[Position] | None, finish: Finish | None, is_first: bool
    ) -> dict[str, Any]:
        echo = self.echoes[index] if is_first and self.echoes is not None else Echo()
        logprobs = None
        if positions is not None:
            logprobs = completion_logprobs([*echo.positions, *positions], self._ends.get(index, 0))
        return {"index": index, "text": echo.text + text, "logprobs": logprobs} | _ending(finish)


@dataclass
class Echo:
    """A prompt that is given back: its text, and of the sequence that is `scored` the log probabilities of its tokens,
    if they were asked for. The first one has none. They are made once, when a choice begins: all have come by then."""

    text: str = ""
    scored: Sequence | None = None

    @property
    def is_scored(self) -> bool:
        return self.scored is not None and self.scored.request.params.prompt_logprobs is not None

    @functools.cached_property
    def positions(self) -> list[Position]:
        found = None if self.scored is None else self.scored.prompt_logprobs
        if found is None:
            return []
        first, (_, *others) = self.scored.request.prompt_token_ids[0], found
        return [{first: Logprob(None, None, self.scored.decoded(first))}, *others]


@dataclass
class ChatAnswer(_Answer):
    """The bodies of a chat completion."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, sequence: Sequence) -> dict[str, Any]:
        """The choice of a sequence that has ended."""
        output = sequence.output()
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": index, "message": message} | self._rest(output.logprobs, finish_of(sequence))

    def first(self, index: int) -> dict[str, Any]:
        """The choice of the chunk before all others: whose turn it is."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}} | self._rest(None, None)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """The choice of a chunk."""
        return {"index": piece.choice, "delta": {"content": piece.text}} | self._rest(piece.logprobs, piece.finish)

    def _rest(self, positions: list[Position] | None, finish: Finish | None) -> dict[str, Any]:
        logprobs = chat_logprobs(positions, self.num_top) if positions else None
        return {"logprobs": logprobs} | _ending(finish)


def _ending(finish: Finish | None) -> dict[str, Any]:
    reason, stop_reason, _ = finish or (None, None, None)
    return {"finish_reason": reason, "stop_reason": stop_reason}


def completion_logprobs(positions: list[Position], start: int = 0) -> dict[str, Any]:
    """Log probabilities as completions have them: lists by token. Offsets count characters of the tokens' texts, of
    which `start` came before."""
    chosen = [next(iter(position.values())) for position in positions]
    texts = [each.decoded_token or "" for each in chosen]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(each.logprob) for each in chosen],
        "top_logprobs": [_by_text(position) for position in positions],
        "text_offset": list(itertools.accumulate(map(len, texts), initial=start))[:-1],
    }


def chat_logprobs(positions: Iterable[Position], num_top: int) -> dict[str, Any]:
    """Log probabilities as chats have them: a list of tokens, each with its bytes and the `num_top` most likely
    ones."""
    content = []
    for position in positions:
        chosen, *_ = position.values()
        top = sorted((each for each in position.values() if each.rank <= num_top), key=lambda each: each.rank)
        content.append(_token(chosen) | {"top_logprobs": [_token(each) for each in top]})
    return {"content": content}


def _by_text(position: Position) -> dict[str, float] | None:
    """The likeliest of each text; None for the first token of a prompt, which has no log probability."""
    likeliest: dict[str, float] = {}
    for each in position.values():
        if each.logprob is None:
            return None
        text, logprob = each.decoded_token or "", _finite(each.logprob)
        likeliest[text] = max(logprob, likeliest.get(text, logprob))
    return likeliest


def _token(logprob: Logprob) -> dict[str, Any]:
    text = logprob.decoded_token or ""
    return {"token": text, "logprob": _finite(logprob.logprob), "bytes": list(text.encode())}


def _finite(logprob: float | None) -> float | None:
    """The log probability as JSON can have it, as vLLM does."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)
