"""Outputs of `generate`, and how one sequence's text grows token by token.

Field names are vLLM's. `to_dict` and `from_dict` carry outputs to the other ranks as JSON.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.engine.kernels.packed_scores import Scored, unpack
from penstock.engine.text.tokenizer import StopStrings, TextStream, Tokenizer
from penstock.scheduler.batching.request import FinishReason, Request

OnText = Callable[[int, int, str | None], None]


@dataclass(frozen=True)
class Logprob:
    """The log probability of one token at one position. `rank`, among all tokens there, counts from 1."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One sequence. `logprobs` has for each token a mapping of token id to Logprob: the sampled and the top ones. Where
    `finish_reason` is "error" or "abort", `error` says why, and the rest is what there was by then."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    error: str | None = None


@dataclass
class RequestOutput:
    """All sequences of one prompt; `prompt` is None if it was given as token ids. `num_cached_tokens` of the prompt
    were cached when its first sequence got a row; None if it never did. It says what an output cost, not which one it
    is: equal outputs may differ in it. `prompt_logprobs`, if they were asked for, are None and then for each token of
    the prompt but its first one a mapping of token id to Logprob: that token and the top ones. They end early where the
    first sequence did."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    num_cached_tokens: int | None = field(default=None, compare=False)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def to_dict(self) -> dict:
        """Makes a dict for JSON, with this output's own lists: `asdict` would copy them, and others wait for it."""
        outputs = [vars(out) | {"logprobs": _told(out.logprobs)} for out in self.outputs]
        return vars(self) | {"outputs": outputs, "prompt_logprobs": _told(self.prompt_logprobs)}

    @staticmethod
    def from_dict(data: dict) -> "RequestOutput":
        outputs = [CompletionOutput(**{**out, "logprobs": _logprobs(out["logprobs"])}) for out in data["outputs"]]
        of_prompt = _logprobs(data.get("prompt_logprobs"))
        return RequestOutput(**{**data, "outputs": outputs, "prompt_logprobs": of_prompt})


def _position(token: int, scores: Scored, decoded: Callable[[int], str | None]) -> dict[int, Logprob]:
    """The log probabilities at one position: of its token, and of the most likely ones."""
    logprob, rank, top = scores
    position = {token: Logprob(logprob, rank, decoded(token))}
    for top_rank, (top_id, top_logprob) in enumerate(top, 1):
        position.setdefault(top_id, Logprob(top_logprob, top_rank, decoded(top_id)))
    return position


def _told(positions: list[dict[int, Logprob] | None] | None) -> list[dict | None] | None:
    """Log probabilities for JSON."""
    if positions is None:
        return None
    return [position and {token: vars(logprob) for token, logprob in position.items()} for position in positions]


def _logprobs(positions: list[dict | None] | None) -> list[dict[int, Logprob] | None] | None:
    """Log probabilities from JSON, whose keys are strings."""
    if positions is None:
        return None
    return [
        None if position is None else {int(token): Logprob(**logprob) for token, logprob in position.items()}
        for position in positions
    ]


def describe_errors(outputs: list[RequestOutput]) -> list[str]:
    """A line for each sequence that has not ended by itself."""
    ended = [(output, sequence) for output in outputs for sequence in output.outputs if sequence.error is not None]
    return [f"prompt {output.request_id}, output {sequence.index}: {sequence.error}" for output, sequence in ended]


