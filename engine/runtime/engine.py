"""An Engine is one running rank (start_engine.py makes it). On rank 0 it also tells the other ranks what to do.

    rank 0   submit(batch): says it and enqueues it    collect(): waits for its tokens    finish(outputs)   close()
    others   follow(): runs the batches that arrive, and returns the outputs of `finish`, or None after `close`

A pass is prepared while the one before it runs, so that host and device work at the same time. Where nothing streams it
is enqueued at once. Where weights stream, a pass that turns out to be unneeded would cost too much: it is announced,
and runs once the tokens of the one before are there, while the wrapped copies are on the link.

Rank 0 decides and the others have no scheduler. What they say to each other is protocol.py's.
"""

import atexit
import contextlib
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from penstock.engine.compute.sampler import SampleOutput
from penstock.engine.config import EngineConfig
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.planning.predictions import pass_work
from penstock.engine.runtime.binding import on_own_device
from penstock.engine.runtime.build import Worker
from penstock.engine.runtime.calls import MEASURE, Call
from penstock.engine.runtime.pass_times import PassTimes
from penstock.engine.runtime.probe import measure_engine
from penstock.engine.runtime.protocol import Kind, Messages, Output
from penstock.engine.runtime.trace import Trace, join_traces
from penstock.engine.runtime.watch import Watch, Watches
from penstock.parallel.collectives import Collectives
from penstock.parallel.launch import Launch
from penstock.parallel.ledger import TransferLedger
from penstock.parallel.topology import Topology
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.cost.time_model import Rates, with_link
from penstock.scheduler.units import MIB

LINK_BYTES = 2048 * MIB  # that the probe copies in one go: long enough that all ranks copy at once
SPARE_S = 1.5e-3  # by which the host seals a pass earlier than it has to
KEEPS_RATES = -1  # said instead of MiB of the link: nothing is to be measured


