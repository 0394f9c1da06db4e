"""The engine, in its other process, as the front sees it: what was added and has not ended, and what was told last.

    add(outbox)   abort(outbox, why)   abort_all(why)   stop()   -> messages to the engine
    messages of the engine -> outboxes, metrics, and what is known of it

All of it is the event loop's. The sequences of an outbox grow here as those of the engine's process do. If the engine
fails, or is gone, every client gets the end.
"""

import asyncio
import binascii
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from penstock.engine.output import Logprob
from penstock.engine.runtime.pass_times import PassTimes
from penstock.engine.runtime.progress import Progress
from penstock.engine.server.channel import Channel
from penstock.engine.server.engine_state import EngineFacts, EngineState, pass_heard
from penstock.engine.server.journey import Journey
from penstock.engine.server.messages import Abort, Add, Dead, Loading, Message, Outputs, Ready, Scores, Stop
from penstock.engine.server.metrics import Metrics
from penstock.engine.server.outbox import Finish, Outbox, Piece
from penstock.scheduler.batching.request import FinishReason

DEAD = "the engine has ended"
SHUT_DOWN = "the server is shutting down"
AT_ONCE = 4  # rows of a pass that get their news before the event loop looks for requests
WEIGHT = 0.05  # of the newest answer in the mean


