"""The loop that serves requests: add them, advance pass by pass, take what happened, abort those that nobody wants.

    loop.add(sequence)                      # from any thread; also while a pass runs
    while loop.has_unfinished:
        for event in loop.advance():        # schedule, submit, collect, text
            show(event.sequence, event.text)
    loop.abort(sequence.request.id, "the client has gone")

Adds and aborts wait in an inbox. It is emptied right before a pass is sealed and, where weights stream, again before a
pass that was announced begins. What `hear` was given is called right before that: whoever learns of adds and aborts by
other ways puts them into the inbox there. For these a pass is sealed as late as the one under way allows: who misses it
waits for a whole pass more.

A sequence fails alone. If its logits are NaN, if it can never run, or if its text cannot be made, it ends with
FinishReason.ERROR; if it is aborted, with FinishReason.ABORT. The others go on as if a stop had ended those. So they do
where rows cannot be packed for the other ranks. Where a pass cannot be scheduled at all, those that hold rows end, and
those that wait go on.
"""

import functools
import logging
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from penstock.engine.compute.sampler import NAN_LOGITS, SampleOutput
from penstock.engine.output import Sequence
from penstock.engine.runtime.engine import Engine
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.message import UnpackedRows
from penstock.scheduler.batching.request import FinishReason, Request
from penstock.scheduler.batching.scheduler import Scheduler

LOGGER = logging.getLogger("penstock.loop")
NO_TEXT = "its text could not be made"


class Event(NamedTuple):
    """News of a sequence: a token, with the text that can no longer become part of a stop string (often none), or its
    end, or both."""

    sequence: Sequence
    text: str
    is_last: bool


_event = functools.partial(tuple.__new__, Event)  # of a tuple of all fields, in half the time of Event(...)


class EndedPass(NamedTuple):
    """A pass whose tokens the requests have: what it gave, the rows with log probabilities of prompts, each with its
    request, and the requests that got a token; None for one that has ended."""

    sampled: SampleOutput | None
    scored: list[tuple[BatchRow, Request | None]]
    requests: list[Request | None]


