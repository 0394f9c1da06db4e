"""The thread that owns the engine: it makes the LLM, alone advances its loop, and closes it.

    event loop   start(loop) | add(outbox)   abort(outbox, why)        | stop(), ended
    this thread  load        | advance, and put what came into outboxes | close

Adds and aborts go straight to the loop's inbox, which is emptied right before a pass is sealed. What a pass gave goes
to the event loop in one call. While there is nothing to compute the thread sleeps.

An exception out of `advance` ends the engine, since what its ranks or its device hold then is unknown: every client
gets the error, `error` keeps it, and the thread ends.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Protocol

from penstock.engine.llm import LLM
from penstock.engine.server.journey import Journey
from penstock.engine.server.outbox import Finish, Outbox, Piece

DEAD = "the engine has ended"
WEIGHT = 0.05  # of the newest answer in the mean
SHUT_DOWN = "the server is shutting down"


class Observer(Protocol):
    """Sees what the engine does; called in the engine's thread, so it must be quick."""

    def observe_pass(self, llm: LLM, moved: list[Journey]) -> None:
        """A pass has ended; `moved` got a token in it."""

    def sequence_ended(self, llm: LLM, journey: Journey) -> None:
        """A sequence has ended, by itself or not."""


class EngineThread:
    """One engine. `make` loads it, in the thread; `on_change` is called in the event loop when it is loaded, or has
    failed."""

    def __init__(self, make: Callable[[], LLM], on_change: Callable[[], None], observer: Observer | None = None):
        self._make, self._on_change, self._observer = make, on_change, observer
        self.llm: LLM | None = None
        self.error: BaseException | None = None
        self._journeys: dict[int, Journey] = {}  # those that have not ended, by request id
        self._rowless: set[int] = set()  # those of them that never had a row
        self._mean_tokens: float | None = None  # of answers that ended by themselves; recent ones count more
        self._wake = threading.Event()
        self._stops = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to load; `loop` is the event loop that outboxes belong to."""
        self._loop = loop
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Tells whether it serves."""
        return self.llm is not None and self.error is None

    @property
    def num_unfinished(self) -> int:
        """The number of sequences that have not ended."""
        return len(self._journeys)

    @property
    def num_rowless(self) -> int:
        """The number of sequences that wait for their first row."""
        return len(self._rowless)

    def num_rowless_tokens(self) -> int:
        """The tokens of their prompts."""
        journeys = (self._journeys.get(request_id) for request_id in list(self._rowless))
        return sum(len(journey.sequence.request.prompt_token_ids) for journey in journeys if journey)

    def mean_tokens(self, otherwise: float) -> float:
        """The tokens that an answer has on average."""
        return otherwise if self._mean_tokens is None else self._mean_tokens

    def add(self, outbox: Outbox) -> None:
        """Lets the sequences of an outbox run."""
        now_s = time.perf_counter()
        for choice, sequence in enumerate(outbox.sequences):
            request_id = sequence.request.id
            self._rowless.add(request_id)
            self._journeys[request_id] = Journey(sequence, outbox, choice, now_s)
            self.llm.loop.add(sequence)
        self._wake.set()
        if self.error is not None:  # it ended meanwhile, and may not have seen these
            self._fail_all()

    def abort(self, outbox: Outbox, why: str) -> None:
        """Ends the sequences of an outbox that have not ended; said twice it does no more."""
        for sequence in outbox.sequences:
            if sequence.request.id in self._journeys:
                self.llm.loop.abort(sequence.request.id, why)
        self._wake.set()

    def abort_all(self, why: str) -> None:
        """Ends all sequences."""
        for request_id in list(self._journeys):
            self.llm.loop.abort(request_id, why)
        self._wake.set()

    def stop(self) -> None:
        """Lets the thread close the engine and end, after the pass that is under way."""
        self._stops = True
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Waits for the thread's end. Returns whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            llm = self._make()
            llm.engine.launch.on_failure(self._lose_rank)
            self.llm = llm
            self._tell(self._on_change)
            while not self._stops:
                self._turn()
        except BaseException as error:
            self._die(error)
        finally:
            if self.llm is not None:
                self.llm.close()

    def _turn(self) -> None:
        """Advances by a pass, or sleeps until there is something to do."""
        if not self.llm.loop.has_unfinished:
            self._wake.wait()
        self._wake.clear()
        num_passes = self.llm.engine.times.num_passes
        events = self.llm.loop.advance()
        now_s = time.perf_counter()
        self._note_rows(now_s)
        puts, moved = [], []
        for event in events:
            journey = self._journeys.get(event.sequence.request.id)
            if journey is None:
                continue
            piece = journey.take(event.text, event.is_last, now_s)
            puts.append((journey.outbox, piece))
            moved += [journey] if journey.last_token_s == now_s else []
            if event.is_last:
                self._forget(journey)
        if puts:
            self._tell(_put_all, puts)
        if self._observer is not None and self.llm.engine.times.num_passes > num_passes:
            self._observer.observe_pass(self.llm, moved)

    def _note_rows(self, now_s: float) -> None:
        """Notes when sequences got their first row."""
        for request_id in list(self._rowless):
            journey = self._journeys.get(request_id)
            if journey is not None and journey.sequence.request.num_cached_tokens is not None:
                journey.row_s = now_s
                self._rowless.discard(request_id)

    def _forget(self, journey: Journey) -> None:
        request_id = journey.sequence.request.id
        self._rowless.discard(request_id)
        self._journeys.pop(request_id, None)
        if journey.finish.error is None:
            mean = journey.num_tokens if self._mean_tokens is None else self._mean_tokens
            self._mean_tokens = mean + WEIGHT * (journey.num_tokens - mean)
        if self._observer is not None:
            self._observer.sequence_ended(self.llm, journey)

    def _lose_rank(self) -> None:
        """Answers all clients as soon as another rank has failed, in a thread of the guard's: this one may be inside a
        pass that never ends."""
        self.error = self.error or RuntimeError("another rank has failed")
        self._fail_all()
        self._tell(self._on_change)
        self._wake.set()

    def _die(self, error: BaseException) -> None:
        self.error = error
        self._fail_all()
        self._tell(self._on_change)

    def _fail_all(self) -> None:
        """Gives all clients the end of the engine."""
        popped = (self._journeys.pop(request_id, None) for request_id in list(self._journeys))
        end = Finish("error", None, DEAD)
        puts = [(each.outbox, Piece(each.choice, [], [], each.num_tokens, end)) for each in popped if each is not None]
        if puts:
            self._tell(_put_all, puts)

    def _tell(self, call: Callable, *arguments: object) -> None:
        """Lets the event loop call something; one that is closed needs nothing any more."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *arguments)


def _put_all(puts: list[tuple[Outbox, Piece]]) -> None:
    for outbox, piece in puts:
        outbox.put(piece)
