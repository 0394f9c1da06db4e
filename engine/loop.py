"""The loop that serves requests: add them, advance pass by pass, take what happened, abort those that nobody wants.

    loop.add(sequence)                      # from any thread; also while a pass runs
    while loop.has_unfinished:
        for event in loop.advance():        # schedule, submit, collect, text
            show(event.sequence, event.text)
    loop.abort(sequence.request.id, "the client has gone")

Adds and aborts wait in an inbox. It is emptied right before a pass is sealed and, where weights stream, again before a
pass that was announced begins.

A sequence fails alone. If its logits are NaN, or it can never run, it ends with FinishReason.ERROR; if it is aborted,
with FinishReason.ABORT. The others go on as if a stop had ended those.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.engine.compute.sampler import NAN_LOGITS, SampleOutput
from penstock.engine.output import Sequence
from penstock.engine.runtime.engine import Engine
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.request import FinishReason, Request
from penstock.scheduler.batching.scheduler import Scheduler


@dataclass(frozen=True)
class Event:
    """News of a sequence: a token, with the text that can no longer become part of a stop string (often none), or its
    end, or both."""

    sequence: Sequence
    text: str
    is_last: bool


class Loop:
    """The loop of rank 0: no one else calls scheduler and engine in turn. `add`, `abort` and `has_unfinished` are for
    any thread, the rest for the one that advances."""

    def __init__(self, scheduler: Scheduler, engine: Engine):
        self.scheduler, self.engine = scheduler, engine
        self._sequences: dict[int, Sequence] = {}  # those that have not ended, by request id
        self._inbox: deque[Callable[[list[Event]], None]] = deque()  # adds and aborts to be done; they append events

    def add(self, sequence: Sequence) -> None:
        """Lets a new sequence wait for its row. One that can never run ends with an error, which is an event."""
        self._inbox.append(lambda events: self._add(sequence, events))

    def abort(self, request_id: int, why: str) -> None:
        """Ends a sequence, with `why` as its error; one that has ended is left alone."""
        self._inbox.append(lambda events: self._abort(request_id, why, events))

    @property
    def has_unfinished(self) -> bool:
        """Tells whether there is anything to advance."""
        return bool(self._inbox) or self.scheduler.has_unfinished

    def advance(self) -> list[Event]:
        """Enqueues the next pass, and takes in the tokens of the oldest one under way once more are under way than the
        engine may run ahead. Returns what happened to sequences. An exception, an interrupt too, ends them all. The
        engine of one rank stays usable; that of several ranks has ended, since they no longer agree."""
        try:
            with self.engine.together():
                return self._advance()
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Ends all sequences with FinishReason.ABORT, and gives up the passes under way."""
        self._inbox.clear()
        self._sequences.clear()
        self.scheduler.abort()
        self.engine.forget()

    def _advance(self) -> list[Event]:
        events = self._read_inbox()
        if not self.scheduler.has_unfinished:
            return events
        batch = self.scheduler.schedule()
        if batch is not None and self.engine.must_wait:
            return events + self._run_if_wanted(batch)
        if batch is not None:
            self.engine.submit(batch)
        if batch is None or self.engine.num_under_way > self.engine.lookahead:
            events += self._take_in(*self._update(*self.engine.collect()))
        return events

    def _run_if_wanted(self, batch: Batch) -> list[Event]:
        """Runs a prepared pass as soon as the tokens of the one under way are there, or one that those who have come
        since have entered; text is made while it runs."""
        self.engine.announce(batch)
        came = self.engine.collect()
        events = self._read_inbox()
        requests, sampled = self._update(*came)
        revised = self.scheduler.revise(batch)
        if revised is batch:
            self.engine.run_announced(batch)
        elif revised is not None:
            self.engine.submit(revised)
        return events + self._take_in(requests, sampled)

    def _read_inbox(self) -> list[Event]:
        events: list[Event] = []
        while self._inbox:
            self._inbox[0](events)
            self._inbox.popleft()  # only now: until then there is something unfinished
        return events

    def _add(self, sequence: Sequence, events: list[Event]) -> None:
        try:
            self.scheduler.add(sequence.request)
        except ValueError as error:
            sequence.fail(str(error))
            events.append(Event(sequence, sequence.take_text(), is_last=True))
        else:
            self._sequences[sequence.request.id] = sequence

    def _abort(self, request_id: int, why: str, events: list[Event]) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.finish(sequence.request, FinishReason.ABORT)
            sequence.fail(why)
            events.append(Event(sequence, sequence.take_text(), is_last=True))

    def _update(self, batch: Batch, sampled: SampleOutput | None) -> tuple[list[Request | None], SampleOutput | None]:
        """Gives the requests of a pass their tokens. Returns those that got one, and what was sampled."""
        return self.scheduler.update(batch, sampled.tokens.tolist() if sampled else []), sampled

    def _take_in(self, requests: list[Request | None], sampled: SampleOutput | None) -> list[Event]:
        """Gives each sequence of a pass its token."""
        events = []
        for index, request in enumerate(requests):
            sequence = None if request is None else self._sequences.get(request.id)
            if sequence is None:  # it has ended meanwhile
                continue
            if request.finish_reason == FinishReason.ERROR:
                sequence.fail(NAN_LOGITS)
            else:
                self._push(sequence, sampled, index)
            is_last, text = request.finish_reason is not None, sequence.take_text()
            if is_last:
                del self._sequences[request.id]
            events.append(Event(sequence, text, is_last))
        return events

    def _push(self, sequence: Sequence, sampled: SampleOutput, index: int) -> None:
        """Gives a sequence its newest token. The token that ends it is not part of the text, as in vLLM."""
        request = sequence.request
        token = request.output_token_ids[-1]
        if request.params.logprobs is not None:
            sequence.add_logprobs(token, *sampled.logprobs.at(index, request.params.logprobs))
        stop = None
        if request.finish_reason != FinishReason.STOP:
            stop = sequence.push(token)
        if stop is None and request.finish_reason is not None:
            stop = sequence.flush()
        if stop is not None:
            self.scheduler.finish(request, FinishReason.STOP, stop_reason=stop)
