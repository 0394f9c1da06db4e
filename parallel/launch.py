"""Three ways into a group of ranks, all of which give a `Launch`.

    torchrun               the environment says who this process is
    one rank               nothing to start, nothing to meet
    N ranks, no torchrun   this process is rank 0 and starts the others itself (children.py), as subprocesses
                           with torchrun's environment: no pickle, no re-import of the user's main

Whatever goes wrong, the user sees the rank that failed first, and no process stays behind.
This file does not know what the ranks do, nor what the message to them means.
"""

import contextlib
import importlib.util
import os
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from penstock.parallel.children import EXIT_STATUS_S, Children
from penstock.parallel.failure import (
    LAUNCHER_WAIT_S,
    SELF_LAUNCHED,
    PeerLost,
    RankFailed,
    exit_with_parent,
    run_rank,
    wait_for_launcher,
)
from penstock.parallel.guard import Guard
from penstock.parallel.interfaces import check_interfaces
from penstock.parallel.processes import Process, host_id
from penstock.parallel.pulse import Pulse
from penstock.parallel.watch import Know, watch

__all__ = ["Launch", "PeerLost", "RankFailed", "exit_with_parent", "resolve_launch", "run_rank"]

# -P lets the child import what this process runs, whatever lies in the working directory.
WORKER_COMMAND = (sys.executable, "-P", "-m", "penstock", "worker")
_REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LEFT = "has left: its LLM was closed"
_POLL_S = 0.02


