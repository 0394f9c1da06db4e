"""LLM takes prompts and returns outputs: the face of the engine in Python.

Life of a request: text -> token ids -> Request -> rows of batches (scheduler) -> tokens (engine) -> text (loop). Under
torchrun every rank constructs an LLM and calls the same methods; rank 0 schedules, all get the same outputs.
"""

import contextlib
import dataclasses
import functools
import itertools
import operator
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.loop import Loop
from penstock.engine.output import Listener, OnText, RequestOutput, Sequence
from penstock.engine.planning.engine_plan import find_model, longest_sequence
from penstock.engine.runtime.calls import Call, digest
from penstock.engine.runtime.engine import LINK_BYTES, Engine
from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.turns import Turns, in_turn
from penstock.engine.user_files import has_lone_surrogate
from penstock.parallel.launch import Launch, resolve_launch
from penstock.parallel.rendezvous import read_together
from penstock.scheduler.batching.request import Request, SamplingParams
from penstock.scheduler.batching.scheduler import Scheduler

Prompt = str | list[int]  # or an array of token ids: numpy's, torch's, or what else has `tolist`
_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1


class LLM:
    """A loaded model. `options` are EngineConfig's fields (tensor_parallel_size, dtype, gpu_memory, resident, ...);
    `debug` takes a DebugConfig, or its fields as a dict.

    A context manager: leaving it frees everything and ends the ranks that it launched. Raises ValueError, naming the
    file, tensor or field, for what cannot be loaded or does not fit; RankFailed if another rank ended.

    Threads may share it: their calls run one after another, `close` too. A call inside another one, in its `on_text`,
    raises RuntimeError at once and leaves that one as it is; only `check` may be called. (`on_text` must not wait for
    another thread's call either, which itself waits for the call that `on_text` belongs to.)
    """

    def __init__(self, model: str = "demo", tensor_parallel_size: int | None = None, **options):
        self._configure({"model": model, "tensor_parallel_size": tensor_parallel_size} | options)
        self.turns = Turns()
        self.tokenizer = self._load_tokenizer()
        self.engine = self._start()
        self.vocab_size = self.engine.plan.spec.vocab_size
        residency = self.engine.plan.residency
        self.scheduler = Scheduler(
            max_num_seqs=self.engine.plan.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_model_len=longest_sequence(self.config, self.engine.plan),
            page_size=self.config.page_size,
            num_pages=residency.num_pages,
            eos_token_ids=self.engine.eos_token_ids,
            page_order_seed=self.config.debug.page_order_seed,
            retention=self.engine.plan.retention,
        )
        self._request_ids = itertools.count()
        self._finalizer = weakref.finalize(self, self.engine.close)
        self._finalizer.atexit = False  # the engine does that itself

    @in_turn
    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Completes each prompt: a string, or a list of token ids; one SamplingParams for all, or one for each.

        `on_text(prompt index, output index, text)` is called on rank 0 as text is generated, and with None at its end.
        Outputs are in the order of the prompts. Raises ValueError, before anything runs, for a prompt or parameter that
        cannot be meant, under torchrun on all ranks alike, also if they are given different ones (a rank that gives no
        prompts takes rank 0's); RankFailed if another rank has failed; RuntimeError if this LLM is closed, or ended
        with an earlier error of several ranks.

        A sequence that fails (its logits are NaN) has finish_reason "error", and the others are as they would be
        without it. If `on_text` raises, this ends its prompt's sequences, with finish_reason "abort", and it is not
        called for them again; when all others have ended, rank 0 raises the first of these exceptions, with the outputs
        as its attribute `outputs`, and the other ranks return the outputs. An interrupt ends the whole call at once.
        """
        self._check_open()
        asked = self._read_for_all(prompts, sampling_params)
        listener = Listener(on_text)
        groups = [self._expand(index, *one, listener) for index, one in enumerate(asked)]
        with self.engine.together():
            if self.engine.topology.rank > 0:
                return [RequestOutput.from_dict(output) for output in self.engine.follow()]
            Loop(self.scheduler, self.engine, groups, listener).run()
            outputs = [
                RequestOutput(str(index), prompt, token_ids, [sequence.output() for sequence in group])
                for index, ((prompt, token_ids, _), group) in enumerate(zip(asked, groups))
            ]
            self.engine.finish([output.to_dict() for output in outputs])
        listener.reraise(outputs)
        return outputs

    @in_turn
    def measure(self, link_bytes: int = LINK_BYTES) -> None:
        """Measures link, memory, compute and reduces (about a second), for predictions instead of the profile's rates;
        the link by copies of `link_bytes`, at most a pass's. On rank 0 only; the others answer within `generate`."""
        self._check_open()
        self.engine.measure(link_bytes)

    def check(self, prompts, sampling_params=None) -> None:
        """Raises the ValueError that `generate` would raise, and runs nothing."""
        self._check_open()
        self._read(prompts, sampling_params)

    @in_turn
    def close(self) -> None:
        """Frees everything; idempotent. Garbage collection does it too, and the end of the process. Calls of other
        threads that wait for their turn after it raise RuntimeError."""
        if self.engine is not None:
            self.engine = None
            self._finalizer()

    def __enter__(self) -> "LLM":
        self._check_open()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _read_for_all(self, prompts, sampling_params) -> list[tuple[str | None, list[int], SamplingParams]]:
        """The result of `_read`, once all ranks have agreed on this call. All refuse what one of them refuses."""
        asked, refusal = [], ""
        try:
            asked = self._read(prompts, sampling_params)
        except Exception as error:
            if self._launch.kind != "torchrun":
                raise
            refusal = str(error) if isinstance(error, ValueError) and str(error) else repr(error)
        self.engine.begin(Call("generate", digest(asked), refusal))
        return asked

    def _read(self, prompts, sampling_params) -> list[tuple[str | None, list[int], SamplingParams]]:
        """Checks everything that a user gives, on every rank alike."""
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

    def _read_one(
        self, index: int, prompt: Prompt, params: SamplingParams
    ) -> tuple[str | None, list[int], SamplingParams]:
        prompt = _as_list(prompt)
        if not isinstance(prompt, str | list | tuple):
            raise ValueError(f"prompt {index}: {prompt!r} is neither a string nor a list of token ids")
        if self.tokenizer is None:
            refuse_text(self.config, index, prompt, params)
        text = prompt if isinstance(prompt, str) else None
        if text is not None and has_lone_surrogate(text):
            raise ValueError(f"prompt {index}: {prompt!r} is not valid Unicode (a lone surrogate)")
        token_ids = self.tokenizer.encode(prompt, self.vocab_size) if text is not None else _as_tokens(index, prompt)
        for what, tokens in (("token id", token_ids), ("stop_token_ids:", params.stop_token_ids)):
            wrong = next((token for token in tokens if not 0 <= token < self.vocab_size), None)
            if wrong is not None:
                raise ValueError(f"prompt {index}: {what} {wrong} is not in 0..{self.vocab_size - 1}")
        self._warn_of_stops(params.stop)
        # the index stands for the id: messages name the prompt
        Request(index, token_ids, params).check_length(self.scheduler.max_model_len)
        return text, token_ids, params

    def _warn_of_stops(self, stops: tuple[str, ...]) -> None:
        for stop in stops:
            parts = [special for special in self.tokenizer.special_ids if special in stop]
            if parts and stop not in parts:
                where = f"stop={stop!r} has the special token {parts[0]!r}, which is no part of any text"
                number = self.tokenizer.special_ids[parts[0]]
                warnings.warn(f"{where}: give it alone, or stop_token_ids=[{number}], to end there", stacklevel=2)

    def _configure(self, options: dict[str, Any]) -> None:
        """Sets `config` and `_launch`. Under torchrun the other ranks are told if this one's options are refused."""
        launch = resolve_launch()

        def read() -> tuple[EngineConfig, Launch]:
            config = self._config_of(options)
            return config, launch.of_size(config.tensor_parallel_size)

        with _closing_on_error(launch):
            self.config, self._launch = read_together(launch, read)

    def _config_of(self, options: dict[str, Any]) -> EngineConfig:
        return config_of(options)

    def _load_tokenizer(self) -> Tokenizer | None:
        """Loads the tokenizer; the other ranks are told if this one cannot."""
        with _closing_on_error(self._launch), self._launch.guard():
            return load_tokenizer(self.config)

    def _start(self) -> Engine:
        return Engine(self.config, self._launch)

    def _check_open(self) -> None:
        if self.engine is None:
            raise RuntimeError("this LLM is closed")

    def _expand(
        self, prompt: int, _: str | None, token_ids: list[int], params: SamplingParams, listener: Listener
    ) -> list[Sequence]:
        """The n sequences of a prompt, each with a seed of its own. A stop string that is a special token, which is no
        part of any text, ends them as a stop token id does."""
        special_ids = self.tokenizer.special_ids if params.stop else {}
        special_stops = {special_ids[stop]: stop for stop in params.stop if stop in special_ids}
        if special_stops:
            params = dataclasses.replace(params, stop_token_ids=(*params.stop_token_ids, *special_stops))
        sequences = []
        for index in range(params.n):
            number = next(self._request_ids)
            own = params.seed + index if params.seed is not None else (self.config.seed + 1) * _GOLDEN + number
            request = Request(number, token_ids, params, seed=own & _MASK)
            tell = functools.partial(listener.tell, prompt, index)
            sequences.append(Sequence(request, index, self.tokenizer, tell, special_stops))
        return sequences


@contextlib.contextmanager
def _closing_on_error(launch: Launch) -> Iterator[None]:
    try:
        yield
    except BaseException:
        launch.close()
        raise


def config_of(options: dict[str, Any]) -> EngineConfig:
    """The config of these options. Raises TypeError for an unknown option, ValueError as EngineConfig does."""
    unknown = sorted(options.keys() - {field.name for field in dataclasses.fields(EngineConfig)})
    if unknown:
        raise TypeError(f"LLM has no option {', '.join(unknown)}")
    return EngineConfig(**options)


def refuse_text(config: EngineConfig, index: int, prompt: Prompt, params: SamplingParams) -> None:
    """Raises ValueError for a text prompt or a stop string, where there is no tokenizer."""
    if isinstance(prompt, str) or params.stop:
        what = "a text prompt" if isinstance(prompt, str) else "a stop string"
        raise ValueError(f"{config.model}: no tokenizer.json, so prompt {index} cannot have {what}; give token ids")


def tokenizer_directory(config: EngineConfig) -> Path:
    """The directory that --tokenizer names, else the model's."""
    path = find_model(config.tokenizer or config.model)
    return path if path.is_dir() else path.parent


def has_tokenizer(config: EngineConfig) -> bool:
    """Whether there is a tokenizer.json; it is not read."""
    return Tokenizer.is_there(tokenizer_directory(config))


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The model's tokenizer, or None if there is no tokenizer.json (token ids still work). Raises ValueError if
    --tokenizer named a directory without one."""
    tokenizer = Tokenizer.load(tokenizer_directory(config))
    if tokenizer is None and config.tokenizer is not None:
        raise ValueError(f"tokenizer={config.tokenizer!r}: no tokenizer.json there")
    return tokenizer


def _as_list(value: Any) -> Any:
    """A value as it is, but an array of numpy or torch as Python's lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_number(value: Any) -> bool:
    return hasattr(_as_list(value), "__index__")


def _as_tokens(index: int, prompt: list | tuple) -> list[int]:
    """Token ids as Python's integers, from these or numpy's or torch's. Raises ValueError for others, also for
    bools."""
    token_ids = [token if type(token) is int else _as_list(token) for token in prompt]
    for token in token_ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise ValueError(f"prompt {index}: token id {token!r} is not an integer")
    return list(map(operator.index, token_ids))
