"""Sums over symmetric memory: ranks use each other's memory over NVLink directly.

On four H200s, in a graph, NCCL takes 22 us for a small sum. Up to 1 MiB, ranks push their parts to each other in one
kernel (push_reduce.py; 2.9 us for 16 KiB), or in a kernel of the caller's; up to two_step_reduce.MOST_BYTES each sums a
share, in one kernel too. Larger sums are NCCL's. Fixed sizes decide which way a sum takes, the same for eager and
captured passes and on all ranks: a crossover measured at start-up would change bits between runs, and ranks that choose
differently hang. Multicast (NVLS) is not used.

torch maps the memory of ranks that meet (`rendezvous`). It numbers what they tell each other by the store then, in each
process from its start, and each rank awaits what the others tell by its own numbers. Rank 0 of a self-launch may have
met other ranks before, so its new ones meet nobody first, as often as it takes to be as far.
"""

import itertools
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from penstock.parallel.connections import Connections
from penstock.parallel.nccl import Nccl
from penstock.parallel.push_reduce import (
    EMPTY,
    MAX_PROGRAMS,
    NUM_HALVES,
    PART_WORDS,
    PeerBuffers,
    fits,
    fits_rows,
    push_reduce,
)
from penstock.parallel.two_step_reduce import buffer_shape, fits_shares, two_step_reduce

MEETING_S = 5.0  # torch keeps Python's lock while ranks meet, so nothing here could end a longer wait for a rank
_numbers = itertools.count()  # of the meetings of this process


class Symmetric(Nccl):
    """Nccl, except that sums that fit go through symmetric memory, once ranks have met (`share_memory`)."""

    def __init__(self, timeout_s: float, connections: Connections):
        super().__init__(timeout_s, connections)
        self.num_symmetric = 0  # sums through symmetric memory, without those of replays
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._handles = []  # peers' memory is mapped as long as they live
        self._peer_buffers = self._share_buffers = None

    def share_memory(self, store: dist.Store) -> None:
        """Makes the buffers of all ranks, which call this together. `store` is that of their group."""
        store.set_timeout(timedelta(seconds=MEETING_S))
        self._peer_buffers = self._meet((NUM_HALVES, self.size, PART_WORDS))
        self._share_buffers = self._meet(buffer_shape(self.size))
        torch.cuda.synchronize()
        self.barrier()  # no rank may write before the buffers of all are empty

    def _meet(self, shape: tuple[int, ...]) -> PeerBuffers:
        """Makes empty buffers of `shape` on all ranks, which know each other's addresses."""
        words = symm_mem.empty(shape, dtype=torch.int32, device=self._device).fill_(EMPTY)
        self._catch_up()
        self.barrier()  # all are as far, and nobody waits for long
        handle = symm_mem.rendezvous(words, dist.group.WORLD.group_name)
        self._handles.append(handle)
        addresses = handle.buffer_ptrs
        assert addresses[self.rank] == words.data_ptr() and not any(address % 16 for address in addresses)
        others = tuple(addresses[(self.rank + distance) % self.size] for distance in range(1, self.size))
        half = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=self._device)
        return PeerBuffers(self.rank, self.size, words, others, half, self.abort_word)

    def _catch_up(self) -> None:
        """Takes the next number of a meeting, which is that of the rank that has most; those before it are taken by
        meetings of this rank alone."""
        number = next(_numbers)
        (most,) = self.largest([number])
        if number < most:
            alone = dist.new_group([self.rank], backend="gloo", use_local_synchronization=True)
            for _ in range(number, most):
                symm_mem.rendezvous(symm_mem.empty(1, dtype=torch.int32, device=self._device), alone.group_name)
                next(_numbers)

    def all_reduce(self, tensor: torch.Tensor, label: str = "") -> None:
        if fits(tensor):
            push_reduce(self._peer_buffers, tensor)
        elif fits_shares(tensor, self.size):
            two_step_reduce(self._share_buffers, tensor)
        else:
            super().all_reduce(tensor, label)
            return
        self._count_symmetric(tensor.nbytes, label)

    def peer_buffers(self, rows: torch.Tensor, label: str = "") -> PeerBuffers | None:
        if not fits_rows(rows):
            return None
        self._count_symmetric(rows.nbytes, label)
        return self._peer_buffers

    def _count_symmetric(self, nbytes: int, label: str) -> None:
        self._count(nbytes, label)
        self.num_symmetric += 1

    def close(self) -> None:
        self._peer_buffers = self._share_buffers = None
        self._handles = []
        super().close()
