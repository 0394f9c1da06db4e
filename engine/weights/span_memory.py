"""Memory for what is stored of a rank's groups (their spans, if nothing is quantised), in the host arena or on the
device, and the way of blocks onto a GPU.

A compressed group has a blob instead of a span. A blob's length is known only when it has been made, so blobs are kept
one after the other, behind the spans.
"""

import concurrent.futures
import queue
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from mmap import PAGESIZE
from typing import Protocol

import torch
from penstock.engine.model.group_layout import GroupLayout
from penstock.engine.model.shard import pad_to
from penstock.engine.weights.blocks import BLOCK_BYTES, Block, WeightSource
from penstock.engine.weights.host_arena import HostArena
from penstock.engine.weights.views import byte_range
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.units import MIB
from torch import Tensor

TOUCH_BYTES = 8 * MIB  # that a thread touches at a time


class SpanMemory(Protocol):
    """Zeroed spans of the groups that are not compressed, to be filled from many threads, and the blobs kept so far,
    all uint8. `nbytes` counts both."""

    spans: dict[GroupId, Tensor]
    nbytes: int

    def filled(self, group: GroupId) -> None:
        """Ends the filling of a span; called once it has its last block."""

    def keep(self, group: GroupId, blob: Tensor) -> None:
        """Copies a blob from the device that compressed it; the blob may be overwritten afterwards."""

    def finish(self) -> None:
        """Ends all filling; called after the last span and blob."""

    def close(self) -> None: ...


class HostSpans:
    """Spans and blobs in one arena, each from the start of a page on, since each is registered alone: while others are
    still being filled. The arena never takes more memory than they need."""

    def __init__(
        self,
        groups: Sequence[GroupLayout],
        compressed: AbstractSet[GroupId] = frozenset(),
        register: bool = False,
        num_threads: int = 1,
    ):
        plain = [group for group in groups if group.id not in compressed]
        self.nbytes = span_bytes(plain)
        self._register, self._num_threads = register, num_threads
        self._arena = HostArena(sum(map(_paged_bytes, groups)), sparse=len(plain) < len(groups))
        self._end, self.spans = 0, {}
        for group in plain:
            self.spans[group.id] = self._take(group.stored_bytes)

    def filled(self, group: GroupId) -> None:
        if self._register:
            self._arena.register(self.spans[group])

    def keep(self, group: GroupId, blob: Tensor) -> None:
        kept = self._take(len(blob))
        if self._register:
            self._touch(kept)
            self._arena.register(kept)
        self.spans[group] = kept.copy_(blob)
        self.nbytes += len(blob)

    def finish(self) -> None:
        self._arena.trim(self._end)

    def close(self) -> None:
        self.spans = {}
        self._arena.close()

    def _take(self, nbytes: int) -> Tensor:
        start, self._end = self._end, self._end + pad_to(nbytes, PAGESIZE)
        return byte_range(self._arena.tensor, start, nbytes)

    def _touch(self, memory: Tensor) -> None:
        """Takes the pages by many threads: of new memory one may get no more than 3 GB/s from a virtual machine."""
        with concurrent.futures.ThreadPoolExecutor(self._num_threads, thread_name_prefix="touch") as threads:
            list(threads.map(Tensor.zero_, memory.split(TOUCH_BYTES)))


class CudaSpans:
    """Spans in one allocation on the device, and each blob in an allocation of its own."""

    def __init__(self, groups: Sequence[GroupLayout], compressed: AbstractSet[GroupId], device: torch.device):
        plain = [group for group in groups if group.id not in compressed]
        self.nbytes = span_bytes(plain)
        self._device = device
        self.spans = _cut_spans(torch.zeros(self.nbytes, dtype=torch.uint8, device=device), plain)
        torch.cuda.synchronize(device)  # the reader threads copy on a stream that does not wait for this one

    def filled(self, group: GroupId) -> None:
        """Does nothing: what copies are under way end before `finish` does."""

    def keep(self, group: GroupId, blob: Tensor) -> None:
        self.spans[group] = blob.clone()
        torch.cuda.synchronize(self._device)
        self.nbytes += len(blob)

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self.finish()
        self.spans = {}


class Staging:
    """Registered buffers by way of which blocks reach a GPU: one for each thread, and two more for copies in flight."""

    def __init__(self, device: torch.device, num_threads: int):
        self._device = device
        self._arena = HostArena((num_threads + 2) * BLOCK_BYTES)
        self._arena.register()
        self._free: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        for buffer in self._arena.tensor.split(BLOCK_BYTES):
            self._free.put((buffer, torch.cuda.Event()))

    def load(self, block: Block, source: WeightSource, span: Tensor) -> int:
        """Reads a block into its bytes of a span; returns the bytes read. Copies to the device are only begun: what
        reads the span must come after a synchronisation of the device."""
        assert block.nbytes <= BLOCK_BYTES, "a row is longer than a staging buffer"
        buffer, copied = self._free.get()
        try:
            copied.synchronize()
            staged = buffer[: block.nbytes]
            if not block.covered:
                staged.zero_()
            parts = staged.split([nbytes for _, nbytes in block.ranges])
            num_read = block.fill(source, parts)
            for part, (offset, nbytes) in zip(parts, block.ranges):
                byte_range(span, offset, nbytes).copy_(part, non_blocking=True)
            copied.record(torch.cuda.current_stream(self._device))
        finally:
            self._free.put((buffer, copied))
        return num_read

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        self._arena.close()


def span_bytes(groups: Sequence[GroupLayout]) -> int:
    """Bytes of what is stored of the groups."""
    return sum(group.stored_bytes for group in groups)


def _paged_bytes(group: GroupLayout) -> int:
    """Bytes of whole pages for what is stored of the group."""
    return pad_to(group.stored_bytes, PAGESIZE)


def _cut_spans(memory: Tensor, groups: Sequence[GroupLayout]) -> dict[GroupId, Tensor]:
    """The spans lie one after the other; each is a multiple of 256 bytes long, so all are aligned."""
    return {group.id: span for group, span in zip(groups, memory.split([group.stored_bytes for group in groups]))}
