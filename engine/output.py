"""What `generate` returns, and how one sequence's text grows token by token.

Field names are vLLM's. `to_dict` and `from_dict` carry outputs to the other ranks as JSON.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.tokenizer import StopStrings, Tokenizer
from scheduler.request import FinishReason, Request


@dataclass(frozen=True)
class Logprob:
    """Of one token at one place. `rank` counts from 1."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One sequence. `logprobs` has for each token a mapping of token id to Logprob: the sampled and the top ones."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass
class RequestOutput:
    """All sequences of one prompt; `prompt` is None if it was given as token ids."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict) -> "RequestOutput":
        outputs = [CompletionOutput(**{**out, "logprobs": _logprobs(out["logprobs"])}) for out in data["outputs"]]
        return RequestOutput(**{**data, "outputs": outputs})


def _logprobs(places: list[dict] | None) -> list[dict[int, Logprob]] | None:
    """JSON has string keys only."""
    if places is None:
        return None
    return [{int(token): Logprob(**logprob) for token, logprob in place.items()} for place in places]


class Sequence:
    """The text of one request as it grows; finds stop strings across the borders of tokens.

    `on_text` is called with each piece of text that can no longer become part of a stop string; by the caller with
    None at the end.
    """

    def __init__(
        self, request: Request, index: int, tokenizer: Tokenizer | None, on_text: Callable[[str | None], None]
    ):
        self.request, self.index, self.tokenizer = request, index, tokenizer
        self.stream = tokenizer.stream(request.prompt_token_ids) if tokenizer else None
        self.stops = StopStrings(request.params.stop)
        special = tokenizer.special_ids if tokenizer else {}  # which the text does not show
        self.stop_tokens = {special[stop]: stop for stop in request.params.stop if stop in special}
        self.on_text = on_text
        self._pieces: list[str] = []  # a string would be copied for each token of a long text
        self.logprobs: list[dict[int, Logprob]] = []

    def push(self, token: int) -> str | None:
        """Takes in a sampled token. Returns the stop string that it completed, if any."""
        if self.stream is None:
            return None
        if token in self.stop_tokens:
            return self.flush() or self.stop_tokens[token]
        emitted, stop = self.stops.push(self.stream.push(token))
        self._emit(emitted)
        return stop

    def flush(self) -> str | None:
        """The sequence has ended: gives out what was held back. A stop string may still come to light in it."""
        if self.stream is None:
            return None
        emitted, _ = self.stops.push(self.stream.finish())
        rest, stop = self.stops.flush()
        self._emit(emitted + rest)
        return stop

    def add_logprobs(self, token: int, logprob: float, rank: int, top: list[tuple[int, float]]) -> None:
        """The sampled token's, and those of the most likely ones (id, logprob; the first has rank 1)."""
        place = {token: Logprob(logprob, rank, self._decoded(token))}
        for top_rank, (top_id, top_logprob) in enumerate(top, 1):
            place.setdefault(top_id, Logprob(top_logprob, top_rank, self._decoded(top_id)))
        self.logprobs.append(place)

    def output(self) -> CompletionOutput:
        request = self.request
        output = CompletionOutput(self.index, "".join(self._pieces), list(request.output_token_ids))
        output.finish_reason = None if request.finish_reason is None else FinishReason(request.finish_reason).value
        output.stop_reason = request.stop_reason
        if request.params.logprobs is not None:
            output.logprobs = self.logprobs
            tokens = request.output_token_ids
            output.cumulative_logprob = sum(place[token].logprob for place, token in zip(self.logprobs, tokens))
        return output

    def _decoded(self, token: int) -> str | None:
        return self.tokenizer.decode([token]) if self.tokenizer else None

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self.on_text(text)