@dataclass
class Launch:
    """The position of this process among the ranks and, on rank 0 of a self-launch, its children.

    `kind` is solo, torchrun, parent (rank 0 of a self-launch) or child. `num_local_ranks` is how many the launcher
    started beside each other, which share the GPUs that they see; torchrun may have several such groups on one host.
    Only a parent has a `listener`, the bound socket where ranks meet; `store` is the store where they have met
    (rendezvous.py). Every kind may call every method; only a parent starts and ends processes.
    """

    kind: str
    rank: int = 0
    tp_size: int = 1
    local_rank: int = 0
    num_local_ranks: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    listener: socket.socket | None = None
    store: object | None = field(default=None, repr=False, compare=False)
    hosts: tuple[str, ...] = field(default=(), repr=False, compare=False)  # by rank, once the ranks have met
    _failed: bool = field(default=False, repr=False, compare=False)
    _pulse: Pulse | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        self._guard = Guard(LAUNCHER_WAIT_S if self.kind == "torchrun" else 0.0)
        self._children = Children(self._guard.fail)
        self.on_failure(self._children.kill)

    def start(self, message: str, command: tuple[str, ...] | list[str] = WORKER_COMMAND) -> None:
        """Starts the other ranks of a self-launch, each with `message` (one line) on its stdin.

        Raises ValueError, naming MASTER_PORT, if the user chose a port that is in use, and what check_interfaces
        raises; no child runs then.
        """
        if self.kind != "parent":
            return
        assert "\n" not in message
        check_interfaces()
        self.listener = _listen(os.environ.get("MASTER_PORT", "0"))
        self.master_port = self.listener.getsockname()[1]
        try:
            for rank in range(1, self.tp_size):
                self._children.start(rank, list(command), self._child_environment(rank), message)
        except BaseException:
            self.abort()
            raise
        self._children.watch()

    def of_size(self, tensor_parallel_size: int | None) -> "Launch":
        """Returns the launch of that many ranks: this one (also for None), or for a single process that of a parent.

        Raises ValueError if torchrun started another number.
        """
        if tensor_parallel_size in (None, self.tp_size):
            return self
        if self.kind != "solo":
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size}, but torchrun started WORLD_SIZE={self.tp_size} ranks"
            )
        return Launch("parent", tp_size=tensor_parallel_size, num_local_ranks=tensor_parallel_size)

    @property
    def ranks_on_host(self) -> int:
        """The number of ranks on this host, with which this one shares its memory. Under torchrun it is known once the
        ranks have met; all that Penstock launches itself are on one host."""
        return Counter(self.hosts)[self.hosts[self.rank]] if self.hosts else self.tp_size

    @property
    def most_ranks_on_a_host(self) -> int:
        """The largest such number of any host: the same on all ranks."""
        return max(Counter(self.hosts).values()) if self.hosts else self.tp_size

    @contextlib.contextmanager
    def watching(self) -> Iterator[Know]:
        """A context around the meeting, in which a stopped rank is found though nobody hears a pulse yet. It gives a
        function that is to be told each rank's process, once that is known."""
        with watch(self._guard.fail) as know:
            if self.kind == "child":
                know(0, Process(host_id(), os.getppid()))
            yield know

    def met_in(self, store: object) -> None:
        """Keeps the store in which the ranks have met."""
        self.store = store

    def hear(self, processes: list[Process], share: Callable[[str | None], str], addresses: list[str]) -> None:
        """Starts this rank's pulse, from which each rank hears whether the others live. All ranks call it; once it
        returns on rank 0, all hear rank 0. `processes` are those of the ranks, by rank. `share` passes rank 0's
        argument to all ranks and returns it. `addresses` are those of rank 0; there are none where all ranks share a
        host."""
        self.hosts = tuple(one.host for one in processes)
        self._pulse = Pulse(self.rank, processes, self._suspect)
        if self.rank > 0:
            self._pulse.join(share(None))
            return
        share(self._pulse.host(addresses))
        while not self._pulse.is_whole:
            self.check()
            time.sleep(_POLL_S)

    @contextlib.contextmanager
    def guard(self, own: bool = False) -> Iterator[None]:
        """A context for all that ranks do together, from `start` to the shutdown message.

        It raises RankFailed instead of PeerLost, on entry too, and instead of any other error that another rank's
        failure brings about here. Any exception in it, this rank's own too, is told to the other ranks and ends them,
        since the ranks no longer agree on what comes next. So check a user's input before you enter, and never yield
        from a generator in here (GeneratorExit is an exception too). With `own` an exception of this rank stays what it
        is, even if another rank has failed as well. If another rank fails, this thread is brought out (guard.py).
        """
        try:
            with self._guard.inside():
                self.check()
                yield
        except PeerLost as error:
            raise self.explain(error) from None
        except BaseException as error:
            self.give_up(error)
            if isinstance(error, Exception) and (failure := self._guard.wait(0)) and not own:
                raise failure from None  # the error follows from it: an interrupt may have become another exception
            raise

    def leaving(self) -> contextlib.AbstractContextManager[None]:
        """A context for leaving the group, and for what frees what it held: after a failure it cannot hang, and is not
        interrupted. This thread comes out of `guard` for good."""
        return self._guard.leaving()

    def on_failure(self, action: Callable[[], None]) -> None:
        """Adds an action that another thread runs as soon as another rank has failed, so that nothing waits for that
        rank."""
        self._guard.on_failure(action)

    def check(self) -> None:
        """Raises RankFailed if another rank has failed, RuntimeError if an earlier error has ended the others."""
        self._guard.check()
        if self._failed:
            raise RuntimeError("the other ranks were ended after an earlier error")

    @property
    def healthy(self) -> bool:
        """Tells whether the other ranks, as far as this one knows, still follow, and no other thread works with
        them."""
        return self._guard.failure is None and not self._failed and not self._guard.busy

    def explain(self, error: PeerLost) -> Exception:
        """Returns the error to raise for a lost peer: RankFailed with its exit status and traceback, if they become
        known in time, else `error`.

        Under torchrun it waits LAUNCHER_WAIT_S first: torchrun may have seen the failure too, and then ends this
        process.
        """
        if self.tp_size == 1:
            return error
        failure = self._guard.wait(EXIT_STATUS_S) or self._children.early()
        if failure is None and self._pulse is not None and self._pulse.left:
            failure = RankFailed(min(self._pulse.left), LEFT)
        self.give_up(failure or error)
        if self.kind == "torchrun" and not (failure and failure.stopped):
            self._guard.come_out()  # else the wait would be taken for one without an end
            wait_for_launcher()
        return failure or error

    def give_up(self, error: BaseException) -> None:
        """Tells the other ranks why this one no longer follows, and ends the children. Idempotent."""
        if self.tp_size > 1 and not self._failed:
            self._failed = True
            if self._pulse is not None:
                cause = self._guard.failure or error
                self._pulse.say_failed(cause if isinstance(cause, RankFailed) else _described(self.rank, cause))
        self.abort()

    def close(self) -> None:
        """Waits for the children to end after the engine's shutdown message, then ends them. Idempotent."""
        self._guard.close()
        if self._pulse is not None:
            self._pulse.leave()
        if failed := self._children.close():
            self._guard.show(self._guard.failure or failed)
        self.store = None
        self._close_listener()

    def abort(self) -> None:
        """Ends the children now, whatever they are doing. Idempotent."""
        self._children.abort()
        self._close_listener()

    def _suspect(self, failure: RankFailed) -> None:
        """Takes a failure that the pulse has heard of. If a child failed, its exit status may say more."""
        if self.kind == "parent" and not failure.stopped:
            self._children.suspect(failure)
        else:
            self._guard.fail(failure)

    def _close_listener(self) -> None:
        if self.listener is not None:
            self.listener.close()

    def _child_environment(self, rank: int) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
        return env | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.tp_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", "1"),
            "TORCH_CPP_LOG_LEVEL": env.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            "PYTHONPATH": python_path(),
            "PYTHONUNBUFFERED": "1",
            SELF_LAUNCHED: "1",
        }


