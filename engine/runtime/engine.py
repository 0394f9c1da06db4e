"""An Engine is one rank from its launch to its end: device, plan, checked source, group, worker, and rank 0's messages.

    rank 0   submit(batch): sends it and enqueues it   collect(): its tokens      finish(outputs)      close()
    others   follow(): runs the batches that arrive ------------------------------^ returns outputs    ^ or None

Under torchrun every rank makes the calls (`generate` and those of `Engine` that several ranks answer). They are
numbered: rank 0 says that one begins, all say what they were given (calls.py), and no rank runs a call that one of them
refuses.

A pass is prepared while the one before it runs, so that host and device work at the same time. Where nothing streams it
is enqueued at once. Where weights stream, a pass that turns out to be unneeded would cost too much: it is announced,
and runs once the tokens of the one before are there, while the wrapped copies are on the link.

Rank 0 decides and the others have no scheduler. Messages are packed int32, or JSON bytes; never pickle.
"""

import atexit
import contextlib
import dataclasses
import json
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from penstock.engine.compute.sampler import SampleOutput
from penstock.engine.config import EngineConfig
from penstock.engine.model.families import read_eos_token_ids
from penstock.engine.planning.device_profile import plan_rates
from penstock.engine.planning.engine_plan import EnginePlan, make_engine_plan, plain_plan
from penstock.engine.planning.find_model import find_model
from penstock.engine.planning.memory_claims import DeviceMemory
from penstock.engine.planning.predictions import pass_work
from penstock.engine.runtime.build import Worker, open_source
from penstock.engine.runtime.calls import Call, config_objection, objection, pack_config
from penstock.engine.runtime.probe import measure_engine
from penstock.engine.runtime.trace import join_traces
from penstock.engine.user_files import check_output
from penstock.engine.weights.blocks import WeightSource
from penstock.engine.weights.checkpoint import Checkpoint
from penstock.engine.weights.read_model import read_model
from penstock.parallel.collectives import Collectives
from penstock.parallel.launch import Launch
from penstock.parallel.ledger import TransferLedger
from penstock.parallel.rendezvous import connect, meet
from penstock.parallel.topology import bind_to_numa, device_name, resolve_topology
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import Rates, predict_pass, with_link
from penstock.scheduler.residency.compression_choice import CompressionDoesNotPay
from penstock.scheduler.units import MIB

BATCH, ANNOUNCED, RUN, OUTPUTS, MEASURE, STOP, CALL = range(1, 8)
LEAST_CONTEXT_BYTES = 400 * MIB  # of a CUDA context, before any kernel is loaded
LINK_BYTES = 2048 * MIB  # that the probe copies in one go: long enough that all ranks copy at once


@dataclass
class PassTimes:
    """Seconds that rank 0's passes took, and that the time model predicted. Each pass is appended to `passes` if a list
    was put there; it grows for as long as the engine runs."""

    num_passes: int = 0
    measured_s: float = 0.0
    predicted_s: float = 0.0
    passes: list[tuple[PassShape, float, float]] | None = None  # shape, measured, predicted

    def add(self, shape: PassShape, measured_s: float, predicted_s: float) -> None:
        self.num_passes += 1
        self.measured_s += measured_s
        self.predicted_s += predicted_s
        if self.passes is not None:
            self.passes.append((shape, measured_s, predicted_s))


