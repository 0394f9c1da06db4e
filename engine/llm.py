"""LLM: prompts in, outputs out. The face of the engine in Python.

Life of a request: text -> token ids -> Request -> rows of batches (scheduler) -> tokens (rank) -> text.
Under torchrun every rank constructs an LLM and calls the same methods; rank 0 schedules, all get the same outputs.
"""

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path

from engine.config import EngineConfig
from engine.output import RequestOutput, Sequence
from engine.planning import find_model, longest_sequence
from engine.runtime.calls import Call, digest
from engine.runtime.rank import LINK_BYTES, Rank
from engine.runtime.sampler import SampleOutput
from engine.tokenizer import Tokenizer
from parallel.launch import resolve_launch
from parallel.rendezvous import meet
from scheduler.batch import Batch
from scheduler.batching import Scheduler
from scheduler.request import FinishReason, Request, SamplingParams

Prompt = str | list[int]
OnText = Callable[[int, int, str | None], None]
_GOLDEN, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1


class LLM:
    """A loaded model. `options` are EngineConfig's fields (tensor_parallel_size, dtype, gpu_memory, resident, ...).

    A context manager: leaving it frees everything and ends the ranks that it launched. Raises ValueError, naming the
    file, tensor or field, for what cannot be loaded or does not fit; RankFailed if another rank ended.
    """

    def __init__(self, model: str = "demo", tensor_parallel_size: int | None = None, **options):
        unknown = sorted(options.keys() - {field.name for field in dataclasses.fields(EngineConfig)})
        if unknown:
            raise TypeError(f"LLM has no option {', '.join(unknown)}")
        self.config = EngineConfig(model=model, tensor_parallel_size=tensor_parallel_size, **options)
        self._launch = resolve_launch(tensor_parallel_size)
        self.tokenizer = self._load_tokenizer()
        self.rank = self._start()
        residency = self.rank.plan.residency
        self.scheduler = Scheduler(
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.max_num_batched_tokens,
            max_model_len=longest_sequence(self.config, self.rank.plan),
            page_size=self.config.page_size,
            num_pages=residency.num_pages,
            eos_token_ids=self.rank.eos_token_ids,
            page_order_seed=self.config.page_order_seed,
            retention=self.rank.plan.retention,
        )
        self._request_ids = itertools.count()
        self._finalizer = weakref.finalize(self, self.rank.close)
        self._finalizer.atexit = False  # the rank sees to that

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
        """
        self._check_open()
        asked = self._read_for_all(prompts, sampling_params)
        sequences = [self._expand(place, *one, on_text) for place, one in enumerate(asked)]
        with self.rank.together():
            if self.rank.topology.rank > 0:
                return [RequestOutput.from_dict(output) for output in self.rank.follow()]
            self._run([sequence for group in sequences for sequence in group])
            outputs = [
                RequestOutput(str(place), prompt, token_ids, [sequence.output() for sequence in group])
                for place, ((prompt, token_ids, _), group) in enumerate(zip(asked, sequences))
            ]
            self.rank.finish([output.to_dict() for output in outputs])
        return outputs

    def measure(self, link_bytes: int = LINK_BYTES) -> None:
        """Measures link, memory, compute and reduces (about a second), for predictions instead of the profile's rates;
        the link by copies of `link_bytes`, at most a pass's. On rank 0 only; the others answer within `generate`."""
        self._check_open()
        self.rank.probe(link_bytes)

    def check(self, prompts, sampling_params=None) -> None:
        """Raises the ValueError that `generate` would raise, and runs nothing."""
        self._check_open()
        self._read(prompts, sampling_params)

    def close(self) -> None:
        """Frees everything; idempotent. Garbage collection does it too, and the end of the process."""
        if self.rank is not None:
            self.rank = None
            self._finalizer()

    def __enter__(self) -> "LLM":
        self._check_open()
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _read_for_all(self, prompts, sampling_params) -> list[tuple[str | None, list[int], SamplingParams]]:
        """What `_read` gives, once all ranks have agreed on this call. What one of them refuses, all refuse."""
        asked, refusal = [], ""
        try:
            asked = self._read(prompts, sampling_params)
        except ValueError as error:
            if self._launch.kind != "torchrun":
                raise
            refusal = str(error) or "a ValueError without a message"
        self.rank.begin(Call("generate", digest(asked), refusal))
        return asked

    def _read(self, prompts, sampling_params) -> list[tuple[str | None, list[int], SamplingParams]]:
        """Checks everything that a user gives, on every rank alike."""
        if isinstance(prompts, str) or (isinstance(prompts, list | tuple) and prompts and isinstance(prompts[0], int)):
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
        return [self._read_one(place, *one) for place, one in enumerate(zip(prompts, sampling_params))]

    def _read_one(
        self, place: int, prompt: Prompt, params: SamplingParams
    ) -> tuple[str | None, list[int], SamplingParams]:
        if not isinstance(prompt, str | list | tuple):
            raise ValueError(f"prompt {place}: {prompt!r} is neither a string nor a list of token ids")
        if self.tokenizer is None:
            refuse_text(self.config, place, prompt, params)
        text = prompt if isinstance(prompt, str) else None
        if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"prompt {place}: {prompt!r} is not valid Unicode (a lone surrogate)")
        token_ids = self.tokenizer.encode(prompt) if text is not None else list(prompt)
        vocab_size = self.rank.plan.spec.vocab_size
        for token in token_ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
                raise ValueError(f"prompt {place}: token id {token!r} is not in 0..{vocab_size - 1}")
        for token in params.stop_token_ids:
            if token >= vocab_size:
                raise ValueError(f"prompt {place}: stop_token_ids: {token} is not in 0..{vocab_size - 1}")
        # the place stands for the id: messages name the prompt
        Request(place, token_ids, params).check_length(self.scheduler.max_model_len)
        return text, token_ids, params

    def _load_tokenizer(self) -> Tokenizer | None:
        """Under torchrun the other ranks hear of it if this one cannot."""
        launch = self._launch
        try:
            with launch.guard():
                if launch.kind == "torchrun":
                    meet(launch)
                return load_tokenizer(self.config)
        except BaseException:
            launch.close()
            raise

    def _start(self) -> Rank:
        return Rank(self.config, self._launch)

    def _check_open(self) -> None:
        if self.rank is None:
            raise RuntimeError("this LLM is closed")

    def _expand(
        self, place: int, _: str | None, token_ids: list[int], params: SamplingParams, on_text
    ) -> list[Sequence]:
        """The n sequences of a prompt, each with a seed of its own."""
        sequences = []
        for index in range(params.n):
            number = next(self._request_ids)
            own = params.seed + index if params.seed is not None else (self.config.seed + 1) * _GOLDEN + number
            request = Request(number, token_ids, params, seed=own & _MASK, arrival=number)

            def emit(text: str | None, index: int = index) -> None:
                if on_text is not None:
                    on_text(place, index, text)

            sequences.append(Sequence(request, index, self.tokenizer, emit))
        return sequences

    def _run(self, sequences: list[Sequence]) -> None:
        by_request = {sequence.request.id: sequence for sequence in sequences}
        try:
            for sequence in sequences:
                self.scheduler.add(sequence.request)
            while self.scheduler.has_unfinished:
                batch = self.scheduler.schedule()
                if batch is not None and self.rank.must_wait:
                    self._run_if_wanted(batch, by_request)
                    continue
                if batch is not None:
                    self.rank.submit(batch)
                if batch is None or self.rank.num_under_way > self.rank.lookahead:
                    self._take_in(*self._collect(), by_request)
        except BaseException:
            self.scheduler.abort()
            self.rank.forget()
            raise

    def _run_if_wanted(self, batch: Batch, by_request: dict[int, Sequence]) -> None:
        """Runs a prepared pass as soon as the tokens of the one under way are there; text is made beside it."""
        self.rank.announce(batch)
        requests, sampled = self._collect()
        if self.scheduler.is_wanted(batch):
            self.rank.run_announced(batch)
        else:
            self.scheduler.withdraw(batch)
        self._take_in(requests, sampled, by_request)

    def _collect(self) -> tuple[list[Request | None], SampleOutput | None]:
        """Waits for the oldest pass; who got its tokens, and those."""
        batch, sampled = self.rank.collect()
        return self.scheduler.update(batch, sampled.tokens.tolist() if sampled else []), sampled

    def _take_in(
        self, requests: list[Request | None], sampled: SampleOutput | None, by_request: dict[int, Sequence]
    ) -> None:
        """Gives each sequence of a pass its token."""
        for place, request in enumerate(requests):
            if request is not None:
                self._advance(by_request[request.id], sampled, place)

    def _advance(self, sequence: Sequence, sampled: SampleOutput, place: int) -> None:
        """Gives a sequence its newest token. The token that ends it is not part of the text, as in vLLM."""
        request = sequence.request
        token = request.output_token_ids[-1]
        if request.params.logprobs is not None:
            sequence.add_logprobs(token, *sampled.logprobs.at(place, request.params.logprobs))
        stop = None
        if request.finish_reason != FinishReason.STOP:
            stop = sequence.push(token)
        if stop is None and request.finish_reason is not None:
            stop = sequence.flush()
        if stop is not None:
            self.scheduler.finish(request, FinishReason.STOP, stop_reason=stop)
        if request.finish_reason is not None:
            sequence.on_text(None)


def refuse_text(config: EngineConfig, place: int, prompt: Prompt, params: SamplingParams) -> None:
    """Without a tokenizer: raises ValueError for a text prompt or a stop string."""
    if isinstance(prompt, str) or params.stop:
        what = "a text prompt" if isinstance(prompt, str) else "a stop string"
        raise ValueError(f"{config.model}: no tokenizer.json, so prompt {place} cannot have {what}; give token ids")


def tokenizer_directory(config: EngineConfig) -> Path:
    """That of --tokenizer, else the model's."""
    path = find_model(config.tokenizer or config.model)
    return path if path.is_dir() else path.parent


def has_tokenizer(config: EngineConfig) -> bool:
    """Whether there is a tokenizer.json; it is not read."""
    return Tokenizer.is_there(tokenizer_directory(config))


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """None if there is no tokenizer.json (token ids still work). Raises ValueError if --tokenizer named a place."""
    tokenizer = Tokenizer.load(tokenizer_directory(config))
    if tokenizer is None and config.tokenizer is not None:
        raise ValueError(f"tokenizer={config.tokenizer!r}: no tokenizer.json there")
    return tokenizer
