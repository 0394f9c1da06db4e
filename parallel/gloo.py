"""Collectives over gloo: those of CPU tensors, and what all ranks that have peers share.

Shapes: N rows, V_loc columns of this rank.
Host messages always go over gloo (no pickle, no GPU). They wait as long as rank 0 is idle, while tensor collectives
have a timeout. Every error that only says that another rank is gone becomes PeerLost.
"""

import array
import atexit
import contextlib
import re
import threading
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from penstock.parallel.connections import Connections
from penstock.parallel.failure import PeerLost, RankFailed
from penstock.parallel.ledger import Site, TransferLedger
from penstock.parallel.push_reduce import PeerBuffers

CONTROL_TIMEOUT = timedelta(days=30)  # a rank waits for the next batch for as long as rank 0 is idle
FRAME_BYTES = 4096  # one broadcast carries the length and a short message; a longer one costs a second
_LENGTH_BYTES = 8
DIRECT_BYTES = 1 << 16  # up to this size gloo sends a tensor faster to all ranks at once than around its ring
_PEER_ERROR = re.compile(
    r"connection (closed|reset|refused|was likely closed)|connect.*(timeout|failed)|broken pipe|timed? ?out"
    r"|wait timeout|socket closed|remote process|ncclRemoteError|failed to (recv|pass monitoredBarrier)"
    r"|aborted",
    re.IGNORECASE,
)
_OWN_ERROR = re.compile(r"out of memory|invalid (argument|usage)|unhandled cuda error", re.IGNORECASE)


class Distributed:
    """The common part of Gloo and Nccl (nccl.py): the ledger, the host messages, and the end of all waiting when a rank
    has failed. It needs an initialised process group. `connections` are the group's, which `stop` cuts; `abort_word`
    (1,) int32 lies in host memory, and our kernels that wait for other ranks read it: 1 ends them."""

    uses_gpus = False

    def __init__(self, timeout_s: float, connections: Connections):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.ledger = TransferLedger()
        self.connections = connections
        self.abort_word = torch.zeros(1, dtype=torch.int32, pin_memory=self.uses_gpus)
        self._timeout = timedelta(seconds=timeout_s)
        self._broken = self._stopped = False
        self._buffer = bytearray(FRAME_BYTES)
        self._frame = torch.frombuffer(self._buffer, dtype=torch.uint8)  # the same memory
        self._control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        atexit.register(self.abandon)

    def check(self) -> None:
        if self._stopped:
            raise PeerLost("another rank has failed")

    def stop(self) -> None:
        """Ends all waiting for other ranks, on the device and here; called by another thread. From then on sums are
        wrong."""
        self._stopped = True
        self.abort_word.fill_(1)
        self.connections.cut()
        self._abort()

    def all_reduce(self, tensor: torch.Tensor, label: str = "") -> None:
        assert tensor.is_contiguous()
        with self._peers():
            self._sum(tensor)
        self._count(tensor.nbytes, label)

    def _sum(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=self._group)

    def _count(self, nbytes: int, label: str) -> None:
        self.ledger.add(Site(label, -1), nbytes)

    def peer_buffers(self, rows: torch.Tensor, label: str = "") -> PeerBuffers | None:
        return None

    def for_graphs(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @property
    def _group(self) -> dist.ProcessGroup | None:
        """The process group that tensors go over now; None stands for the group of all ranks."""
        return None

    def broadcast_ints(self, ints: list[int] | None) -> list[int]:
        data = array.array("i", ints or ()).tobytes() if self.rank == 0 else None
        return array.array("i", self.broadcast_bytes(data)).tolist()

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        room = FRAME_BYTES - _LENGTH_BYTES
        if self.rank == 0:
            head = len(data).to_bytes(_LENGTH_BYTES, "little") + data[:room]
            self._buffer[: len(head)] = head
        with self._peers():
            dist.broadcast(self._frame, 0, group=self._control)
        length = int.from_bytes(self._buffer[:_LENGTH_BYTES], "little")
        head = bytes(self._buffer[_LENGTH_BYTES : _LENGTH_BYTES + min(length, room)])
        return head if length <= room else head + self._broadcast_rest(data, length - room)

    def _broadcast_rest(self, data: bytes | None, rest_bytes: int) -> bytes:
        rest = bytearray(data[-rest_bytes:] if self.rank == 0 else rest_bytes)
        with self._peers():
            dist.broadcast(torch.frombuffer(rest, dtype=torch.uint8), 0, group=self._control)
        return bytes(rest)

    def largest(self, ints: list[int]) -> list[int]:
        values = torch.tensor(ints, dtype=torch.int64)
        with self._peers():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._control)
        return values.tolist()

    def gather_bytes(self, data: bytes) -> list[bytes] | None:
        (longest,) = self.largest([len(data)])
        frame = bytearray(len(data).to_bytes(_LENGTH_BYTES, "little") + data.ljust(longest, b"\0"))
        own = torch.frombuffer(frame, dtype=torch.uint8)
        frames = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else None
        with self._peers():
            dist.gather(own, frames, 0, group=self._control)
        return None if frames is None else [_unframed(one.numpy().tobytes()) for one in frames]

    def share_frames(self, frame: bytes) -> list[bytes]:
        own = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
        frames = [torch.empty_like(own) for _ in range(self.size)]
        with self._peers():
            dist.all_gather(frames, own, group=self._control)
        return [one.numpy().tobytes() for one in frames]

    def barrier(self) -> None:
        with self._peers():
            dist.monitored_barrier(self._control, timeout=self._timeout)

    def close(self) -> None:
        if self._control is None:
            return
        atexit.unregister(self.abandon)
        self._control = None  # gloo aborts the process at exit if a group is still referenced
        if self._broken:
            for thread in self._abort():
                thread.join()
        dist.destroy_process_group()

    def _abort(self) -> list[threading.Thread]:
        """Begins to give up calls that a lost rank will never answer. The threads end when that is done."""
        return []

    def abandon(self) -> None:
        self._broken = True
        with contextlib.suppress(RuntimeError):
            self.close()

    @contextlib.contextmanager
    def _peers(self) -> Iterator[None]:
        try:
            self.check()
            with peer_errors():
                yield
            self.check()  # a sum that was given up is wrong
        except PeerLost:
            self._broken = True
            raise