class Engine:
    """One running rank, of what start_engine.py has made. It takes over `undo`, which frees that and leaves the other
    ranks, in an order that cannot hang. `planned_at_s`: when all ranks had their plan, by time.perf_counter."""

    def __init__(
        self,
        config: EngineConfig,
        launch: Launch,
        topology: Topology,
        collectives: Collectives,
        watches: Watches,
        trace: Trace | None,
        worker: Worker,
        eos_token_ids: tuple[int, ...],
        planned_at_s: float,
        undo: contextlib.ExitStack,
    ):
        self.config, self.launch, self.topology, self.collectives = config, launch, topology, collectives
        self.watches, self.trace, self.worker = watches, trace, worker
        self.eos_token_ids, self.planned_at_s = eos_token_ids, planned_at_s
        self.plan: EnginePlan = worker.plan
        self.work, self.rates = pass_work(self.plan), self.plan.rates
        self.messages = Messages(collectives)
        self.times = PassTimes()
        self.transfers: list[dict] = []
        self.submitted: deque[Batch] = deque()  # passes under way
        self.failed = False
        self.stopped = False  # whether rank 0 has said STOP
        self.leads = launch.kind == "parent"  # whether the other ranks serve, and leave when rank 0 says STOP
        self._undo = undo.pop_all()
        atexit.register(self.close)  # registered after the collectives' handler, so it runs before that one

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A context for work that ranks do together. With several ranks an error in it ends the engine: they no longer
        agree on what comes next. Raises RuntimeError, at once, after such an error."""
        if self.failed:
            raise RuntimeError("this engine has ended: an earlier error left its ranks in disagreement")
        try:
            with self.launch.guard():
                yield
        except BaseException:
            if self.topology.tp_size > 1:
                self.failed = True
                self.close()  # so that another engine can be made here
            raise

    def watched_by(self, watch: Watch) -> contextlib.AbstractContextManager[None]:
        """A context in which `watch` sees the passes of this rank. What it replaces in a pass that is captured
        meanwhile stays in that graph: give it as debug.watch, or enforce_eager."""
        return self.watches.with_one_more(watch)

    def lead(self) -> None:
        """Says that the other ranks serve, and leave when this one, rank 0, closes."""
        self.leads = True

    @on_own_device
    def agree(self, call: Call) -> str:
        """Lets ranks under torchrun agree on a call of LLM, within `together`, before it runs. Returns why it cannot,
        the same on all ranks; empty if it can."""
        number = self.messages.count_call()
        if self.launch.rank == 0:
            self.messages.say_call(call)
        elif self._await(Kind.CALL) is Kind.STOP:
            raise RuntimeError(f"call {number} ({call.name}): rank 0 has closed its LLM")
        return self.messages.exchange(call)

    @property
    def device(self) -> torch.device:
        return self.topology.device

    @property
    def lookahead(self) -> int:
        """The number of passes that may be under way when one more is prepared. (On a CPU a submitted pass has run.)"""
        given = self.config.debug.lookahead
        return int(self.device.type == "cuda") if given is None else given

    @property
    def must_wait(self) -> bool:
        """Tells whether rank 0 announces the next pass, which then runs only once the tokens of the one under way are
        there."""
        return bool(self.submitted) and self.work.streamed_bytes > 0

    @property
    def num_under_way(self) -> int:
        return len(self.submitted)

    @on_own_device
    def submit(self, batch: Batch) -> None:
        """Enqueues a pass on all ranks; on rank 0. Raises UnpackedRows, and does nothing, if rows cannot be told to the
        others."""
        self.messages.say_batch(Kind.BATCH, batch)
        self._note_submitted(batch)
        self.worker.runner.submit(batch)
        self.times.foresee(batch.shape, self.work, self.rates)

    @on_own_device
    def announce(self, batch: Batch) -> None:
        """Says which pass may follow, for which all ranks prepare; on rank 0. If it is never run, the next message
        replaces it. Raises UnpackedRows as `submit` does."""
        self.messages.say_batch(Kind.ANNOUNCED, batch)
        self.worker.runner.prepare(batch)

    @on_own_device
    def run_announced(self, batch: Batch) -> None:
        """Enqueues on all ranks the pass that was announced last; on rank 0."""
        self._note_submitted(batch)
        self.messages.say_run()
        self.worker.runner.submit(batch)
        self.times.foresee(batch.shape, self.work, self.rates)

    def _note_submitted(self, batch: Batch) -> None:
        self.submitted.append(batch)
        self.times.submitted()

    @on_own_device
    def collect(self) -> tuple[Batch, SampleOutput | None]:
        """Waits for the tokens of the oldest pass under way; on rank 0."""
        with self.times.waiting():
            output = self.worker.runner.collect(self.times.expected_s)
        self.collectives.check()  # tokens of sums that were given up mean nothing
        self.times.ended(0 if output is None else len(output.tokens))
        return self.submitted.popleft(), output

    @on_own_device
    def rest(self) -> None:
        """Waits while the pass under way leaves the host more time than it needs to prepare the next one; on rank 0.
        Where weights stream it does not: what is announced is looked at again."""
        if self.submitted and not self.must_wait:
            with self.times.waiting():
                self.worker.runner.rest(self.times.leisure_s - SPARE_S)

    @on_own_device
    def forget(self) -> None:
        """Gives up the passes under way, after an error; on rank 0."""
        self.submitted.clear()
        self.times.forget()
        if self.worker is not None:  # closed, at the end of the process, while a daemon thread computed
            self.worker.runner.forget()

    @on_own_device
    def measure(self, link_bytes: int = LINK_BYTES) -> None:
        """Measures the rates on all ranks at once; on rank 0, between runs. Later predictions, and the plan's, use
        them. Rates that the config gives are kept: a whole profile, or the link. The link is measured over the copy
        lane's first `link_bytes`, or all of a pass's if they are fewer. The other ranks need not call it."""
        if self.topology.rank > 0:
            return self._answer_measure()
        keeps = self.config.device_profile is not None
        link_mib = KEEPS_RATES if keeps else -(-link_bytes // MIB)
        with self.together():
            self.messages.say_call(Call(MEASURE, argument=link_mib))
            self.rates = with_link(self._measure(link_mib), self.config.link_gb_s)
        self.plan = dataclasses.replace(self.plan, rates=self.rates)

    def _measure(self, link_mib: int) -> Rates:
        if link_mib == KEEPS_RATES:
            return self.rates
        return measure_engine(self.worker.runner, self.plan, self.work, link_mib * MIB)

    def _answer_measure(self) -> None:
        """Does the other ranks' part of `measure`, which only rank 0 begins."""
        with self.together():
            kind = self._await(MEASURE)
            refused = self.messages.exchange(Call(MEASURE)) if kind is Kind.CALL else ""
        if refused:
            raise ValueError(refused)
        if kind is Kind.STOP:
            raise RuntimeError("measure: rank 0 has closed its LLM")

    @property
    def ledger(self) -> TransferLedger:
        """The bytes that this rank has moved so far; a measurement of rates clears it."""
        return self.collectives.ledger

    @on_own_device
    def finish(self, outputs: Sequence[Output]) -> None:
        """Ends the run that the other ranks follow; on rank 0. Where callers made them follow, under torchrun, it gives
        them the outputs. `transfers` then has each rank's ledger, by rank."""
        read = outputs if self.launch.kind == "torchrun" else []
        self.transfers = self.messages.give_outputs(read, self._own_transfers())

    @on_own_device
    def follow(self) -> list[dict] | None:
        """Runs batches until rank 0 gives outputs, and returns these, or None when it says stop; on the other ranks."""
        kind = self._await(Kind.OUTPUTS)
        if kind is Kind.CALL:
            raise RuntimeError("rank 0 makes another call, and this rank is still in the last one")
        if kind is Kind.STOP:
            return None
        return self.messages.take_outputs(self._own_transfers())

    def _own_transfers(self) -> dict:
        return {"rank": self.topology.rank} | self.worker.transfers()

    def _await(self, awaited: Kind | str) -> Kind | str:
        """Does what rank 0 says, measures too, until that is `awaited`, STOP or a call that all ranks make, and returns
        which; on the other ranks."""
        runner = self.worker.runner
        while True:
            kind, told = self.messages.hear()
            if kind in (Kind.BATCH, Kind.RUN):
                runner.submit(told)
            elif kind is Kind.ANNOUNCED:
                runner.prepare(told)
            passes_go_on = kind in (Kind.BATCH, Kind.ANNOUNCED, Kind.RUN)
            while len(runner.under_way) > (self.lookahead if passes_go_on else 0):
                runner.collect()
            if kind is Kind.CALL and told.name == MEASURE:
                self._measure(told.argument)
                kind = MEASURE
            self.stopped |= kind is Kind.STOP
            if kind in (awaited, Kind.STOP, Kind.CALL):
                return kind
            if kind is Kind.OUTPUTS:
                raise RuntimeError("rank 0 ends a call in which this rank is not")

    def serve(self) -> None:
        """Runs a rank that makes no calls of its own: it follows until rank 0 says stop."""
        while self.follow() is not None:
            pass
        self.close()

    def close(self) -> None:
        """Frees everything and leaves the other ranks. Idempotent."""
        atexit.unregister(self.close)
        try:
            if self.worker is not None and self.launch.healthy and not self.failed:
                with self.launch.guard():
                    self._say_farewell()
        finally:
            self.worker = self.collectives = None
            self._undo.close()

    @on_own_device
    def _say_farewell(self) -> None:
        """Does what ranks still do together. Under torchrun each leaves when it likes, unless there is a trace to
        join."""
        joins = self.launch.kind == "torchrun" and self.trace is not None
        if self.leads or (joins and self.launch.rank == 0):
            self.messages.say(Kind.STOP)
        elif joins and not self.stopped and self._await(Kind.STOP) is Kind.CALL:
            self.messages.exchange(Call("close"))
            raise RuntimeError("this rank closes its LLM while rank 0 makes another call")
        if self.trace is not None:
            join_traces(self.config.trace, self.trace, self.plan, self.collectives)