class Engine:
    """One running rank. Raises ValueError for a user's mistakes, before anything is allocated or launched."""

    def __init__(self, config: EngineConfig, launch: Launch):
        self.config, self.launch = config, launch
        self.collectives = self.worker = None
        self.failed = False
        try:
            with launch.guard():
                refused = self._start()
        except BaseException:
            self.failed = True
            self.close()
            raise
        if refused:
            self.close()
            raise ValueError(refused)
        atexit.register(self.close)  # later than the collectives' own, so before it
        self.num_calls = 0
        self.stopped = False  # rank 0 has said so
        self.times = PassTimes()
        self.transfers: list[dict] = []
        self.work: PassWork = pass_work(self.plan)
        self.rates = self.plan.rates
        self.submitted: deque[tuple[Batch, float]] = deque()  # passes under way, and when each was submitted
        self.collected_s = 0.0

    def _start(self) -> str:
        """Starts this rank, on rank 0 with the plan. Under torchrun ranks meet first, so that each hears why another
        one does not go on. Returns why they cannot run together, the same on all ranks; empty if they can."""
        config, launch = self.config, self.launch
        if launch.kind == "torchrun":
            meet(launch)
        self.topology = resolve_topology(
            launch.rank, launch.tp_size, launch.local_rank, config.device, launch.num_local_ranks
        )
        prepared = None
        if launch.rank == 0:
            device = self.topology.device
            rates = plan_rates(config, launch.tp_size, device.type, device_name(device))
            self.planned_memory = device_memory(device)
            prepared = self._prepare(self.planned_memory, rates)
            if config.trace:
                check_output("--trace", config.trace)
            launch.start(json.dumps(config.to_dict()))
        return self._join(prepared)

    def _join(self, prepared: tuple[EnginePlan, WeightSource] | None) -> str:
        """Meets the other ranks and loads. `prepared` is rank 0's; the others plan with what it tells them, and all
        with the least memory of any. Returns what _start does."""
        launch, topology = self.launch, self.topology
        own = self.planned_memory if prepared else device_memory(topology.device)  # without the ranks' own buffers
        self.collectives = connect(topology, launch)
        memory = least_memory(own, self.collectives)
        if launch.kind == "torchrun":
            frames = self.collectives.share_frames(pack_config(self.config))
            if refused := config_objection(frames):
                return refused
        agreed = None
        if prepared:
            rates = dataclasses.asdict(prepared[0].rates)
            agreed = json.dumps({"max_num_seqs": self.config.max_num_seqs, "rates": rates}).encode()
        told = json.loads(self.collectives.broadcast_bytes(agreed))
        if prepared:
            plan, source = prepared
            if memory != self.planned_memory:
                plan = self._plan(memory, plan.rates)
        else:
            self.config = dataclasses.replace(self.config, max_num_seqs=told["max_num_seqs"])  # rank 0 knows the job
            plan, source = self._prepare(memory, Rates(**told["rates"]))
        bind_to_numa(topology)
        try:
            self.worker = Worker(self.config, plan, source, topology, self.collectives)
        except CompressionDoesNotPay as error:  # on all ranks alike
            if launch.rank == 0:
                warnings.warn(f"{error}; loading them again, plain", stacklevel=2)
            self.worker = Worker(self.config, plain_plan(plan), source, topology, self.collectives)
        self.plan: EnginePlan = self.worker.plan
        if isinstance(source, Checkpoint):
            source.close()
        self.collectives.barrier()
        return ""

    def begin(self, call: Call) -> None:
        """Lets ranks agree on a call of LLM before it runs under torchrun. Raises ValueError, the same on all ranks, if
        one of them refuses it or makes another call. With other launchers it does nothing."""
        if self.launch.kind != "torchrun":
            return
        self.num_calls += 1
        with self.together():
            if self.launch.rank == 0:
                self.collectives.broadcast_ints([CALL])
            elif self._await(CALL) == STOP:
                raise RuntimeError(f"call {self.num_calls} ({call.name}): rank 0 has closed its LLM")
            refused = self._exchange(call)
        if refused:
            raise ValueError(refused)

    def _exchange(self, call: Call) -> str:
        """Tells all ranks this rank's call. Returns why they cannot run it, the same on all ranks; empty if they can.
        Calls are numbered from rank 0's number on."""
        frames = self.collectives.share_frames(dataclasses.replace(call, number=self.num_calls).pack())
        calls = [Call.unpack(frame) for frame in frames]
        self.num_calls = calls[0].number
        return objection(calls)

    def _answer_measure(self) -> None:
        """Does the other ranks' part of `measure`, which only rank 0 begins."""
        with self.together():
            kind = self._await(MEASURE)
            refused = self._exchange(Call("measure")) if kind == CALL else ""
        if refused:
            raise ValueError(refused)
        if kind == STOP:
            raise RuntimeError("measure: rank 0 has closed its LLM")

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

    def _prepare(self, memory: DeviceMemory | None, rates: Rates) -> tuple[EnginePlan, WeightSource]:
        """Makes the plan and checks the source: mistakes in config, model and checkpoint are found here."""
        path = find_model(self.config.model)
        if path.is_file() and self.config.load_format != "dummy":
            where = "give the checkpoint's directory (a config.json is enough with load_format='dummy')"
            raise ValueError(f"model={self.config.model!r} is a file: {where}")
        self.model = read_model(path, dummy=self.config.load_format == "dummy")
        self.eos_token_ids = read_eos_token_ids(path, self.model.spec)
        plan = self._plan(memory, rates)
        source = open_source(self.config, path, plan, self.topology.device)
        self.planned_at_s = time.perf_counter()
        return plan, source

    def _plan(self, memory: DeviceMemory | None, rates: Rates) -> EnginePlan:
        return make_engine_plan(self.config, self.model.spec, self.topology.tp_size, memory, rates, self.model.notes)

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
        self.submitted.append((batch, time.perf_counter()))
        self.collectives.broadcast_ints([BATCH, *batch.pack()])
        self.worker.executor.submit(batch)

    def announce(self, batch: Batch) -> None:
        """Sends a pass that may follow; on rank 0. If it is never run, the next message replaces it."""
        self.collectives.broadcast_ints([ANNOUNCED, *batch.pack()])

    def run_announced(self, batch: Batch) -> None:
        """Enqueues on all ranks the pass that was announced last; on rank 0."""
        self.submitted.append((batch, time.perf_counter()))
        self.collectives.broadcast_ints([RUN])
        self.worker.executor.submit(batch)

    def collect(self) -> tuple[Batch, SampleOutput | None]:
        """Waits for the tokens of the oldest pass under way; on rank 0. The time of a pass begins when it was
        submitted, or when the pass before it ended, if that was later."""
        output = self.worker.executor.collect()
        self.collectives.check()  # tokens of sums that were given up mean nothing
        batch, start_s = self.submitted.popleft()
        now_s = time.perf_counter()
        measured_s = now_s - max(start_s, self.collected_s)
        self.collected_s = now_s
        self.times.add(batch.shape, measured_s, predict_pass(self.work, batch.shape, self.rates).total_s)
        return batch, output

    def forget(self) -> None:
        """Gives up the passes under way, after an error; on rank 0."""
        self.submitted.clear()
        if self.worker is not None:  # closed, at the end of the process, while a daemon thread computed
            self.worker.executor.forget()

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
            self.collectives.broadcast_ints([MEASURE, link_mib])
            self.rates = with_link(self._measure(link_mib), self.config.link_gb_s)
        self.plan = dataclasses.replace(self.plan, rates=self.rates)

    def _measure(self, link_mib: int) -> Rates:
        return measure_engine(self.worker.executor, self.plan, self.work, self.topology.device, link_mib * MIB)

    @property
    def ledger(self) -> TransferLedger:
        """The bytes that this rank has moved so far; a measurement of rates clears it."""
        return self.collectives.ledger

    def finish(self, outputs: list[dict]) -> None:
        """Ends the run that the other ranks follow and gives them the outputs; on rank 0. `transfers` then has each
        rank's ledger, by rank."""
        self.collectives.broadcast_ints([OUTPUTS])
        self.collectives.broadcast_bytes(json.dumps(outputs).encode())
        self.transfers = [json.loads(data) for data in self._gather_transfers()]

    def _gather_transfers(self) -> list[bytes] | None:
        """Sends every rank's ledger to rank 0; on all ranks together."""
        return self.collectives.gather_bytes(json.dumps(self.own_transfers()).encode())

    def own_transfers(self) -> dict[str, Any]:
        """This rank's ledger for JSON: the weights that were copied, by group, and the all-reduces, by step."""
        executor = self.worker.executor
        parts = {"weights": executor.copied.to_dict(), "all_reduces": executor.reduced.to_dict()}
        return {"rank": self.topology.rank} | parts

    def follow(self) -> list[dict] | None:
        """Runs batches until rank 0 gives outputs, and returns these, or None when it says stop; on the other ranks."""
        if self._await(OUTPUTS) == STOP:
            return None
        outputs = json.loads(self.collectives.broadcast_bytes(None))
        self._gather_transfers()
        return outputs

    def _await(self, awaited: int) -> int:
        """Does what rank 0 says until that is `awaited`, STOP or CALL, and returns which; on the other ranks."""
        executor, batch = self.worker.executor, None
        while True:
            kind, *message = self.collectives.broadcast_ints(None)
            if kind in (BATCH, ANNOUNCED):
                batch = Batch.unpack(message)
            if kind in (BATCH, RUN):
                executor.submit(batch)
            while len(executor.under_way) > (self.lookahead if kind in (BATCH, ANNOUNCED, RUN) else 0):
                executor.collect()
            if kind == MEASURE:
                self._measure(*message)
            self.stopped |= kind == STOP
            if kind in (awaited, STOP, CALL):
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
                    self._say_farewell(worker)
        finally:
            self.worker = self.collectives = None
            with self.launch.leaving():
                if worker is not None:
                    worker.close()
                if collectives is not None:
                    collectives.close() if self.launch.healthy and not self.failed else collectives.abandon()
            self.launch.close()

    def _say_farewell(self, worker: Worker) -> None:
        """Does what ranks still do together. Under torchrun each leaves when it likes, unless there is a trace to
        join."""
        joins = self.launch.kind == "torchrun" and self.config.trace
        if self.launch.kind == "parent" or (joins and self.launch.rank == 0):
            self.collectives.broadcast_ints([STOP])
        elif joins and not self.stopped and self._await(STOP) == CALL:
            self._exchange(Call("close"))
            raise RuntimeError("this rank closes its LLM while rank 0 makes another call")
        if self.config.trace:
            join_traces(self.config.trace, worker.tracer, self.plan, self.collectives)


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a GPU, None for a CPU. Memory that this process holds unused, and its context, count as free."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return DeviceMemory(total, min(total, free + cached + LEAST_CONTEXT_BYTES))


def least_memory(own: DeviceMemory | None, collectives: Collectives) -> DeviceMemory | None:
    """The smallest memory of all ranks, which must call this together."""
    if own is None:
        return None
    total, free = collectives.largest([-own.total_bytes, -own.free_bytes])
    return DeviceMemory(-total, -free)