def without_errors(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """The outputs, if all sequences ended by themselves. Raises ValueError for the first that did not."""
    for error in describe_errors(outputs):
        raise ValueError(error)
    return outputs


class Listener:
    """A call's `on_text`. Exceptions that it raises are kept with their prompts, in order, and it is called no more for
    such a prompt."""

    def __init__(self, on_text: OnText | None):
        self.on_text = on_text
        self.raised: list[tuple[int, Exception]] = []
        self._deaf: set[int] = set()

    @property
    def listens(self) -> bool:
        """Tells whether there is anybody to be told."""
        return self.on_text is not None

    def tell(self, prompt: int, index: int, text: str, is_last: bool) -> Exception | None:
        """Calls `on_text` with the text, if there is any, and with None at the end. Returns what it raised, if it
        did."""
        if not self.listens or prompt in self._deaf:
            return None
        try:
            for told in [text] * bool(text) + [None] * is_last:
                self.on_text(prompt, index, told)
        except Exception as error:
            self._deaf.add(prompt)
            self.raised.append((prompt, error))
            return error
        return None

    def reraise(self, outputs: list[RequestOutput]) -> None:
        """Raises the first exception that was kept, if any, with the call's outputs as its attribute `outputs`."""
        if not self.raised:
            return
        prompt, first = self.raised[0]
        others = f" and for {len(self.raised) - 1} more" if len(self.raised) > 1 else ""
        with contextlib.suppress(Exception):  # a class of the user's may allow neither
            first.add_note(f"raised by on_text for prompt {prompt}{others}; its `outputs` has what all prompts gave")
            first.outputs = outputs
        raise first


class Sequence:
    """The text of one request as it grows; finds stop strings across the borders of tokens.

    `index` is its number among those of its prompt. `special_stops`: stop strings that are special tokens, by the
    request's stop token ids.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        tokenizer: Tokenizer | None,
        special_stops: dict[int, str],
    ):
        self.request, self.index, self.tokenizer, self.special_stops = request, index, tokenizer, special_stops
        self.stops = StopStrings(request.params.stop)
        self._pieces: list[str] = []  # a string would be copied for each token of a long text
        self._num_taken = 0
        self.logprobs: list[dict[int, Logprob]] = []
        self.prompt_scores = bytearray()  # packed
        self.error: str | None = None

    @functools.cached_property
    def _stream(self) -> TextStream | None:
        """Made with the first token: a sequence that waits has cost nothing yet."""
        return self.tokenizer.stream(self.request.prompt_token_ids) if self.tokenizer else None

    def push(self, token: int) -> str | None:
        """Adds a sampled token. Returns the stop string that it completed, if any."""
        if self._stream is None:
            return None
        emitted, stop = self.stops.push(self._stream.push(token))
        self._emit(emitted)
        return stop

    def flush(self) -> str | None:
        """Gives out the text that was held back, when the sequence has ended. Returns a stop string found in it, if
        any."""
        if self._stream is None:
            return None
        emitted, _ = self.stops.push(self._stream.finish())
        rest, stop = self.stops.flush()
        self._emit(emitted + rest)
        return stop

    def take_text(self) -> str:
        """The text that has come since the last time, and can no longer become part of a stop string."""
        if self._num_taken == len(self._pieces):
            return ""
        new = self._pieces[self._num_taken :]
        self._num_taken = len(self._pieces)
        return "".join(new)

    def fail(self, error: str) -> None:
        """Ends the sequence for this reason, and gives out the text that was held back, if that can be made."""
        self.error = error
        with contextlib.suppress(Exception):
            self.flush()

    def take_in(self, tokens: list[int], text: str) -> None:
        """Takes the tokens and the text that another process's sequence of the same request has got."""
        self.request.output_token_ids += tokens
        self._emit(text)

    def add_logprobs(self, token: int, logprob: float, rank: int, top: list[tuple[int, float]]) -> None:
        """Adds log probabilities of the sampled token and of the most likely ones (id, logprob; the first has rank
        1)."""
        self.logprobs.append(_position(token, (logprob, rank, top), self.decoded))

    def add_prompt_logprobs(self, packed: bytes) -> None:
        """Adds log probabilities of the next tokens of the prompt, and of the most likely ones there, packed."""
        self.prompt_scores += packed

    @property
    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """The log probabilities of the prompt that have come so far, as RequestOutput has them; None if nobody asked.
        Their texts are made here, which takes long for a long prompt: not while passes wait."""
        if (num_top := self.request.params.prompt_logprobs) is None:
            return None
        decoded = functools.cache(self.decoded)
        scored = zip(self.request.prompt_token_ids[1:], unpack(bytes(self.prompt_scores), num_top))
        return [None, *(_position(token, scores, decoded) for token, scores in scored)]

    def output(self) -> CompletionOutput:
        request, tokens = self.request, list(self.request.output_token_ids)
        is_scored = request.params.logprobs is not None
        scores = [position[token].logprob for position, token in zip(self.logprobs, tokens)]
        return CompletionOutput(
            index=self.index,
            text="".join(self._pieces),
            token_ids=tokens,
            finish_reason=None if request.finish_reason is None else FinishReason(request.finish_reason).value,
            stop_reason=self.special_stops.get(request.stop_reason, request.stop_reason),
            cumulative_logprob=sum(scores) if is_scored else None,
            logprobs=self.logprobs if is_scored else None,
            error=self.error,
        )

    def decoded(self, token: int) -> str | None:
        """The text of one token; None without a tokenizer."""
        return self.tokenizer.decode([token]) if self.tokenizer else None

    def _emit(self, text: str) -> None:
        if text:
            self._pieces.append(text)
