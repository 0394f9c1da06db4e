"""The service behind the routes: it takes checked requests in, lets the engine run them, and gives their responses."""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from penstock.engine.config import EngineConfig
from penstock.engine.output import Sequence
from penstock.engine.planning.engine_plan import retention_of
from penstock.engine.server import errors
from penstock.engine.server.admission import Admission
from penstock.engine.server.answers import ChatAnswer, CompletionAnswer
from penstock.engine.server.delivery import DISCONNECTED, Delivered, Delivery, EventStream, WholeAnswer
from penstock.engine.server.encoding import echoes_of, is_quick, sequences_of
from penstock.engine.server.metrics import Metrics
from penstock.engine.server.notes import record_of
from penstock.engine.server.options import ServeOptions
from penstock.engine.server.outbox import Outbox
from penstock.engine.server.remote_engine import SHUT_DOWN, RemoteEngine
from penstock.engine.server.request_log import RequestLog
from penstock.engine.server.requests import Chat, Completion
from penstock.engine.text.model_prompts import ModelPrompts
from penstock.engine.text.model_text import load_tokenizer
from penstock.scheduler.batching.limits import Limits

NUM_WORKERS = 4  # threads in which texts are encoded and templates rendered
LOADING_S = 10.0  # after which another try makes sense while the model loads


class Service:
    """One served model, of the event loop. `defaults` are the checkpoint's for sampling. `metrics` hear of passes and
    requests, `log` of requests. `model` makes sequences of requests; None until the engine is loaded."""

    def __init__(
        self,
        config: EngineConfig,
        options: ServeOptions,
        defaults: Mapping[str, Any],
        metrics: Metrics,
        log: RequestLog | None = None,
    ):
        self.config, self.options, self.defaults = config, options, defaults
        self.metrics, self._log = metrics, log
        self.names = options.names(config.model)
        self.engine = RemoteEngine(metrics)
        self.admission = Admission(self.engine, options.max_num_queued_reqs, options.max_queue_wait)
        self.model: ModelPrompts | None = None
        self.started_s, self.created = time.monotonic(), int(time.time())
        self.is_draining = False
        self._num_coming = 0  # sequences of requests that were let in and are being encoded
        self.num_open = 0  # requests whose responses are not sent yet
        self._workers = ThreadPoolExecutor(NUM_WORKERS, thread_name_prefix="encode")

    async def open(self) -> None:
        """Loads what texts need while the engine loads, and takes requests once both are there; or returns when the
        engine has failed. Raises ValueError for a tokenizer that cannot be read."""
        tokenizer, _ = await asyncio.gather(self.in_worker(load_tokenizer, self.config), self.engine.wait())
        if (facts := self.engine.facts) is not None:
            limits = Limits(facts.max_model_len, facts.num_pages, retention_of(self.config))
            self.model = ModelPrompts(self.config, tokenizer, facts.vocab_size, limits)

    @property
    def phase(self) -> str:
        """The state that it is in: loading, ready, draining or dead."""
        if self.engine.has_failed and not self.engine.is_stopping:
            return "dead"
        if self.is_draining or self.engine.is_stopping:
            return "draining"
        return "loading" if self.model is None else "ready"

    def progress(self) -> dict[str, Any]:
        """Says how far the start is."""
        return {"elapsed_s": time.monotonic() - self.started_s} | self.engine.progress

    def check_open(self) -> None:
        """Raises ApiError unless requests are taken."""
        if self.phase == "dead":
            raise errors.engine_dead()
        if self.phase == "draining":
            raise errors.shutting_down()
        if self.phase == "loading":
            raise errors.loading(LOADING_S)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not this one; none is this one."""
        if name is not None and name not in self.names:
            raise errors.model_not_found(name, self.names)

    async def in_worker(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Calls something in another thread, since it may take long, and returns what it gives."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, functools.partial(call, *arguments))

    async def respond(self, asked: Completion | Chat) -> Delivery:
        """Lets a request run, and gives the response that will bring its answer. Raises ApiError for what can be
        refused."""
        came_s = time.perf_counter()
        self.check_open()
        self.check_model(asked.model)
        self.admission.check(asked.num_sequences, self._num_coming)
        self._num_coming += asked.num_sequences
        try:
            sequences = await self._sequences(asked)
            answer = await self._answer(asked, sequences)
        finally:
            self._num_coming -= asked.num_sequences
        self.check_open()
        outbox = Outbox(sequences, asked.params.n)

        def end(delivered: Delivered) -> None:
            self.num_open -= 1
            if delivered.error == DISCONNECTED:
                self.metrics.client_disconnected()
            outbox.on_ended = lambda: self.note(record_of(answer.id, asked, outbox, delivered, came_s))
            if outbox.has_ended:  # those that were aborted end a little later
                outbox.on_ended()

        self.num_open += 1
        self.engine.add(outbox)
        if not asked.streams:
            return WholeAnswer(self.engine, outbox, answer, end)
        usage = {"sends_usage": asked.sends_usage, "sends_usage_always": asked.sends_usage_always}
        return EventStream(self.engine, outbox, answer, end, **usage)

    async def _sequences(self, asked: Completion | Chat) -> list[Sequence]:
        """The sequences of a request, not yet running. Raises ApiError."""
        if is_quick(asked):
            return sequences_of(self.model, asked)
        return await self.in_worker(sequences_of, self.model, asked)

    async def _answer(self, asked: Completion | Chat, sequences: list[Sequence]) -> CompletionAnswer | ChatAnswer:
        """The bodies of an answer that is yet to come."""
        name, num_top = asked.model or self.names[0], asked.params.logprobs or 0
        if isinstance(asked, Chat):
            return ChatAnswer(name, num_top)
        echoes = await self.in_worker(echoes_of, self.model, asked, sequences) if asked.echo else None
        return CompletionAnswer(name, num_top, echoes=echoes)

    def note(self, record: dict[str, Any]) -> None:
        """Logs a request that has ended, or was refused."""
        if self._log is not None:
            self._log.write(record)

    def abort_all(self) -> None:
        """Ends all requests, whose clients are told that the server goes."""
        self.engine.abort_all(SHUT_DOWN)

    def close(self) -> None:
        """Ends the threads that encode."""
        self._workers.shutdown(wait=False, cancel_futures=True)
