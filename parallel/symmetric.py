"""All-reduces of small tensors through symmetric memory: ranks use each other's memory over NVLink directly.

On four H200s, in a graph, NCCL takes 22 us for a small sum. Up to 1 MiB, ranks push their parts to each other in one
kernel (push_reduce.py; 2.9 us for 16 KiB, where torch's one-shot takes 8), or in a kernel of the caller's. Up to
LARGEST_BYTES torch's two-shot reads the parts, in pieces that its buffer holds. Fixed sizes decide which way a sum
takes, the same for eager and captured passes and on all ranks: a crossover measured at start-up would change bits
between runs, and ranks that choose differently hang. Multicast (NVLS) is not used.
"""

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

TWO_SHOT_BYTES = 16 * 2**20  # of the buffer, and so of the largest piece
LARGEST_BYTES = TWO_SHOT_BYTES  # of a sum: larger ones go through NCCL. Were it more, they would be cut into pieces
TWO_SHOT_DTYPES = (torch.bfloat16, torch.float32)
UNIT_BYTES = 16  # of a two-shot sum on each rank: other sizes go through NCCL


class Symmetric(Nccl):
    """Nccl, except that sums of at most LARGEST_BYTES go through symmetric memory."""

    def __init__(self, timeout_s: float, connections: Connections):
        super().__init__(timeout_s, connections)
        self.num_symmetric = 0  # sums through symmetric memory, without those of replays
        self._name = dist.group.WORLD.group_name
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._buffers = {}
        for dtype in TWO_SHOT_DTYPES:
            self._buffers[dtype] = symm_mem.empty(TWO_SHOT_BYTES // dtype.itemsize, dtype=dtype, device=self._device)
            symm_mem.rendezvous(self._buffers[dtype], self._name)
        self._peer_buffers = self._meet()

    def _meet(self) -> PeerBuffers:
        """Makes the buffers of push_reduce, and waits until those of all ranks are empty: no rank may push before."""
        flat = symm_mem.empty(NUM_HALVES * self.size * PART_WORDS, dtype=torch.int32, device=self._device)
        flat.fill_(EMPTY)
        self._handle = symm_mem.rendezvous(flat, self._name)  # peers' memory is mapped as long as the handle lives
        addresses = self._handle.buffer_ptrs
        assert addresses[self.rank] == flat.data_ptr() and not any(address % 16 for address in addresses)
        others = tuple(addresses[(self.rank + distance) % self.size] for distance in range(1, self.size))
        half = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=self._device)
        torch.cuda.synchronize()
        self.barrier()
        words = flat.view(NUM_HALVES, self.size, PART_WORDS)
        return PeerBuffers(self.rank, self.size, words, others, half, self.abort_word)

    def all_reduce(self, tensor: torch.Tensor, label: str = "") -> None:
        if fits(tensor):
            push_reduce(self._peer_buffers, tensor)
            self._count_symmetric(tensor.nbytes, label)
        elif pieces := self._pieces(tensor):
            for piece in pieces:
                self._two_shot(piece)
            self._count_symmetric(tensor.nbytes, label)
        else:
            super().all_reduce(tensor, label)

    def _pieces(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cuts the tensor into pieces of whole rows, which two-shot sums one after another; an element's sum does not
        depend on its index in a piece. Returns no pieces where two-shot cannot sum them."""
        if tensor.dtype not in TWO_SHOT_DTYPES or tensor.nbytes > LARGEST_BYTES:
            return ()
        pieces = (tensor,)
        if tensor.nbytes > TWO_SHOT_BYTES:
            pieces = tensor.split(max(TWO_SHOT_BYTES // tensor[0].nbytes, 1))
        sizes = [piece.nbytes for piece in pieces]
        fit = max(sizes) <= TWO_SHOT_BYTES and not any(nbytes % (UNIT_BYTES * self.size) for nbytes in sizes)
        return pieces if fit else ()

    def peer_buffers(self, rows: torch.Tensor, label: str = "") -> PeerBuffers | None:
        if not fits_rows(rows):
            return None
        self._count_symmetric(rows.nbytes, label)
        return self._peer_buffers

    def _two_shot(self, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        buffer, flat = self._buffers[tensor.dtype][: tensor.numel()], tensor.view(-1)
        buffer.copy_(flat)
        torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", self._name)
        flat.copy_(buffer)

    def _count_symmetric(self, nbytes: int, label: str) -> None:
        self._count(nbytes, label)
        self.num_symmetric += 1

    def close(self) -> None:
        self._buffers, self._peer_buffers, self._handle = {}, None, None
        super().close()
