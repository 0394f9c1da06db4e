"""Reads what a user gives to `generate`: prompts and sampling parameters, checked, and the prompts as token ids."""

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.engine.text.chat import RenderedChat
from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.text.tokenizer_files import sought
from penstock.engine.user_files import has_lone_surrogate
from penstock.scheduler.batching.request import Request, SamplingParams, TooLong
from penstock.scheduler.units import MIB, show_value

Prompt = str | list[int] | RenderedChat  # or an array of token ids: numpy's, torch's, or what else has `tolist`
Asked = tuple[str | None, list[int], SamplingParams]  # the prompt's text, if it was one, and its token ids
ALWAYS_ENCODED_BYTES = MIB  # of a text, whatever a sequence may hold


@dataclass(frozen=True)
class PromptReader:
    """Reads prompts for one model, which messages name; without a tokenizer they are token ids. A priority other than 0
    is only for the scheduling `policy` of that name, and log probabilities of prompts where `scores_prompts`."""

    model: str
    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    policy: str = "fcfs"
    scores_prompts: bool = True

    def read(self, prompts: Any, sampling_params: Any) -> list[Asked]:
        """Raises ValueError, naming the prompt, for what cannot be meant, on every rank alike."""
        prompts = _as_list(prompts)
        if isinstance(prompts, str) or (isinstance(prompts, list | tuple) and prompts and _is_number(prompts[0])):
            prompts = [prompts]
        if not isinstance(prompts, list | tuple):
            raise ValueError(f"prompts={prompts!r}: expected a string, a list of token ids, or a list of such prompts")
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if not isinstance(sampling_params, list | tuple) or not all(
            isinstance(params, SamplingParams) for params in sampling_params
        ):
            raise ValueError(f"sampling_params={sampling_params!r}: expected SamplingParams, or a list of them")
        if len(sampling_params) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params")
        return [self._read_one(index, *one) for index, one in enumerate(zip(prompts, sampling_params))]

    def _read_one(self, index: int, prompt: Prompt, params: SamplingParams) -> Asked:
        prompt = _as_list(prompt)
        if not isinstance(prompt, str | list | tuple):
            raise ValueError(f"prompt {index}: {prompt!r} is neither a string nor a list of token ids")
        if params.priority and self.policy != "priority":
            raise ValueError(
                f"prompt {index}: priority={params.priority}: who comes first is served first here, unless the engine"
                " is started with scheduling_policy='priority' (--scheduling-policy priority)"
            )
        if params.prompt_logprobs is not None and not self.scores_prompts:
            raise ValueError(f"prompt {index}: prompt_logprobs={params.prompt_logprobs}: a split execution has none")
        if self.tokenizer is None:
            refuse_text(self.model, index, prompt, params)
        text, token_ids = self._text_and_tokens(index, prompt)
        self.check_ids(f"prompt {index}: token id", token_ids)
        self.check_ids(f"prompt {index}: stop_token_ids:", params.stop_token_ids)
        self._warn_of_stops(params.stop)
        # the index stands for the id: messages name the prompt
        Request(index, token_ids, params).check_length(self.max_model_len)
        return text, token_ids, params

    def check_ids(self, what: str, tokens: Sequence[int]) -> None:
        """Raises ValueError for a token that the model does not have."""
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise ValueError(f"{what} {show_value(wrong)} is not in 0..{self.vocab_size - 1}")

    def _text_and_tokens(self, index: int, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, RenderedChat):
            return prompt.text, prompt.token_ids
        if not isinstance(prompt, str):
            return None, _as_tokens(index, prompt)
        return prompt, self.encode(index, prompt)

    def encode(self, index: int, text: str, add_special: bool = True) -> list[int]:
        """The token ids of a text, with `add_special` those that the tokenizer puts around a prompt too. Raises
        ValueError, naming the prompt, for a text that is none, has more tokens than a sequence, or cannot be encoded,
        or where there is no tokenizer."""
        if self.tokenizer is None:
            refuse_text(self.model, index, text, SamplingParams())
        if has_lone_surrogate(text):
            raise ValueError(f"prompt {index}: {text!r} is not valid Unicode (a lone surrogate)")
        self.check_size(index, text)
        return self.tokenizer.encode(text, self.vocab_size, add_special)

    def check_size(self, index: int, text: str) -> None:
        """Refuses a text that no sequence can hold before it is encoded, which may take long; the others say how many
        tokens they have."""
        num_bytes = len(text.encode())
        if num_bytes <= ALWAYS_ENCODED_BYTES:  # before `most_bytes`, which looks at the whole vocabulary, once
            return
        if num_bytes > self.max_model_len * self.tokenizer.most_bytes:
            raise TooLong(
                f"prompt {index}: a text of {num_bytes} bytes has more tokens than a sequence,"
                f" which has {self.max_model_len} at most (max_model_len)"
            )

    def _warn_of_stops(self, stops: tuple[str, ...]) -> None:
        for stop in stops:
            parts = [special for special in self.tokenizer.special_ids if special in stop]
            if parts and stop not in parts:
                where = f"stop={stop!r} has the special token {parts[0]!r}, which is no part of any text"
                number = self.tokenizer.special_ids[parts[0]]
                warnings.warn(f"{where}: give it alone, or stop_token_ids=[{number}], to end there", stacklevel=2)


def refuse_text(model: str, index: int, prompt: Prompt, params: SamplingParams) -> None:
    """Raises ValueError for a text prompt or a stop string, where there is no tokenizer."""
    if isinstance(prompt, str) or params.stop:
        what = "a text prompt" if isinstance(prompt, str) else "a stop string"
        raise ValueError(
            f"{model}: no tokenizer ({sought(model)}), so prompt {index} cannot have {what}; give token ids"
        )


def _as_list(value: Any) -> Any:
    """A value as it is, but an array of numpy or torch as Python's lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_number(value: Any) -> bool:
    return hasattr(_as_list(value), "__index__")


def _as_tokens(index: int, prompt: list | tuple) -> list[int]:
    """Token ids as Python's integers, from these or numpy's or torch's. Raises ValueError for others, also for
    bools."""
    if set(map(type, prompt)) == {int}:
        return list(prompt)
    token_ids = [token if type(token) is int else _as_list(token) for token in prompt]
    for token in token_ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise ValueError(f"prompt {index}: token id {token!r} is not an integer")
    return list(map(operator.index, token_ids))
