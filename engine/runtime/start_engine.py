"""Starts an Engine: this rank plans, meets the others, agrees with them, loads and builds, and makes the Engine of what
it has then. After an error nothing is left: what was made by then is undone, the last first.
"""

import contextlib
import json
import time
import warnings
from collections.abc import Callable

from penstock.engine.config import EngineConfig
from penstock.engine.runtime.binding import bound_to
from penstock.engine.runtime.build import Ingredients, Worker, build_worker
from penstock.engine.runtime.engine import Engine
from penstock.engine.runtime.start import Start
from penstock.engine.runtime.trace import Trace
from penstock.engine.runtime.watch import Watches, load_watch
from penstock.engine.user_files import check_output
from penstock.engine.weights.blocks import WeightSource
from penstock.parallel.collectives import Collectives
from penstock.parallel.launch import Launch
from penstock.parallel.rendezvous import connect
from penstock.parallel.topology import bind_to_numa
from penstock.scheduler.residency.compression_choice import CompressionDoesNotPay

Build = Callable[[Ingredients, WeightSource], Worker]


def start_engine(config: EngineConfig, launch: Launch, build: Build = build_worker) -> Engine:
    """Starts this rank; `build` makes what it computes with. Raises ValueError for a user's mistakes, before anything
    is allocated or launched, or where ranks were configured differently, on all of them alike."""
    with contextlib.ExitStack() as undo:
        undo.callback(launch.close)
        with launch.guard(), contextlib.closing(Start(config, launch)) as start, bound_to(start.topology.device):
            if launch.rank == 0:
                prepare(start)
            trace = Trace(start.topology.device) if config.trace else None
            watches = open_watches(config, trace)
            collectives = join(start, undo)
            refused, planned_at_s = start.agree(collectives), time.perf_counter()
            worker = None if refused else load(start, collectives, watches, build, undo)
        if refused:  # outside of the guard: no rank has failed
            raise ValueError(refused)
        return Engine(
            config=start.config,
            launch=launch,
            topology=start.topology,
            collectives=collectives,
            watches=watches,
            trace=trace,
            worker=worker,
            eos_token_ids=start.files.eos_token_ids,
            planned_at_s=planned_at_s,
            undo=undo,
        )


def prepare(start: Start) -> None:
    """Finds the mistakes of a user; on rank 0."""
    start.prepare()
    if start.config.trace:
        check_output("--trace", start.config.trace)


def open_watches(config: EngineConfig, trace: Trace | None) -> Watches:
    """All that watch this rank's passes from its start."""
    own = None if config.debug.watch is None else load_watch(config.debug.watch)
    return Watches(*filter(None, [trace, own]))


def join(start: Start, undo: contextlib.ExitStack) -> Collectives:
    """Launches the other ranks, if that is this one's to do, and meets them."""
    launch = start.launch
    if launch.rank == 0:
        launch.start(json.dumps(start.config.to_dict()))
    collectives = connect(start.topology, launch)
    undo.callback(leave, launch, collectives)
    return collectives


def leave(launch: Launch, collectives: Collectives) -> None:
    """Leaves the group, with the other ranks if they still follow, and without them if not."""
    with launch.leaving():
        collectives.close() if launch.healthy else collectives.abandon()


def load(start: Start, collectives: Collectives, watches: Watches, build: Build, undo: contextlib.ExitStack) -> Worker:
    """Loads and builds what was planned; returns when all ranks have. A second time, plain, where the weights turn out
    not to be worth compressing."""

    def ingredients() -> Ingredients:
        ranks_on_host = start.launch.ranks_on_host
        return Ingredients(start.config, start.plan, start.topology, collectives, watches, ranks_on_host)

    bind_to_numa(start.topology)
    try:
        worker = build(ingredients(), start.source)
    except CompressionDoesNotPay as error:  # on all ranks alike
        if start.launch.rank == 0:
            warnings.warn(f"{error}; loading them again, plain", stacklevel=2)
        start.plan_plain(collectives)
        worker = build(ingredients(), start.source)
    undo.callback(close_worker, start.launch, worker)
    collectives.barrier()
    return worker


def close_worker(launch: Launch, worker: Worker) -> None:
    """Frees what a rank computes with, which may wait for a pass that other ranks never end."""
    with launch.leaving():
        worker.close()
