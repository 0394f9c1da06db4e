"""An Engine is one rank from its launch to its end: device, plan, group, worker, and what rank 0 says to the others.

    rank 0   submit(batch): says it and enqueues it    collect(): its tokens      finish(outputs)      close()
    others   follow(): runs the batches that arrive ------------------------------^ returns outputs    ^ or None

A pass is prepared while the one before it runs, so that host and device work at the same time. Where nothing streams it
is enqueued at once. Where weights stream, a pass that turns out to be unneeded would cost too much: it is announced,
and runs once the tokens of the one before are there, while the wrapped copies are on the link.

Rank 0 decides and the others have no scheduler. What they say to each other is protocol.py's.
"""

import atexit
import contextlib
import dataclasses
import json
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from penstock.engine.compute.sampler import SampleOutput
from penstock.engine.config import EngineConfig
from penstock.engine.planning.decision import Decision
from penstock.engine.planning.device_profile import plan_rates
from penstock.engine.planning.engine_plan import EnginePlan, plain_plan
from penstock.engine.planning.predictions import pass_work
from penstock.engine.runtime.build import Builder, Worker, build_worker
from penstock.engine.runtime.calls import Call
from penstock.engine.runtime.pass_times import PassTimes
from penstock.engine.runtime.probe import measure_engine
from penstock.engine.runtime.protocol import Kind, Messages, Output
from penstock.engine.runtime.start import (
    ModelFiles,
    compare_configs,
    device_memory,
    least_memory,
    open_source,
    plan_model,
    read_files,
)
from penstock.engine.runtime.trace import Trace, join_traces
from penstock.engine.runtime.watch import Watch, Watches, load_watch
from penstock.engine.user_files import check_output
from penstock.engine.weights.blocks import WeightSource
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.parallel.launch import Launch
from penstock.parallel.ledger import TransferLedger
from penstock.parallel.rendezvous import connect, meet
from penstock.parallel.topology import bind_to_numa, device_name, resolve_topology
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.cost.time_model import Rates, with_link
from penstock.scheduler.residency.compression_choice import CompressionDoesNotPay
from penstock.scheduler.units import MIB

LINK_BYTES = 2048 * MIB  # that the probe copies in one go: long enough that all ranks copy at once
Build = Callable[[Builder, WeightSource], Worker]


