"""Collectives: sums and gathers of the ranks' tensors, and small host messages from rank 0. This file has the contract,
and the group of one rank; gloo.py, nccl.py and symmetric.py have those of several.

Shapes: N rows, V_loc columns of this rank.
This file does not know how ranks meet (rendezvous.py), who starts them (launch.py), or what the tensors are.
"""

import contextlib
from typing import Protocol

import torch
from penstock.parallel.ledger import TransferLedger
from penstock.parallel.push_reduce import PeerBuffers


class Collectives(Protocol):
    """The ranks of one tensor-parallel group. All ranks make the same calls in the same order.

    `ledger` belongs to this rank. It counts the all-reduces that are called here, at the site that `label` names;
    whoever replays a CUDA graph adds those of the replay. Every call raises PeerLost if another rank is gone or did not
    answer in time.
    """

    rank: int
    size: int
    ledger: TransferLedger

    def check(self) -> None:
        """Raises PeerLost if another rank has failed. Call it in loops that poll a device: it may wait for that
        rank."""

    def all_reduce(self, tensor: torch.Tensor, label: str = "") -> None:
        """Sums a contiguous tensor over ranks, in place. Its shape is the same on all ranks, and so are the result's
        bits."""

    def peer_buffers(self, rows: torch.Tensor, label: str = "") -> PeerBuffers | None:
        """Returns the buffers that a kernel of the caller needs to sum `rows` (T, D) over ranks, with a program a row,
        and counts its all-reduce. Where such rows cannot be summed so, returns None on all ranks: then call
        all_reduce."""

    def for_graphs(self) -> contextlib.AbstractContextManager[None]:
        """A context for the warm-up on the device before a capture: calls inside go the way of captured ones."""

    def all_gather_columns(self, part: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the ranks' `part` (N, V_loc) side by side, in rank order, into `out` (N, size * V_loc)."""

    def broadcast_ints(self, ints: list[int] | None) -> list[int]:
        """Returns on all ranks the int32 values that rank 0 gives; the others give None. Raises OverflowError for a
        value beyond int32."""

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        """Returns on all ranks the bytes that rank 0 gives; the others give None, and wait without a timeout."""

    def largest(self, ints: list[int]) -> list[int]:
        """The elementwise largest of the values (int64) that the ranks give; all give equally many."""

    def gather_bytes(self, data: bytes) -> list[bytes] | None:
        """Returns on rank 0 the bytes that each rank gives, by rank; on the others None."""

    def share_frames(self, frame: bytes) -> list[bytes]:
        """Returns on all ranks the bytes that each rank gives, by rank; all give equally many."""

    def barrier(self) -> None:
        """Returns when all ranks have called it, which has to be within the group's timeout."""

    def close(self) -> None:
        """Leaves the group; idempotent. Drop every CUDA graph that captured a reduce before you call it."""

    def abandon(self) -> None:
        """Leaves the group after a failure, and waits for nobody, since peers may be in the middle of a call;
        idempotent."""


class Solo:
    """The group of a single rank: it moves nothing and counts nothing."""

    rank, size = 0, 1

    def __init__(self):
        self.ledger = TransferLedger()

    def check(self) -> None:
        pass

    def all_reduce(self, tensor: torch.Tensor, label: str = "") -> None:
        pass

    def peer_buffers(self, rows: torch.Tensor, label: str = "") -> None:
        return None

    def for_graphs(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def all_gather_columns(self, part: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(part)

    def broadcast_ints(self, ints: list[int] | None) -> list[int]:
        return list(ints or ())

    def broadcast_bytes(self, data: bytes | None) -> bytes:
        return bytes(data or b"")

    def largest(self, ints: list[int]) -> list[int]:
        return list(ints)

    def gather_bytes(self, data: bytes) -> list[bytes]:
        return [bytes(data)]

    def share_frames(self, frame: bytes) -> list[bytes]:
        return [bytes(frame)]

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass
