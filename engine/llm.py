"""LLM takes prompts and returns outputs: the face of the engine in Python.

Life of a request: text -> token ids -> Request -> rows of batches (scheduler) -> tokens (engine) -> text (loop). Under
torchrun every rank constructs an LLM and calls the same methods; rank 0 runs the loop, all get the same outputs.
"""

import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.loop import Loop
from penstock.engine.output import Listener, OnText, RequestOutput, Sequence
from penstock.engine.planning.engine_plan import longest_sequence
from penstock.engine.planning.kv_tier import moving
from penstock.engine.runtime import heap
from penstock.engine.runtime.build import build_worker
from penstock.engine.runtime.calls import Call, digest
from penstock.engine.runtime.engine import LINK_BYTES, Engine
from penstock.engine.runtime.progress import Progress
from penstock.engine.runtime.start_engine import start_engine
from penstock.engine.text.chat import RenderedChat
from penstock.engine.text.chat_template import Message
from penstock.engine.text.model_prompts import ModelPrompts
from penstock.engine.text.model_text import load_tokenizer
from penstock.engine.text.prompts import Asked, Prompt
from penstock.engine.text.tokenizer import Tokenizer
from penstock.engine.turns import Turns, in_turn
from penstock.parallel.launch import Launch, resolve_launch
from penstock.parallel.rendezvous import read_together
from penstock.scheduler.batching.counts import MoveCounts
from penstock.scheduler.batching.filling import Filling
from penstock.scheduler.batching.host_pages import HostPages
from penstock.scheduler.batching.request import SamplingParams
from penstock.scheduler.batching.scheduler import Scheduler


