"""Three ways into a group of ranks, one result: a `Launch`.

    torchrun               the environment says who this process is
    one rank               nothing to start, nothing to meet
    N ranks, no torchrun   this process is rank 0 and starts the others itself (children.py), as subprocesses
                           with torchrun's environment: no pickle, no re-import of the user's main

Whatever goes wrong, the rank that failed first is the one that is shown, and no process stays behind.
What it does not know: what the ranks do, and what the message to them means.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from parallel.children import Children
from parallel.failure import (
    SELF_LAUNCHED,
    PeerLost,
    RankFailed,
    exit_with_parent,
    run_rank,
    wait_for_launcher,
)

__all__ = ["Launch", "PeerLost", "RankFailed", "exit_with_parent", "resolve_launch", "run_rank"]

# -P: the child finds what this process runs, whatever lies in the working directory.
WORKER_COMMAND = (sys.executable, "-P", "-m", "penstock", "worker")
_REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ROOT = Path(__file__).resolve().parent.parent  # where `penstock` and `parallel` are found


@dataclass
class Launch:
    """This process' place among the ranks, and for rank 0 of a self-launch its children.

    `kind` is solo, torchrun, parent (rank 0 of a self-launch) or child. Only a parent has `listener`, the
    bound socket where ranks meet. Every kind may call every method; only a parent starts and ends processes.
    """

    kind: str
    rank: int = 0
    tp_size: int = 1
    local_rank: int = 0
    num_local_ranks: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    listener: socket.socket | None = None
    _children: Children = field(default_factory=Children, repr=False, compare=False)

    def start(self, message: str, command: tuple[str, ...] | list[str] = WORKER_COMMAND) -> None:
        """Start the other ranks of a self-launch, each with `message` (one line) on its stdin.

        Raises ValueError, naming MASTER_PORT, if the user chose a port that is in use; no child runs then.
        """
        if self.kind != "parent":
            return
        assert "\n" not in message
        self.listener = _listen(os.environ.get("MASTER_PORT", "0"))
        self.master_port = self.listener.getsockname()[1]
        try:
            for rank in range(1, self.tp_size):
                self._children.start(rank, list(command), self._child_environment(rank), message)
        except BaseException:
            self.abort()
            raise
        self._children.watch()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Around all that ranks do together, from `start` to the shutdown message.

        Raises RankFailed instead of PeerLost, on entry too. Any exception, also this rank's own, ends the
        children: after it the ranks no longer agree on what comes next. So check a user's input before, and
        never yield from a generator in here (GeneratorExit is an exception too).
        While rank 0 stays in here for some seconds after a child died (NCCL waits for ever, a long
        computation), the whole process is ended with the message that RankFailed would have had.
        """
        with self._children.guarded():
            try:
                self.check()
                yield
            except PeerLost as error:
                raise self.explain(error) from None
            except BaseException:
                self.abort()
                raise

    def check(self) -> None:
        """Raise RankFailed if a child has died, RuntimeError if an earlier error has ended the children."""
        if self._children.failure is not None:
            raise self._children.failure
        if self._children.aborted:
            raise RuntimeError("the other ranks were ended after an earlier error")

    @property
    def healthy(self) -> bool:
        """Whether the other ranks, as far as this one knows, still follow."""
        return self._children.failure is None and not self._children.aborted

    def explain(self, error: PeerLost) -> Exception:
        """What to raise for a lost peer: RankFailed with its exit status and traceback, once that is known.

        Under torchrun the error itself, after up to 8 s in which torchrun ends this process.
        """
        if self.kind == "torchrun":
            wait_for_launcher(error)
        failure = self._children.wait_for_failure()
        self.abort()
        return failure or error

    def close(self) -> None:
        """After the engine's shutdown message: wait for the children to end, then make them. Idempotent."""
        self._children.close()
        self._close_listener()

    def abort(self) -> None:
        """End the children now, whatever they are doing. Idempotent."""
        self._children.abort()
        self._close_listener()

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


def python_path() -> str:
    """PYTHONPATH of a child, which has to find what this process runs."""
    return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def resolve_launch(tensor_parallel_size: int | None = None) -> Launch:
    """Who this process is, from torchrun's environment or the number of ranks asked for. Starts nothing.

    Raises ValueError if the number is unlike torchrun's WORLD_SIZE, or if that environment is incomplete.
    """
    env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        tp_size = tensor_parallel_size or 1
        return Launch("parent" if tp_size > 1 else "solo", tp_size=tp_size, num_local_ranks=tp_size)
    absent = [name for name in _REQUIRED if name not in env]
    if absent:
        raise ValueError(f"RANK and WORLD_SIZE are set, but not {', '.join(absent)}: use torchrun, or unset them")
    bad = [name for name in _REQUIRED if name != "MASTER_ADDR" and not env[name].isdecimal()]
    if bad:
        raise ValueError(f"{bad[0]}={env[bad[0]]!r}: expected a number, as torchrun sets it")
    tp_size = int(env["WORLD_SIZE"])
    if tensor_parallel_size not in (None, tp_size):
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size}, but torchrun started WORLD_SIZE={tp_size} ranks"
        )
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
    """A listening socket on this host only, bound before any child runs: so nobody can take the port."""
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
