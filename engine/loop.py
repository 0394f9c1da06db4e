"""Runs one call's sequences, pass after pass until all have ended: schedule, submit, collect, text.

A sequence fails alone. If its logits are NaN, or it can never run, it ends with FinishReason.ERROR; if `on_text`
raises, its prompt's sequences end with FinishReason.ABORT. The others go on as if a stop had ended those.
"""

from penstock.engine.compute.sampler import NAN_LOGITS, SampleOutput
from penstock.engine.output import Listener, Sequence
from penstock.engine.runtime.engine import Engine
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.request import FinishReason, Request
from penstock.scheduler.batching.scheduler import Scheduler


class Loop:
    """The loop of rank 0. `groups` has the sequences of each prompt, whose text goes to `listener`."""

    def __init__(self, scheduler: Scheduler, engine: Engine, groups: list[list[Sequence]], listener: Listener):
        self.scheduler, self.engine, self.groups, self.listener = scheduler, engine, groups, listener
        self._sequences = {sequence.request.id: sequence for group in groups for sequence in group}
        self._num_aborted = 0  # prompts for which on_text has raised and that have ended for it

    def run(self) -> None:
        """Runs until all have ended. Any other exception, an interrupt too, ends all and leaves the engine usable."""
        try:
            self._add()
            while self.scheduler.has_unfinished:
                batch = self.scheduler.schedule()
                if batch is not None and self.engine.must_wait:
                    self._run_if_wanted(batch)
                    continue
                if batch is not None:
                    self.engine.submit(batch)
                if batch is None or self.engine.num_under_way > self.engine.lookahead:
                    self._take_in(*self._collect())
        except BaseException:
            self.scheduler.abort()
            self.engine.forget()
            raise

    def _add(self) -> None:
        refused = []
        for sequence in self._sequences.values():
            try:
                self.scheduler.add(sequence.request)
            except ValueError as error:
                sequence.fail(str(error))
                refused.append(sequence)
        for sequence in refused:
            sequence.on_text(None)
        self._abort_unheard()

    def _run_if_wanted(self, batch: Batch) -> None:
        """Runs a prepared pass as soon as the tokens of the one under way are there; text is made while it runs."""
        self.engine.announce(batch)
        requests, sampled = self._collect()
        if self.scheduler.is_wanted(batch):
            self.engine.run_announced(batch)
        else:
            self.scheduler.withdraw(batch)
        self._take_in(requests, sampled)

    def _collect(self) -> tuple[list[Request | None], SampleOutput | None]:
        """Waits for the oldest pass. Returns the requests that got its tokens, and the tokens."""
        batch, sampled = self.engine.collect()
        return self.scheduler.update(batch, sampled.tokens.tolist() if sampled else []), sampled

    def _take_in(self, requests: list[Request | None], sampled: SampleOutput | None) -> None:
        """Gives each sequence of a pass its token."""
        for index, request in enumerate(requests):
            if request is not None:
                self._advance(self._sequences[request.id], sampled, index)
        self._abort_unheard()

    def _advance(self, sequence: Sequence, sampled: SampleOutput, index: int) -> None:
        request = sequence.request
        if request.finish_reason == FinishReason.ERROR:
            sequence.fail(NAN_LOGITS)
        else:
            self._push(sequence, sampled, index)
        if request.finish_reason is not None:
            sequence.on_text(None)

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

    def _abort_unheard(self) -> None:
        """Ends the sequences of the prompts for which `on_text` has raised since the last time."""
        for prompt, error in self.listener.raised[self._num_aborted :]:
            self._num_aborted += 1
            for sequence in self.groups[prompt]:
                if sequence.request.finish_reason is None:
                    self.scheduler.finish(sequence.request, FinishReason.ABORT)
                    sequence.fail(f"on_text raised {error!r}")
