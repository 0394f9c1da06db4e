"""The form of a request: SamplingParams, as a user writes them, and Request, as the scheduler carries it.

A request is its tokens plus `num_computed_tokens`: prefill, chunk and decode are all "compute tokens a..b".
Nothing here knows text: stop strings are found by the engine, which then calls Scheduler.finish().
"""

import dataclasses
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from numbers import Integral, Real
from typing import ClassVar

from penstock.scheduler.units import show_value

GREEDY_BELOW = 1e-5  # vLLM's bound: at lower temperatures only the most likely token is ever drawn
MAX_LOGPROBS = 20
MAX_N = 16384  # vLLM's bound: more sequences of a prompt are a mistake, and take for ever
INT32_MAX = 2**31 - 1  # what the packed batch can carry
SEEDS = (-(2**63), 2**64 - 1)  # 64 bits, signed or not
ON_DEVICE = -1  # stands for the row's last sampled token, which the host has not seen yet


class FinishReason(StrEnum):
    """The reason for a request's end; equal to the plain strings that vLLM's users compare with."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"  # the request could not go on; the output carries the reason


class TooLong(ValueError):
    """A prompt has more tokens than a sequence may have."""


class RequestState(Enum):
    WAITING = auto()  # holds no row and no pages; it may have had them, and have given way
    RUNNING = auto()  # holds a row, and pages for the tokens that it computes next
    FINISHED = auto()


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Says how the tokens of one prompt are chosen. Names and defaults are vLLM's.

    A temperature below 1e-5 is greedy. `top_k` 0 or -1 is off (kept as 0). `max_tokens` None means up to
    max_model_len. `stop` and `stop_token_ids` are kept as tuples; `seed` -1 is None, as in vLLM. A lower `priority`
    comes first, where the engine's scheduling policy is "priority". Cached prefixes are shared only by requests of the
    same `cache_salt`. `logprobs` and `prompt_logprobs` ask for log probabilities of the tokens of the output and of the
    prompt, and of so many most likely ones.
    Raises ValueError that names the field, its value and the allowed range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str | None = None

    def __post_init__(self):
        self._check_int("n", 1, MAX_N, f"an integer from 1 to {MAX_N}")
        self._check_float("temperature", lambda x: x >= 0, "a finite number of at least 0")
        self._check_float("top_p", lambda x: 0 < x <= 1, "a number above 0, at most 1")
        self._check_int("top_k", -1, INT32_MAX, f"a positive integer of at most {INT32_MAX}, or 0 or -1 (off)")
        self._check_float("min_p", lambda x: 0 <= x <= 1, "a number from 0 to 1")
        self._check_int("max_tokens", 1, INT32_MAX, f"an integer from 1 to {INT32_MAX}, or None", optional=True)
        self._check_int("seed", *SEEDS, "an integer of 64 bits, or None", optional=True)
        self._check_float("repetition_penalty", lambda x: x > 0, "a finite number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check_float(name, lambda x: -2 <= x <= 2, "a number from -2 to 2")
        self._check_int("priority", -INT32_MAX, INT32_MAX, f"an integer from {-INT32_MAX} to {INT32_MAX}")
        logprobs = f"an integer from 0 to {MAX_LOGPROBS}, or None"
        for name in ("logprobs", "prompt_logprobs"):
            self._check_int(name, 0, MAX_LOGPROBS, logprobs, optional=True)
        if not isinstance(self.ignore_eos, bool):
            self._refuse("ignore_eos", "True or False")
        if self.cache_salt is not None and (not isinstance(self.cache_salt, str) or not self.cache_salt):
            self._refuse("cache_salt", "a string that is not empty, or None")
        self._check_stop()
        self._check_stop_token_ids()
        self._set("top_k", max(self.top_k, 0))
        self._set("seed", None if self.seed == -1 else self.seed)

    @property
    def greedy(self) -> bool:
        """Tells whether the most likely token is always taken (temperature below 1e-5)."""
        return self.temperature < GREEDY_BELOW

    def _check_int(self, name: str, low: int, high: int, expected: str, optional: bool = False):
        value = getattr(self, name)
        if optional and value is None:
            return
        if not _is_int(value) or not low <= value <= high:
            self._refuse(name, expected)
        self._set(name, int(value))

    def _check_float(self, name: str, allowed, expected: str):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            self._refuse(name, expected)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or not allowed(number):
            self._refuse(name, expected)
        self._set(name, number)

    def _check_stop(self):
        expected = "a string that is not empty, or a list of such, or None"
        self._set_tuple("stop", str, lambda item: isinstance(item, str) and item != "", expected)

    def _check_stop_token_ids(self):
        expected = f"a list of token ids (integers from 0 to {INT32_MAX}), or None"
        self._set_tuple("stop_token_ids", (), lambda item: _is_int(item) and 0 <= item <= INT32_MAX, expected)

    def _set_tuple(self, name: str, single: type | tuple, allowed, expected: str):
        """Sets a field to a tuple: None becomes (), a value of type `single` becomes a tuple of one."""
        value = getattr(self, name)
        if value is None:
            value = ()
        elif hasattr(value, "tolist"):  # an array, of numpy or torch
            value = value.tolist()
        elif isinstance(value, single):
            value = (value,)
        if not isinstance(value, list | tuple | set | frozenset) or not all(map(allowed, value)):
            self._refuse(name, expected)
        self._set(name, tuple(value))

    def _set(self, name: str, value: object):
        object.__setattr__(self, name, value)

    def _refuse(self, name: str, expected: str):
        raise ValueError(f"{name}={show_value(getattr(self, name))}: expected {expected}")


def _is_int(value: object) -> bool:
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))  # most are: quickly seen


@dataclass(eq=False, slots=True)
class Request:
    """One sequence on its way through the engine (the caller expands n > 1 into n requests).

    The caller sets the first four fields: `seed` is resolved, 0..2**64-1.
    Only the scheduler changes the others. `pages` hold up to `room_tokens`; Retention says which tokens lie in
    which of them. `row` is kept until the request ends or gives way to others; then it waits, and is computed again.
    Tokens that a pass under way computes count as computed, and those that it samples as `num_tokens_ahead`.
    """

    id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_tokens_ahead: int = field(init=False)  # once the passes under way are done
    num_scored_tokens: int = 0  # of its first ones, behind which the prompt's log probabilities are known
    num_under_way: int = 0  # passes under way that compute some of it
    longest: int = 0  # the most tokens that it may have; known, as its `ends` are, once it is added
    ends: frozenset[int] = frozenset()  # the tokens of which each ends it
    turn: tuple[int, int] = (0, 0)  # in the line of those that wait
    pages: list[int] = field(default_factory=list)
    room_tokens: int = 0
    block_numbers: list[int] = field(default_factory=list)  # in the prefix cache, of its first whole pages
    num_cached_tokens: int | None = None  # found in the prefix cache when it first got a row
    page_table: tuple[int, ...] = ()  # of its last pass, when num_evicted tokens were cached no more
    num_evicted: int = 0
    table_tokens: int = 0  # up to which that page table serves
    row: int | None = None
    is_told: bool = False  # whether the ranks know how its row is sampled
    num_tokens_admitted: int = 0  # what it had when it last got its row
    num_preemptions: int = 0
    num_lost_tokens: int = 0  # that were computed when it last gave way
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or stop string; None after end-of-sequence

    def __post_init__(self):
        assert 0 <= self.seed < 2**64, f"request {self.id}: seed {self.seed} is not resolved to 64 bits"
        self.num_tokens_ahead = self.num_tokens

    @property
    def state(self) -> RequestState:
        if self.finish_reason is not None:
            return RequestState.FINISHED
        return RequestState.WAITING if self.row is None else RequestState.RUNNING

    @property
    def tokens(self) -> list[int]:
        return self.prompt_token_ids + self.output_token_ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def ends_by_itself(self) -> bool:
        """Tells whether its last token is under way."""
        return self.num_tokens_ahead >= self.longest

    @property
    def may_give_way(self) -> bool:
        """Tells whether others may take its row and pages: nobody gives way twice without a token between."""
        return self.num_preemptions == 0 or self.num_tokens_ahead > self.num_tokens_admitted

    @property
    def num_unscored_tokens(self) -> int:
        """Tokens behind which log probabilities of the prompt are still to come."""
        asks = self.params.prompt_logprobs is not None
        return len(self.prompt_token_ids) - 1 - self.num_scored_tokens if asks else 0

    def scored_between(self, start: int, end: int) -> range:
        """Tokens behind which a pass over start..end gives log probabilities of the prompt: those that are asked for
        and were not given before."""
        if self.params.prompt_logprobs is None:
            return range(0)
        return range(max(self.num_scored_tokens, start), min(end, len(self.prompt_token_ids) - 1))

    @property
    def num_reusable_tokens(self) -> int:
        """The first tokens of which the KV may come from elsewhere, because nobody asks for their logits. The last one
        is always computed: something must be sampled from."""
        return self.num_scored_tokens if self.num_unscored_tokens else self.num_tokens - 1

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Tokens start..end of the sequence, without joining all of it for each new token. Only the last of them can be
        one that the host has not seen yet: ON_DEVICE."""
        num_prompt = len(self.prompt_token_ids)
        if end <= num_prompt:
            return self.prompt_token_ids[start:end]
        known = self.output_token_ids[max(start - num_prompt, 0) : end - num_prompt]
        if start < num_prompt:
            known = self.prompt_token_ids[start:] + known
        return known if len(known) == end - start else [*known, ON_DEVICE]

    def check_length(self, max_model_len: int) -> None:
        """Raises ValueError if the prompt is empty, TooLong if it leaves no room for one output token (vLLM's
        rule)."""
        num_prompt, most = len(self.prompt_token_ids), max_model_len - 1
        if num_prompt == 0:
            raise ValueError(f"prompt {self.id}: is empty")
        if num_prompt > most:
            raise TooLong(
                f"prompt {self.id}: has {num_prompt} tokens, and at most {most} fit"
                f" (max_model_len is {max_model_len}, one of them for the output)"
            )

    def most_tokens(self, max_model_len: int) -> int:
        """Prompt and output tokens of the request at its longest."""
        output = self.params.max_tokens
        if output is None:
            return max_model_len
        most = len(self.prompt_token_ids) + output
        return most if most < max_model_len else max_model_len  # min() takes three times as long, for each row

    def most_outputs(self, max_model_len: int) -> int:
        """Output tokens of the request at its longest."""
        return self.most_tokens(max_model_len) - len(self.prompt_token_ids)


