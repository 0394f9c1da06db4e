"""The work of the engine's process: it makes the LLM, alone advances its loop by what the front says, tells what came,
and closes it.

    load -> Ready -> | sleep while there is nothing to compute; advance; tell the turn in one message | -> close

Adds and aborts are read where the loop reads its inbox: last, before a pass is sealed. Nobody is waited for: what the
front does not take yet is kept (channel.py). An exception out of `advance` ends the engine, since what its ranks or its
device hold then is unknown.
"""

import binascii
import logging
import threading
from collections.abc import Callable
from typing import Any

from penstock.engine.llm import LLM
from penstock.engine.loop import Event
from penstock.engine.output import Logprob, Sequence
from penstock.engine.runtime.progress import Progress
from penstock.engine.server.channel import Channel
from penstock.engine.server.engine_facts import facts_of, row_pass_s, state_of
from penstock.engine.server.engine_state import pass_told
from penstock.engine.server.messages import Abort, Add, Dead, Loading, Outputs, Ready, Scores, Stop
from penstock.scheduler.batching.request import FinishReason, Request, SamplingParams

LOGGER = logging.getLogger("penstock.server")
PROGRESS_S = 0.2  # between two messages while it loads
DEAD_S = 3.0  # for the front to take the last message


class EngineWork:
    """One engine, in one thread. `make` loads it, and says to a Progress how far that is."""

    def __init__(self, make: Callable[[Progress], LLM], channel: Channel):
        self._make, self._channel = make, channel
        self.llm: LLM | None = None
        self._stops = False
        self._rowless: dict[int, Request] = {}  # those that never had a row
        self._scored: dict[int, Sequence] = {}  # those whose prompts get log probabilities
        self._pass_s: dict[int, float] = {}  # by the number of rows

    def run(self) -> None:
        """Works until the front says stop, or is gone. Raises what ended the engine, which the front is told before."""
        try:
            self.llm = self._load()
            self.llm.engine.launch.on_failure(self._lose_rank)
            self.llm.loop.hear(self._receive)
            self._channel.send(Ready(vars(facts_of(self.llm)), self._state()))
            while not self._stops:
                self._turn()
        except BaseException:
            self._say_dead()
            raise
        finally:
            if self.llm is not None:
                self.llm.close()

    def _load(self) -> LLM:
        """The engine. While it loads, a thread says how far that is."""
        progress, is_done = Progress(), threading.Event()

        def tell() -> None:
            while not is_done.wait(PROGRESS_S):
                self._channel.send(Loading(progress.to_dict()))

        teller = threading.Thread(target=tell, name="progress", daemon=True)
        teller.start()
        try:
            return self._make(progress)
        finally:
            is_done.set()
            teller.join()
            self._channel.send(Loading(progress.to_dict()))

    def _say_dead(self) -> None:
        self._channel.send(Dead())
        self._channel.flush(DEAD_S)

    def _lose_rank(self) -> None:
        """Tells the front at once that another rank has failed, in a thread of the guard's: the engine's may be inside
        a pass that never ends. If it waits for requests it goes on, to raise that."""
        self._say_dead()
        self._channel.deafen()

    def _turn(self) -> None:
        """Advances by a pass, or sleeps until there is something to do; tells what came of it."""
        loop, times = self.llm.loop, self.llm.engine.times
        if not loop.has_unfinished:
            self._channel.wait()
        num_passes = times.num_passes
        events = loop.advance()
        passed = pass_told(times.last, times.recent[-1][1]) if times.num_passes > num_passes else None
        rows = self._seated()
        self._tell_scores()
        if events or rows or passed:
            self._channel.send(self._outputs(events, rows, passed))

    def _receive(self) -> None:
        """Puts what the front says into the loop's inbox."""
        self._channel.flush()
        try:
            messages = self._channel.receive()
        except EOFError:
            self._stops = True
            return
        for message in messages:
            if isinstance(message, Add):
                self._add(message)
            elif isinstance(message, Abort):
                for request_id in message.ids:
                    self.llm.loop.abort(request_id, message.why)
            else:
                assert isinstance(message, Stop), message
                self._stops = True

    def _add(self, message: Add) -> None:
        """Adds sequences; those that cannot be made end at once, and alone."""
        request_ids = iter(message.ids)
        try:
            params = SamplingParams(**message.params)
            made = [self.llm.prompts.expand(prompt, params, request_ids) for prompt in message.prompts]
        except Exception as error:
            LOGGER.error("%d sequences end: they could not be made", len(message.ids), exc_info=error)
            why = f"it could not be made ({type(error).__name__})"
            ends = [(request_id, FinishReason.ERROR, None, why) for request_id in message.ids]
            self._channel.send(self._outputs([], [], None)._replace(ends=ends))
            return
        for sequence in (sequence for sequences in made for sequence in sequences):
            self._rowless[sequence.request.id] = sequence.request
            if sequence.request.params.prompt_logprobs is not None:
                self._scored[sequence.request.id] = sequence
            self.llm.loop.add(sequence)

    def _seated(self) -> list[tuple[int, int]]:
        """Those that got their first row in this turn, with the tokens that were cached; it forgets them, and those
        that ended without one."""
        rows = [(number, one.num_cached_tokens) for number, one in self._rowless.items() if not _waits(one)]
        for number, _ in rows:
            del self._rowless[number]
        return [row for row in rows if row[1] is not None]

    def _tell_scores(self) -> None:
        """Tells what a pass gave of prompts' log probabilities, and forgets it."""
        for number, sequence in list(self._scored.items()):
            if sequence.prompt_scores:
                packed = binascii.b2a_base64(sequence.prompt_scores, newline=False).decode()
                sequence.prompt_scores.clear()
                self._channel.send(Scores(number, packed))
            if sequence.request.output_token_ids or sequence.request.finish_reason is not None:
                del self._scored[number]

    def _outputs(self, events: list[Event], rows: list[tuple[int, int]], passed: list[Any] | None) -> Outputs:
        told = Outputs([], [], [], [], [], [], rows, passed, self._state())
        for event in events:
            sequence, request = event.sequence, event.sequence.request
            tokens = request.output_token_ids
            told.ids.append(request.id)
            told.counts.append(len(tokens))
            told.tokens.append(tokens[-1] if tokens else 0)
            told.texts.append(event.text)
            if len(sequence.logprobs) == len(tokens) > 0:
                told.logprobs.append((request.id, position_told(sequence.logprobs[-1])))
            if event.is_last:
                told.ends.append((request.id, request.finish_reason, request.stop_reason, sequence.error))
        return told

    def _state(self) -> list[Any]:
        rows = max(self.llm.loop.scheduler.num_running, 1)
        if rows not in self._pass_s:
            self._pass_s[rows] = row_pass_s(self.llm, rows)
        return list(state_of(self.llm, self._pass_s[rows]))


def _waits(request: Request) -> bool:
    return request.num_cached_tokens is None and request.finish_reason is None


def position_told(position: dict[int, Logprob]) -> list[Any]:
    """The log probabilities at one position, as a message carries them."""
    return [(token, each.logprob, each.rank, each.decoded_token) for token, each in position.items()]