class Engine:
    """One running rank; `build` makes what it computes with. Raises ValueError for a user's mistakes, before anything
    is allocated or launched."""

    def __init__(self, config: EngineConfig, launch: Launch, build: Build = build_worker):
        self.config, self.launch = config, launch
        self.collectives = self.worker = None
        self.failed = False
        try:
            with launch.guard():
                refused = self._start(build)
        except BaseException:
            self.failed = True
            self.close()
            raise
        if refused:
            self.close()
            raise ValueError(refused)
        atexit.register(self.close)  # later than the collectives' own, so before it
        self.messages = Messages(self.collectives)
        self.stopped = False  # rank 0 has said so
        self.times = PassTimes()
        self.transfers: list[dict] = []
        self.work, self.rates = pass_work(self.plan), self.plan.rates
        self.submitted: deque[Batch] = deque()  # passes under way

    def _start(self, build: Build) -> str:
        """Starts this rank. Under torchrun ranks meet first, so that each hears why another one does not go on. Returns
        why they cannot run together, the same on all ranks; empty if they can."""
        config, launch = self.config, self.launch
        if launch.kind == "torchrun":
            meet(launch)
        self.topology = resolve_topology(
            launch.rank, launch.tp_size, launch.local_rank, config.device, launch.num_local_ranks
        )
        device = self.topology.device
        self.trace = Trace(device) if config.trace else None
        own_watch = load_watch(config.debug.watch) if config.debug.watch else None
        self.watches = Watches(*filter(None, [self.trace, own_watch]))
        own_memory, plan = device_memory(device), None  # before the ranks' own buffers
        if launch.rank == 0:
            files = read_files(config)
            rates = plan_rates(config, launch.tp_size, device.type, device_name(device))
            plan = plan_model(config, files, launch.tp_size, own_memory, rates)
            source = open_source(config, files.path, plan)
            if config.trace:
                check_output("--trace", config.trace)
            launch.start(json.dumps(config.to_dict()))
        self.collectives = connect(self.topology, launch)
        memory = least_memory(own_memory, self.collectives)
        if launch.kind == "torchrun" and (refused := compare_configs(config, self.collectives)):
            return refused
        if launch.rank > 0:
            files = read_files(config)
        elif memory != own_memory:
            plan = plan_model(config, files, launch.tp_size, memory, plan.rates)

        def share(plan: EnginePlan | None) -> EnginePlan:
            return self._share(plan, files, memory)

        plan = share(plan)
        if launch.rank > 0:
            source = open_source(config, files.path, plan)
        self.eos_token_ids, self.planned_at_s = files.eos_token_ids, time.perf_counter()
        self._load(build, plan, source, share)
        return ""

    def _share(self, plan: EnginePlan | None, files: ModelFiles, memory) -> EnginePlan:
        """Rank 0's plan on all ranks; None on the others, which are told what it decided."""
        told = self.collectives.broadcast_bytes(None if plan is None else plan.decision.pack())
        if plan is not None:
            return plan
        decision = Decision.unpack(told)
        self.config = decision.as_told(self.config)
        return plan_model(self.config, files, self.topology.tp_size, memory, decision.rates, decision)

    def _load(self, build: Build, plan: EnginePlan, source: WeightSource, share: Callable) -> None:
        """Loads the weights; a second time, plain, where they turn out not to be worth compressing."""
        bind_to_numa(self.topology)

        def builder(plan: EnginePlan) -> Builder:
            return Builder(self.config, plan, self.topology, self.collectives, self.watches)

        try:
            self.worker = build(builder(plan), source)
        except CompressionDoesNotPay as error:  # on all ranks alike
            if self.launch.rank == 0:
                warnings.warn(f"{error}; loading them again, plain", stacklevel=2)
            self.worker = build(builder(share(plain_plan(plan) if self.launch.rank == 0 else None)), source)
        self.plan: EnginePlan = self.worker.plan
        if isinstance(source, Checkpoint):
            source.close()
        self.collectives.barrier()

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
        """A context in which `watch` sees every pass of this rank."""
        return self.watches.with_one_more(watch)

    def begin(self, call: Call) -> None:
        """Lets ranks agree on a call of LLM before it runs under torchrun. Raises ValueError, the same on all ranks, if
        one of them refuses it or makes another call. With other launchers it does nothing."""
        if self.launch.kind != "torchrun":
            return
        self.messages.num_calls += 1
        with self.together():
            if self.launch.rank == 0:
                self.messages.say(Kind.CALL)
            elif self._await(Kind.CALL) is Kind.STOP:
                raise RuntimeError(f"call {self.messages.num_calls} ({call.name}): rank 0 has closed its LLM")
            refused = self.messages.exchange(call)
        if refused:
            raise ValueError(refused)

    @property
    def lookahead(self) -> int:
        """The number of passes that may be under way when one more is prepared. (On a CPU a submitted pass has run.)"""
        return 1 if self.topology.device.type == "cuda" else 0

    @property
    def must_wait(self) -> bool:
        """Whether rank 0 announces the next pass, which then runs only once the tokens of the one under way are
        there."""
        return bool(self.submitted) and self.work.streamed_bytes > 0

    @property
    def num_under_way(self) -> int:
        return len(self.submitted)

    def submit(self, batch: Batch) -> None:
        """Enqueues a pass on all ranks; on rank 0."""
        self._note_submitted(batch)
        self.messages.say_batch(Kind.BATCH, batch)
        self.worker.runner.submit(batch)

    def announce(self, batch: Batch) -> None:
        """Says which pass may follow; on rank 0. If it is never run, the next message replaces it."""
        self.messages.say_batch(Kind.ANNOUNCED, batch)

    def run_announced(self, batch: Batch) -> None:
        """Enqueues on all ranks the pass that was announced last; on rank 0."""
        self._note_submitted(batch)
        self.messages.say_run()
        self.worker.runner.submit(batch)

    def _note_submitted(self, batch: Batch) -> None:
        self.submitted.append(batch)
        self.times.submitted()

    def collect(self) -> tuple[Batch, SampleOutput | None]:
        """Waits for the tokens of the oldest pass under way; on rank 0."""
        output = self.worker.runner.collect()
        self.collectives.check()  # tokens of sums that were given up mean nothing
        batch = self.submitted.popleft()
        self.times.ended(batch.shape, self.work, self.rates)
        return batch, output

    def forget(self) -> None:
        """Gives up the passes under way, after an error; on rank 0."""
        self.submitted.clear()
        self.times.forget()
        if self.worker is not None:  # closed, at the end of the process, while a daemon thread computed
            self.worker.runner.forget()

    def measure(self, link_bytes: int = LINK_BYTES) -> None:
        """Measures the rates on all ranks at once; on rank 0, between runs. Later predictions, and the plan's, use
        them. Rates that the config gives are kept: a whole profile, or the link. The link is measured over the copy
        lane's first `link_bytes`, or all of a pass's if they are fewer. The other ranks need not call it."""
        if self.config.device_profile is not None:
            return
        if self.topology.rank > 0:
            return self._answer_measure()
        link_mib = -(-link_bytes // MIB)  # messages are int32
        with self.together():
            self.messages.say(Kind.MEASURE, link_mib)
            self.rates = with_link(self._measure(link_mib), self.config.link_gb_s)
        self.plan = dataclasses.replace(self.plan, rates=self.rates)

    def _measure(self, link_mib: int) -> Rates:
        return measure_engine(self.worker.runner, self.plan, self.work, link_mib * MIB)

    def _answer_measure(self) -> None:
        """Does the other ranks' part of `measure`, which only rank 0 begins."""
        with self.together():
            kind = self._await(Kind.MEASURE)
            refused = self.messages.exchange(Call("measure")) if kind is Kind.CALL else ""
        if refused:
            raise ValueError(refused)
        if kind is Kind.STOP:
            raise RuntimeError("measure: rank 0 has closed its LLM")

    @property
    def ledger(self) -> TransferLedger:
        """The bytes that this rank has moved so far; a measurement of rates clears it."""
        return self.collectives.ledger

    def finish(self, outputs: Sequence[Output]) -> None:
        """Ends the run that the other ranks follow and gives them the outputs; on rank 0. `transfers` then has each
        rank's ledger, by rank."""
        self.transfers = self.messages.give_outputs(outputs, self._own_transfers())

    def follow(self) -> list[dict] | None:
        """Runs batches until rank 0 gives outputs, and returns these, or None when it says stop; on the other ranks."""
        if self._await(Kind.OUTPUTS) is Kind.STOP:
            return None
        return self.messages.take_outputs(self._own_transfers())

    def _own_transfers(self) -> dict:
        return {"rank": self.topology.rank} | self.worker.transfers()

    def _await(self, awaited: Kind) -> Kind:
        """Does what rank 0 says until that is `awaited`, STOP or CALL, and returns which; on the other ranks."""
        runner = self.worker.runner
        while True:
            kind, told = self.messages.hear()
            if kind in (Kind.BATCH, Kind.RUN):
                runner.submit(told)
            passes_go_on = kind in (Kind.BATCH, Kind.ANNOUNCED, Kind.RUN)
            while len(runner.under_way) > (self.lookahead if passes_go_on else 0):
                runner.collect()
            if kind is Kind.MEASURE:
                self._measure(told)
            self.stopped |= kind is Kind.STOP
            if kind in (awaited, Kind.STOP, Kind.CALL):
                return kind

    def serve(self) -> None:
        """Runs a self-launched rank: it follows until rank 0 says stop."""
        while self.follow() is not None:
            pass
        self.close()

    def close(self) -> None:
        """Frees everything and leaves the group, in an order that cannot hang. Idempotent."""
        atexit.unregister(self.close)
        worker, collectives = self.worker, self.collectives
        try:
            if worker is not None and self.launch.healthy and not self.failed:
                with self.launch.guard():
                    self._say_farewell()
        finally:
            self.worker = self.collectives = None
            with self.launch.leaving():
                if worker is not None:
                    worker.close()
                if collectives is not None:
                    collectives.close() if self.launch.healthy and not self.failed else collectives.abandon()
            self.launch.close()

    def _say_farewell(self) -> None:
        """Does what ranks still do together. Under torchrun each leaves when it likes, unless there is a trace to
        join."""
        joins = self.launch.kind == "torchrun" and self.trace is not None
        if self.launch.kind == "parent" or (joins and self.launch.rank == 0):
            self.messages.say(Kind.STOP)
        elif joins and not self.stopped and self._await(Kind.STOP) is Kind.CALL:
            self.messages.exchange(Call("close"))
            raise RuntimeError("this rank closes its LLM while rank 0 makes another call")
        if self.trace is not None:
            join_traces(self.config.trace, self.trace, self.plan, self.collectives)