class RemoteEngine:
    """One engine. `metrics` hear of its passes and of sequences that end. `facts` are None until it is loaded. Once it
    `is_stopping` its end is no failure."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self.facts: EngineFacts | None = None
        self.state, self.times, self.progress = EngineState(), PassTimes(), Progress().to_dict()
        self.has_failed = self.is_stopping = False
        self._journeys: dict[int, Journey] = {}  # those that have not ended, by request id
        self._rowless: dict[int, Journey] = {}  # those of them that never had a row
        self._mean_tokens: float | None = None  # of answers that ended by themselves; recent ones count more
        self._giving: Iterator[None] = iter(())  # the rest of the newest pass to be given
        self._known = asyncio.Event()  # whether it is loaded, or has failed
        self._hears: dict[type, Callable[[Any], None]] = {
            Loading: self._hear_loading,
            Ready: self._hear_ready,
            Scores: self._hear_scores,
            Outputs: self._hear_outputs,
            Dead: lambda _: self.fail(),
        }

    def attach(self, channel: Channel) -> None:
        """Begins to hear what the engine says; in the event loop."""
        self._channel, self._loop = channel, asyncio.get_running_loop()
        self._loop.add_reader(channel.fileno(), self._read)

    async def wait(self) -> None:
        """Waits until it is loaded, or has failed."""
        await self._known.wait()

    @property
    def is_ready(self) -> bool:
        """Tells whether it serves."""
        return self.facts is not None and not self.has_failed

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
        return sum(len(journey.sequence.request.prompt_token_ids) for journey in self._rowless.values())

    def mean_tokens(self, otherwise: float) -> float:
        """The tokens that an answer has on average."""
        return otherwise if self._mean_tokens is None else self._mean_tokens

    def add(self, outbox: Outbox) -> None:
        """Lets the sequences of an outbox run."""
        now_s, ids = time.perf_counter(), []
        for choice, sequence in enumerate(outbox.sequences):
            ids.append(sequence.request.id)
            self._journeys[ids[-1]] = self._rowless[ids[-1]] = Journey(sequence, outbox, choice, now_s)
        if self.has_failed:
            self._fail_all()
            return
        firsts = [sequence.request for sequence in outbox.sequences[:: outbox.n]]
        self._send(Add(ids, [request.prompt_token_ids for request in firsts], vars(firsts[0].params)))

    def abort(self, outbox: Outbox, why: str) -> None:
        """Ends the sequences of an outbox that have not ended; said twice it does no more."""
        self._abort([one.request.id for one in outbox.sequences if one.request.id in self._journeys], why)

    def abort_all(self, why: str) -> None:
        """Ends all sequences."""
        self._abort(list(self._journeys), why)

    def stop(self) -> None:
        """Lets the engine close and its process end, after the pass that is under way."""
        self.is_stopping = not self.has_failed
        self._send(Stop())

    def fail(self) -> None:
        """Gives up the engine, which has failed or is gone: all clients get the end."""
        if not self.has_failed:
            self.has_failed = True
            self._loop.remove_reader(self._channel.fileno())
            self._loop.remove_writer(self._channel.fileno())
            self._fail_all()
            self._known.set()

    def _abort(self, ids: list[int], why: str) -> None:
        if ids:
            self._send(Abort(ids, why))

    def _send(self, message: Message) -> None:
        if not self.has_failed:
            self._channel.send(message)
            if self._channel.has_unsent:
                self._loop.add_writer(self._channel.fileno(), self._flush)

    def _flush(self) -> None:
        self._channel.flush()
        if not self._channel.has_unsent:
            self._loop.remove_writer(self._channel.fileno())

    def _read(self) -> None:
        self._give_rest()
        try:
            messages = self._channel.receive()
        except EOFError:
            self.fail()
            return
        for message in messages:
            self._hears[type(message)](message)

    def _hear_loading(self, message: Loading) -> None:
        self.progress = message.progress

    def _hear_ready(self, message: Ready) -> None:
        self.facts, self.state = EngineFacts(**message.facts), EngineState(*message.state)
        self._known.set()

    def _hear_scores(self, told: Scores) -> None:
        if (journey := self._journeys.get(told.id)) is not None:
            journey.sequence.add_prompt_logprobs(binascii.a2b_base64(told.packed))

    def _hear_outputs(self, told: Outputs) -> None:
        """Begins to give each sequence, and its client, what came of a pass: once what came before it is given."""
        self._give_rest()
        self._giving = self._give(told, time.perf_counter())
        self._give_more()

    def _give_more(self) -> None:
        """Gives some more of a pass, and leaves the rest until the event loop has looked for requests that came."""
        if any(True for _ in itertools.islice(self._giving, 1)):
            self._loop.call_soon(self._give_more)

    def _give_rest(self) -> None:
        for _ in self._giving:
            pass

    def _give(self, told: Outputs, now_s: float) -> Iterator[None]:
        """Gives what came of a pass, AT_ONCE rows at a time: the last ones first, among which those are that began in
        it, since their clients have waited longest."""
        self.state = EngineState(*told.state)
        for request_id, num_cached in told.rows:
            if (journey := self._rowless.pop(request_id, None)) is not None:
                journey.row_s, journey.sequence.request.num_cached_tokens = now_s, num_cached
        for request_id, position in told.logprobs:
            if (journey := self._journeys.get(request_id)) is not None:
                journey.sequence.logprobs.append({token: Logprob(*rest) for token, *rest in position})
        ends = {request_id: rest for request_id, *rest in told.ends}
        moved = []
        news = zip(*map(reversed, (told.ids, told.counts, told.tokens, told.texts)), strict=True)
        for index, (request_id, count, token, text) in enumerate(news, start=1):
            journey = self._journeys.get(request_id)
            if journey is not None:
                self._move(journey, count, token, text, ends.pop(request_id, None), now_s)
                moved += [journey] if journey.last_token_s == now_s else []
            if index % AT_ONCE == 0:
                yield
        for request_id, end in ends.items():  # without an event of their own
            if (journey := self._journeys.get(request_id)) is not None:
                self._move(journey, journey.num_tokens, 0, "", end, now_s)
        if told.passed is not None:
            self.times.note(*pass_heard(told.passed), now_s)
            self._metrics.observe_pass(self.facts, self.state, self.times.last, moved)

    def _move(self, journey: Journey, count: int, token: int, text: str, end: Any, now_s: float) -> None:
        """Gives a sequence its newest token and text, and its end if that has come."""
        sequence, request = journey.sequence, journey.sequence.request
        sequence.take_in([token] * (count - journey.num_tokens), text)
        if end is not None:
            reason, request.stop_reason, sequence.error = end
            request.finish_reason = FinishReason(reason)
        journey.outbox.put(journey.take(text, end is not None, now_s))
        if end is not None:
            self._forget(journey)

    def _forget(self, journey: Journey) -> None:
        request_id = journey.sequence.request.id
        self._rowless.pop(request_id, None)
        del self._journeys[request_id]
        if journey.finish.error is None:
            mean = journey.num_tokens if self._mean_tokens is None else self._mean_tokens
            self._mean_tokens = mean + WEIGHT * (journey.num_tokens - mean)
        self._metrics.sequence_ended(journey)

    def _fail_all(self) -> None:
        """Gives all clients the end of the engine."""
        journeys, self._journeys, self._rowless = list(self._journeys.values()), {}, {}
        for journey in journeys:
            journey.sequence.request.finish_reason = FinishReason.ABORT
            journey.outbox.put(Piece(journey.choice, [], [], journey.num_tokens, Finish("error", None, DEAD)))