class LLM:
    """A loaded model. `options` are EngineConfig's fields (tensor_parallel_size, dtype, gpu_memory, resident, ...);
    `debug` takes a DebugConfig, or its fields as a dict. `progress` is told how far the start is.

    A context manager: leaving it frees everything and ends the ranks that it launched. Raises ValueError, naming the
    file, tensor or field, for what cannot be loaded or does not fit; RankFailed if another rank ended.

    Threads may share it: their calls run one after another, `close` too. A call inside another one, in its `on_text`,
    raises RuntimeError at once and leaves that one as it is; only `check` may be called. `on_text` must not wait for
    another thread's call either: `generate` says why.
    """

    scores_prompts = True  # whether it gives log probabilities of prompts

    def __init__(
        self,
        model: str = "demo",
        tensor_parallel_size: int | None = None,
        progress: Progress | None = None,
        **options,
    ):
        self._progress = progress
        self._configure({"model": model, "tensor_parallel_size": tensor_parallel_size} | options)
        self.turns = Turns()
        self.tokenizer = self._load_tokenizer()
        self.engine = self._start()
        plan = self.engine.plan
        scheduler = Scheduler(
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=longest_sequence(self.config, plan),
            page_size=self.config.page_size,
            num_pages=plan.residency.num_pages,
            eos_token_ids=self.engine.eos_token_ids,
            page_order_seed=self.config.debug.page_order_seed,
            retention=plan.retention,
            policy=self.config.scheduling_policy,
            prefix_caching=self.config.enable_prefix_caching,
            host_pages=self._host_pages(),
            filling=self._filling(),
        )
        self.loop = Loop(scheduler, self.engine)
        self.prompts = ModelPrompts(
            self.config, self.tokenizer, plan.spec.vocab_size, scheduler.limits, self.scores_prompts
        )
        self._finalizer = weakref.finalize(self, _close, self.engine)
        self._finalizer.atexit = False  # the engine does that itself
        heap.set_aside()

    @in_turn
    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        on_text: OnText | None = None,
    ) -> list[RequestOutput]:
        """Completes each prompt: a string, or a list of token ids; one SamplingParams for all, or one for each.

        `on_text(prompt index, output index, text)` is called on rank 0 as text is generated, and with None at its end.
        Outputs are in the order of the prompts; those that may become longest begin first. Raises ValueError, before
        anything runs, for a prompt or parameter that cannot be meant, under torchrun on all ranks alike, also if they
        are given different ones (a rank that gives no prompts takes rank 0's); RankFailed if another rank has failed;
        RuntimeError if this LLM is closed, ended with an earlier error of several ranks, or if sequences that were
        added to `loop` have not ended.

        A sequence that fails (its logits are NaN) has finish_reason "error", and the others are as they would be
        without it. If `on_text` raises, this ends its prompt's sequences, with finish_reason "abort", and it is not
        called for them again; when all others have ended, rank 0 raises the first of these exceptions, with the outputs
        as its attribute `outputs`, and the other ranks return the outputs. An interrupt ends the whole call at once.

        `on_text` runs inside this call, and calls of other threads start when this one has ended: an `on_text` that
        waits for one of them (joins a thread that calls `generate`) waits for ever, and they with it. This is not
        refused, because nothing tells such a call from one that nobody waits for, which only has to take its turn.
        """
        return self._call("generate", lambda: self.prompts.read(prompts, sampling_params), on_text)

    @in_turn
    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        on_text: OnText | None = None,
        **options,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several: messages like {"role": "user", "content": "Hello"}, rendered by
        the model's chat template. Without sampling_params an answer may take all that is left of the context.

        `options` are those of ChatOptions (add_generation_prompt, continue_final_message, tools,
        chat_template_kwargs). An output's `prompt` is the rendered text. Else it is as `generate`; it also raises
        ValueError for a model without a chat template, and for messages that the template cannot have.
        """
        params = SamplingParams(max_tokens=None) if sampling_params is None else sampling_params
        return self._call("chat", lambda: self.prompts.read(self.prompts.render(messages, **options), params), on_text)

    def render_chat(self, messages: list[Message] | list[list[Message]], **options) -> list[RenderedChat]:
        """The conversations as `chat` would give them to the model: text and token ids. They may be prompts of
        `generate`. Raises ValueError as `chat` does."""
        self._check_open()
        return self.prompts.render(messages, **options)

    def _call(self, name: str, read: Callable[[], list[Asked]], on_text: OnText | None) -> list[RequestOutput]:
        """Runs what `read` gives, under torchrun as a call of this name on all ranks."""
        self._check_open()
        asked, refusal = self._read(name, read)
        listener, outputs = Listener(on_text), []
        with self.engine.together():
            refused = self._agree(name, asked, refusal)
            if not refused and self.engine.topology.rank > 0:
                outputs = [RequestOutput.from_dict(output) for output in self.engine.follow()]
            elif not refused:
                outputs = self._complete(asked, listener)
                self.engine.finish(outputs)
        if refused:
            raise ValueError(refused)
        listener.reraise(outputs)
        return outputs

    def _agree(self, name: str, asked: list[Asked], refusal: str) -> str:
        """Says why the ranks cannot run this call, the same on all; empty if they can. Only under torchrun each
        rank makes a call of its own."""
        if self._launch.kind != "torchrun":
            return ""
        return self.engine.agree(Call(name, digest(asked), refusal))

    def _complete(self, asked: list[Asked], listener: Listener) -> list[RequestOutput]:
        """Runs the sequences of all prompts; on rank 0."""
        by_prompt = [self.prompts.expand(token_ids, params) for _, token_ids, params in asked]
        self._run(by_prompt, listener)
        return [
            RequestOutput(
                str(index),
                prompt,
                token_ids,
                [sequence.output() for sequence in own],
                num_cached_tokens=own[0].request.num_cached_tokens,
                prompt_logprobs=own[0].prompt_logprobs,
            )
            for index, ((prompt, token_ids, _), own) in enumerate(zip(asked, by_prompt))
        ]

    def _run(self, by_prompt: list[list[Sequence]], listener: Listener) -> None:
        """Runs the sequences of each prompt until all have ended. Those that may become longest begin first: they end
        last, and passes of few rows cost nearly as much as full ones."""
        longest = self.loop.scheduler.max_model_len
        sequences = sorted(
            itertools.chain(*by_prompt), key=lambda sequence: sequence.request.most_outputs(longest), reverse=True
        )
        prompts = {sequence.request.id: prompt for prompt, own in enumerate(by_prompt) for sequence in own}
        try:
            for sequence in sequences:
                self.loop.add(sequence)
            while self.loop.has_unfinished:
                events = self.loop.advance()
                for event in events if listener.listens else ():
                    prompt = prompts[event.sequence.request.id]
                    error = listener.tell(prompt, event.sequence.index, event.text, event.is_last)
                    for sequence in by_prompt[prompt] if error else ():
                        self.loop.abort(sequence.request.id, f"on_text raised {error!r}")
        except BaseException:  # an interrupt, in on_text too
            self.loop.clear()
            raise

    @in_turn
    def measure(self, link_bytes: int = LINK_BYTES) -> None:
        """Measures link, memory, compute and reduces (about a second), for predictions instead of the profile's rates;
        the link by copies of `link_bytes`, at most a pass's. On rank 0 only; the others answer within `generate`."""
        self._check_open()
        self.engine.measure(link_bytes)
        self.loop.scheduler.predict_by(self._filling(), moving(self.config, self.engine.plan).pays)

    def _filling(self) -> Filling | None:
        return Filling.of(self.engine.work, self.engine.rates)

    @in_turn
    def reset_prefix_cache(self) -> None:
        """Forgets what is cached of former prompts. On rank 0 only; the others have nothing to forget."""
        self._check_open()
        self.loop.scheduler.cache.clear()

    def check(self, prompts, sampling_params=None) -> None:
        """Raises the ValueError that `generate` would raise, and runs nothing."""
        self._check_open()
        self.prompts.read(prompts, sampling_params)

    def sequences(
        self, prompts: Prompt | list[Prompt], sampling_params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Sequence]:
        """The sequences of a prompt, or of several, n of each, to be added to `loop`; for any thread. Raises ValueError
        as `generate` does."""
        self._check_open()
        return self.prompts.sequences(prompts, sampling_params)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """The token ids of a text, as those of a prompt; with `add_special` those that the tokenizer puts around it
        too. For any thread. Raises ValueError as `generate` does."""
        self._check_open()
        return self.prompts.encode(text, add_special)

    def lead(self) -> None:
        """Lets the other ranks of torchrun, each of which calls `serve`, do what `loop` does, until this LLM is
        closed; on rank 0."""
        self.engine.lead()

    def serve(self) -> None:
        """Does what rank 0's `loop` does until rank 0 closes its LLM; on the other ranks of torchrun."""
        self._check_open()
        with self.engine.together():
            self.engine.serve()

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

    def _read(self, name: str, read: Callable[[], list[Asked]]) -> tuple[list[Asked], str]:
        """Reads what was asked; or says, under torchrun, where all ranks refuse what one of them refuses, why it cannot
        be."""
        try:
            if self.loop.has_unfinished:
                raise RuntimeError(f"{name}: sequences that were added to `loop` have not ended; advance or clear it")
            return read(), ""
        except Exception as error:
            if self._launch.kind != "torchrun":
                raise
            return [], str(error) if isinstance(error, ValueError) and str(error) else repr(error)

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
        return start_engine(self.config, self._launch, functools.partial(build_worker, progress=self._progress))

    def _host_pages(self) -> HostPages | None:
        """The pages of host memory that this rank's engine moves KV to; None if it was asked for none."""
        plan, mover = self.engine.plan, self.engine.worker.runner.mover
        if self.config.kv_host_memory is None:
            return None
        counts = MoveCounts(self.config.page_size, plan.demand.page_bytes)
        return HostPages(0 if mover is None else mover.num_host_pages, moving(self.config, plan).pays, counts)

    def _check_open(self) -> None:
        if self.engine is None:
            raise RuntimeError("this LLM is closed")


def _close(engine: Engine) -> None:
    engine.close()
    heap.give_back()


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