def _described(rank: int, error: BaseException) -> RankFailed:
    """The RankFailed that the other ranks raise for an exception of this one."""
    if isinstance(error, KeyboardInterrupt):
        return RankFailed(rank, "was interrupted")
    if isinstance(error, PeerLost):
        return RankFailed(rank, f"lost the connection to another rank ({error})")
    return RankFailed(rank, "failed", "".join(traceback.format_exception(error)))


def python_path() -> str:
    """The PYTHONPATH of a child: the folder of our `penstock` comes first, so that the child runs the same code."""
    package = Path(importlib.util.find_spec(__name__.partition(".")[0]).origin).resolve()
    return os.pathsep.join([str(package.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])


def resolve_launch(tensor_parallel_size: int | None = None) -> Launch:
    """Finds the position of this process, from torchrun's environment or the number of ranks asked for. Starts nothing.

    Raises ValueError if that environment is incomplete, or its WORLD_SIZE is another number.
    """
    return _launched().of_size(tensor_parallel_size)


def _launched() -> Launch:
    """The launch that the environment describes; a single rank where it describes none."""
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return Launch("solo")
    absent = [name for name in _REQUIRED if name not in env]
    if absent:
        raise ValueError(f"RANK and WORLD_SIZE are set, but not {', '.join(absent)}: use torchrun, or unset them")
    bad = [name for name in _REQUIRED if name != "MASTER_ADDR" and not env[name].isdecimal()]
    if bad:
        raise ValueError(f"{bad[0]}={env[bad[0]]!r}: expected a number, as torchrun sets it")
    tp_size = int(env["WORLD_SIZE"])
    return Launch(
        "child" if SELF_LAUNCHED in env else "torchrun",
        rank=int(env["RANK"]),
        tp_size=tp_size,
        local_rank=int(env["LOCAL_RANK"]),
        num_local_ranks=int(env.get("LOCAL_WORLD_SIZE", tp_size)),
        master_addr=env["MASTER_ADDR"],
        master_port=int(env["MASTER_PORT"]),
    )


def _listen(port: str) -> socket.socket:
    """Opens a listening socket on this host only, bound before any child runs, so that nobody can take the port."""
    if not port.isdecimal():
        raise ValueError(f"MASTER_PORT={port!r}: expected a port number")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", int(port)))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise ValueError(f"MASTER_PORT={port} cannot be used on this host (in use?): {error}") from None
    return listener