@dataclass(frozen=True)
class RowSampling:
    """The facts that the sampler of each rank must know of a row. They are sent when a request gets the row.

    `temperature` is 0.0 exactly for greedy rows, and their filters are off. `num_logprobs` -1 asks for no logprobs.
    """

    temperature: float
    top_p: float
    top_k: int  # 0 = off
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int  # 0..2**64-1
    num_logprobs: int

    _FIELDS: ClassVar = struct.Struct("<ddiddddQi")  # in order; doubles, so that all ranks have equal bits
    _INTS: ClassVar = struct.Struct(f"<{_FIELDS.size // 4}i")
    PACKED_LEN: ClassVar = _FIELDS.size // 4  # int32 values

    @staticmethod
    def of(request: Request) -> "RowSampling":
        params = request.params
        choice = (params.temperature, params.top_p, params.top_k, params.min_p)
        return RowSampling(
            *((0.0, 1.0, 0, 0.0) if params.greedy else choice),
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            seed=request.seed,
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
        )

    @property
    def has_penalty(self) -> bool:
        """Tells whether it matters which tokens the sequence has already."""
        return any((self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty))

    def pack(self) -> tuple[int, ...]:
        return self._INTS.unpack(self._FIELDS.pack(*dataclasses.astuple(self)))

    @staticmethod
    def unpack(ints: Iterable[int]) -> "RowSampling":
        """The inverse of `pack`: PACKED_LEN int32 values."""
        return RowSampling(*RowSampling._FIELDS.unpack(RowSampling._INTS.pack(*ints)))
