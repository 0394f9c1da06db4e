"""Prompts of one model: what a user asks for becomes token ids, checked, and sequences that can run. Torch-free: the
engine need not be in the same process."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.output import Sequence
from penstock.engine.text.chat import RenderedChat
from penstock.engine.text.chat_template import ChatOptions
from penstock.engine.text.model_text import make_chat_reader
from penstock.engine.text.prompts import Asked, PromptReader
from penstock.engine.text.tokenizer import Tokenizer
from penstock.scheduler.batching.limits import Limits
from penstock.scheduler.batching.request import Request, SamplingParams

_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1


class ModelPrompts:
    """Reads prompts and conversations for the model of a config, in any thread; `limits` are those of its engine.
    Without a tokenizer prompts are token ids. Log probabilities of prompts are refused unless it `scores_prompts`."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        limits: Limits,
        scores_prompts: bool = True,
    ):
        self.config, self.tokenizer, self.limits = config, tokenizer, limits
        self._reader = PromptReader(
            model=config.model,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            max_model_len=limits.max_model_len,
            policy=config.scheduling_policy,
            scores_prompts=scores_prompts,
        )
        self._chat_reader = functools.cache(functools.partial(make_chat_reader, config, tokenizer))
        self._request_ids = itertools.count()

    def read(self, prompts: Any, sampling_params: Any) -> list[Asked]:
        """The prompts of a call. Raises ValueError as LLM.generate does."""
        return self._reader.read(prompts, sampling_params)

    def render(self, messages: Any, **options: Any) -> list[RenderedChat]:
        """The conversations of a call. Raises ValueError as LLM.chat does."""
        chosen = ChatOptions(**options)
        return self._chat_reader(bool(chosen.tools)).read(messages, chosen, self._reader.check_size)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The token ids of a text, as those of a prompt; with `add_special` those that the tokenizer puts around it
        too. Raises ValueError as LLM.generate does."""
        return self._reader.encode(0, text, add_special)

    def check_ids(self, token_ids: list[int]) -> None:
        """Raises ValueError for a token id that the model does not have."""
        self._reader.check_ids("token id", token_ids)

    def sequences(self, prompts: Any, sampling_params: Any) -> list[Sequence]:
        """The sequences of a prompt, or of several, n of each. Raises ValueError as LLM.generate does."""
        asked = self.read(prompts, sampling_params)
        return [sequence for _, token_ids, params in asked for sequence in self.expand(token_ids, params)]

    def expand(
        self, token_ids: list[int], params: SamplingParams, request_ids: Iterator[int] | None = None
    ) -> list[Sequence]:
        """The n sequences of a prompt, each with a seed of its own, which is made of its request id where `params` name
        none. A stop string that is a special token, which is no part of any text, ends them as a stop token id does.
        The first gives the prompt's log probabilities."""
        special_ids = self.tokenizer.special_ids if params.stop else {}
        special_stops = {special_ids[stop]: stop for stop in params.stop if stop in special_ids}
        if special_stops:
            params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *special_stops))
        asks_once = params  # copied only where it differs: that checks all fields, in the time between two passes
        if params.prompt_logprobs is not None:
            asks_once = dataclasses.replace(params, prompt_logprobs=None)
        sequences = []
        for index in range(params.n):
            number = next(request_ids or self._request_ids)
            own = params.seed + index if params.seed is not None else (self.config.seed + 1) * _GOLDEN + number
            request = Request(number, token_ids, params, seed=own & _MASK)
            sequences.append(Sequence(request, index, self.tokenizer, special_stops))
            params = asks_once
        return sequences