class Loop:
    """The loop of rank 0: no one else calls scheduler and engine in turn. `add`, `abort` and `has_unfinished` are for
    any thread, the rest for the one that advances."""

    def __init__(self, scheduler: Scheduler, engine: Engine):
        self.scheduler, self.engine = scheduler, engine
        self._sequences: dict[int, Sequence] = {}  # those that have not ended, by request id
        self._inbox: deque[Callable[[list[Event]], None]] = deque()  # adds and aborts to be done; they append events
        self._receive: Callable[[], None] | None = None

    def add(self, sequence: Sequence) -> None:
        """Lets a new sequence wait for its row. One that can never run ends with an error, which is an event."""
        self._inbox.append(lambda events: self._add(sequence, events))

    def abort(self, request_id: int, why: str) -> None:
        """Ends a sequence, with `why` as its error; one that has ended is left alone."""
        self._inbox.append(lambda events: self._abort(request_id, why, events))

    def hear(self, receive: Callable[[], None] | None) -> None:
        """Lets `receive` be called right before adds and aborts are read, which is late from now on; until None says
        that nobody feeds the loop any more."""
        self._receive = receive

    @property
    def has_unfinished(self) -> bool:
        """Tells whether there is anything to advance."""
        return bool(self._inbox) or self.scheduler.has_unfinished

    def advance(self) -> list[Event]:
        """Enqueues the next pass, and takes in the tokens of the oldest one under way once more are under way than the
        engine may run ahead. Returns what happened to sequences. An exception of a pass, of a rank or of an update ends
        them all, and so does an interrupt. The engine of one rank stays usable; that of several ranks has ended, since
        they no longer agree."""
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
        if self._receive is not None:
            self.engine.rest()
        events = self._read_inbox()
        if not self.scheduler.has_unfinished:
            return events
        batch = self._schedule(events)
        if batch is not None and self.engine.must_wait:
            return events + self._run_if_wanted(batch)
        if batch is not None:
            self._send(self.engine.submit, batch, events)
        if self.engine.num_under_way > (0 if batch is None else self.engine.lookahead):
            events += self._take_in(self._update(*self.engine.collect()))
        return events

    def _run_if_wanted(self, batch: Batch) -> list[Event]:
        """Runs a prepared pass as soon as the tokens of the one under way are there, or one that those who have come
        since have entered; text is made while it runs."""
        events: list[Event] = []
        was_sent = self._send(self.engine.announce, batch, events)
        came = self.engine.collect()
        events += self._read_inbox()
        ended = self._update(*came)
        revised = self.scheduler.revise(batch) if was_sent else None
        if revised is batch:
            self.engine.run_announced(batch)
        elif revised is not None:
            self._send(self.engine.submit, revised, events)
        return events + self._take_in(ended)

    def _schedule(self, events: list[Event]) -> Batch | None:
        """The next pass, None if there is none. If that fails, those that hold rows end, whose state nobody knows; with
        nobody left to blame it, it is raised."""
        while True:
            try:
                return self.scheduler.schedule()
            except Exception as error:
                if not (seated := self.scheduler.seated):
                    raise
                self._fail(seated, "its pass could not be scheduled", error, events)
                self.scheduler.check_integrity()

    def _send(self, send: Callable[[Batch], None], batch: Batch, events: list[Event]) -> bool:
        """Sends a pass to the ranks. False where some rows cannot be packed: these end, and the others are scheduled
        anew."""
        try:
            send(batch)
        except UnpackedRows as error:
            self._fail(self.scheduler.withdraw(batch, error.rows), "it could not be told to the ranks", error, events)
            return False
        return True

    def _fail(self, requests: list[Request], what: str, error: Exception, events: list[Event]) -> None:
        """Ends requests with an error, which the log has whole."""
        LOGGER.error("%d sequences end: %s", len(requests), what, exc_info=error)
        for request in requests:
            self.scheduler.finish(request, FinishReason.ERROR)
            if (sequence := self._sequences.pop(request.id, None)) is not None:
                sequence.fail(f"{what} ({type(error.__cause__ or error).__name__})")
                events.append(Event(sequence, sequence.take_text(), is_last=True))

    def _read_inbox(self) -> list[Event]:
        events: list[Event] = []
        if self._receive is not None:
            self._receive()
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

    def _update(self, batch: Batch, sampled: SampleOutput | None) -> EndedPass:
        """Gives the requests of a pass their tokens; the sequences get theirs later."""
        scored: list[tuple[BatchRow, Request | None]] = []
        if sampled is not None and sampled.prompt_scores is not None:
            rows = (row for row in batch.rows if row.scores)
            scored = list(zip(rows, self.scheduler.scored(batch), strict=True))
        return EndedPass(sampled, scored, self.scheduler.update(batch, sampled.tokens.tolist() if sampled else []))

    def _take_in(self, ended: EndedPass) -> list[Event]:
        """Gives each sequence of a pass what it got."""
        events: list[Event] = []
        start = 0
        for row, request in ended.scored:
            if request is not None and (sequence := self._sequences.get(request.id)) is not None:
                try:
                    _score_prompt(sequence, ended.sampled, row, start)
                except Exception as error:
                    self._fail([request], NO_TEXT, error, events)
            start += row.num_scored
        sampled = ended.sampled
        for index, request in enumerate(ended.requests):
            if request is None or (sequence := self._sequences.get(request.id)) is None:  # it has ended
                continue
            try:
                text = self._push(sequence, request, sampled, index)
            except Exception as error:
                self._fail([request], NO_TEXT, error, events)
                continue
            is_last = request.finish_reason is not None
            if is_last:
                del self._sequences[request.id]
            events.append(_event((sequence, text, is_last)))
        return events

    def _push(self, sequence: Sequence, request: Request, sampled: SampleOutput, index: int) -> str:
        """Gives a sequence the newest token of its request, which is the pass's row `index`, and returns its new text.
        The token that ends it is not part of the text, as in vLLM."""
        reason = request.finish_reason
        is_last = reason is not None
        if is_last and reason is FinishReason.ERROR:
            sequence.fail(NAN_LOGITS)
            return sequence.take_text()
        token = request.output_token_ids[-1]
        if sampled.scores is not None and request.params.logprobs is not None:
            sequence.add_logprobs(token, *sampled.logprobs.at(index, request.params.logprobs))
        stop = None if is_last and reason is FinishReason.STOP else sequence.push(token)
        if stop is None and is_last:
            stop = sequence.flush()
        if stop is not None:
            self.scheduler.finish(request, FinishReason.STOP, stop_reason=stop)
        return sequence.take_text()


def _score_prompt(sequence: Sequence, sampled: SampleOutput, row: BatchRow, start: int) -> None:
    """Gives a sequence the log probabilities of its prompt that its row gave, from `start` of the pass's on."""
    rows = slice(start, start + row.num_scored)
    sequence.add_prompt_logprobs(sampled.prompt_logprobs.packed(rows, row.scores.num_top))