class Gloo(Distributed):
    """CPU tensors (fp32, bf16, fp16, integers) over gloo. A large sum goes around gloo's ring, where each addition is
    rounded to the tensor's dtype; a small one is sent whole to all ranks, and each adds it up and rounds it once."""

    def _sum(self, tensor: torch.Tensor) -> None:
        if tensor.nbytes > DIRECT_BYTES:
            super()._sum(tensor)
        else:
            torch.sum(self._parts(tensor), 0, dtype=tensor.dtype, out=tensor)

    def all_gather_columns(self, part: torch.Tensor, out: torch.Tensor) -> None:
        with self._peers():
            parts = self._parts(part)
        torch.cat([*parts], dim=-1, out=out)

    def _parts(self, own: torch.Tensor) -> torch.Tensor:
        """The tensors that the ranks give, by rank: (size, *own.shape)."""
        parts = own.new_empty(self.size, *own.shape)
        if own.nbytes <= DIRECT_BYTES:
            dist.all_to_all_single(parts, own.expand_as(parts).contiguous())
        else:
            dist.all_gather([*parts], own.contiguous())
        return parts


def _unframed(frame: bytes) -> bytes:
    length = int.from_bytes(frame[:_LENGTH_BYTES], "little")
    return frame[_LENGTH_BYTES : _LENGTH_BYTES + length]


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """Turns an error of torch.distributed into PeerLost if it only says that another rank is gone or silent."""
    try:
        yield
    except RuntimeError as error:
        if is_peer_error(error):
            raise PeerLost(str(error).splitlines()[0]) from None
        raise


def is_peer_error(error: RuntimeError) -> bool:
    """Tells whether the error reports the end of another rank (a closed connection, a timeout), not a fault of ours."""
    if isinstance(error, (PeerLost, RankFailed)):
        return False
    if isinstance(error, dist.DistBackendError):
        return not _OWN_ERROR.search(str(error))
    return bool(_PEER_ERROR.search(str(error)))
