"""Loading: from a source of weights to the host arena (what streams) and to the device (what stays).

    source --read_piece--> span in an arena                           streamed; on a CPU also resident
    source --read_piece--> staging buffer --copy--> span on the GPU   resident on CUDA

Reader threads are our own: torchrun sets OMP_NUM_THREADS=1. After loading, the spans are read-only by contract.
"""

import concurrent.futures
import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.model.layout import GroupLayout, ModelLayout
from engine.weights.blocks import BLOCK_BYTES, Block, WeightSource, cut_blocks
from engine.weights.host_arena import HostArena, check_host_memory
from scheduler.step_plan import GroupId


class _Spans(Protocol):
    """Zeroed memory for some groups, to be filled block by block from many threads."""

    spans: dict[GroupId, Tensor]
    nbytes: int

    def load(self, block: Block, source: WeightSource) -> int: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class LoadedWeights:
    """The spans of one rank, uint8, each as long as its GroupLayout says: `host_spans` are views of one arena
    (registered for CUDA), `resident` views of one allocation on the device. `bytes_read` came from files. Loading began
    and ended at these moments of time.perf_counter."""

    def __init__(self, host: _Spans, resident: _Spans, bytes_read: int, began_at_s: float):
        self.began_at_s, self.ended_at_s = began_at_s, time.perf_counter()
        self.host_spans, self.resident, self.bytes_read = host.spans, resident.spans, bytes_read
        self.host_bytes, self.resident_bytes = host.nbytes, resident.nbytes
        self._host, self._resident = host, resident

    def close(self) -> None:
        """Gives the memory back. The device must be idle, and no graph that reads the spans may run again."""
        self.host_spans, self.resident = {}, {}
        self._resident.close()
        self._host.close()


def load_weights(
    source: WeightSource,
    layout: ModelLayout,
    streamed: set[GroupId],
    embed_on_host: bool,
    device: torch.device,
    num_threads: int = 8,
    progress: Callable[[int], None] | None = None,
    ranks_on_host: int = 1,
) -> LoadedWeights:
    """Loads every group of `layout`: those in `streamed` (and the embedding, if `embed_on_host`) into the host arena,
    the others onto `device`. Elements that no piece covers are zero.

    `progress` is called in this thread, with bytes that add up to layout.nbytes. Raises ValueError if the cgroup's
    limit cannot hold the arena, RuntimeError if CUDA cannot register it, and what the source raises; nothing stays
    allocated then.
    """
    began_at_s = time.perf_counter()
    groups = (*layout.groups, layout.embed)
    on_host = streamed | ({layout.embed.group} if embed_on_host else set())
    host_groups = [group for group in groups if group.group in on_host]
    device_groups = [group for group in groups if group.group not in on_host]
    is_cuda = device.type == "cuda"
    if is_cuda and device.index is None:  # reader threads have a current device of their own
        device = torch.device("cuda", torch.cuda.current_device())
    check_host_memory(_span_bytes(host_groups if is_cuda else groups), ranks_on_host)
    with contextlib.ExitStack() as undo:
        host = _HostSpans(host_groups, register=is_cuda)
        undo.callback(host.close)
        resident = _CudaSpans(device_groups, device, num_threads) if is_cuda else _HostSpans(device_groups)
        undo.callback(resident.close)
        bytes_read = _load_blocks(source, groups, host, resident, num_threads, progress or (lambda nbytes: None))
        resident.finish()
        host.finish()
        source.finish()
        undo.pop_all()
    return LoadedWeights(host, resident, bytes_read, began_at_s)


class _HostSpans:
    """Spans in an arena, where blocks are read straight into place."""

    def __init__(self, groups: Sequence[GroupLayout], register: bool = False):
        self.nbytes = _span_bytes(groups)
        self._arena, self._register = HostArena(self.nbytes), register
        self.spans = _cut_spans(self._arena.tensor, groups)

    def load(self, block: Block, source: WeightSource) -> int:
        return block.fill(source, self.spans[block.group][block.offset : block.offset + block.nbytes])

    def finish(self) -> None:
        if self._register:
            self._arena.register()

    def close(self) -> None:
        self.spans = {}
        self._arena.close()


class _CudaSpans:
    """Spans in device memory, where blocks go by way of staging buffers: one for each thread, and two in flight."""

    def __init__(self, groups: Sequence[GroupLayout], device: torch.device, num_threads: int):
        self.nbytes = _span_bytes(groups)
        self._device = device
        self.spans = _cut_spans(torch.zeros(self.nbytes, dtype=torch.uint8, device=device), groups)
        torch.cuda.synchronize(device)  # the reader threads copy on a stream that does not wait for this one
        self._staging = HostArena((num_threads + 2) * BLOCK_BYTES if self.nbytes else 0)
        self._staging.register()
        self._free: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        for buffer in self._staging.tensor.split(BLOCK_BYTES) if self.nbytes else ():
            self._free.put((buffer, torch.cuda.Event()))

    def load(self, block: Block, source: WeightSource) -> int:
        assert block.nbytes <= BLOCK_BYTES, "a row is longer than a staging buffer"
        buffer, copied = self._free.get()
        try:
            copied.synchronize()
            staged = buffer[: block.nbytes]
            if not block.covered:
                staged.zero_()
            num_read = block.fill(source, staged)
            span = self.spans[block.group]
            span[block.offset : block.offset + block.nbytes].copy_(staged, non_blocking=True)
            copied.record(torch.cuda.current_stream(self._device))
        finally:
            self._free.put((buffer, copied))
        return num_read

    def finish(self) -> None:
        torch.cuda.synchronize(self._device)
        self._staging.close()

    def close(self) -> None:
        self.finish()
        self.spans = {}


def _load_blocks(
    source: WeightSource,
    groups: Sequence[GroupLayout],
    host: _Spans,
    resident: _Spans,
    num_threads: int,
    progress: Callable[[int], None],
) -> int:
    """Returns the bytes read. The first error cancels what was not begun."""
    bytes_read, left = 0, _span_bytes(groups)
    executor = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="weights")
    with _single_threaded_ops():
        try:
            futures = {}
            for block in (block for group in groups for block in cut_blocks(group)):
                spans = host if block.group in host.spans else resident
                futures[executor.submit(spans.load, block, source)] = block.nbytes
            for future in concurrent.futures.as_completed(futures):
                bytes_read += future.result()
                left -= futures[future]
                progress(futures[future])
        finally:
            executor.shutdown(cancel_futures=True)
    progress(left)  # the gaps between tensors, and rows that are zero
    return bytes_read


@contextlib.contextmanager
def _single_threaded_ops() -> Iterator[None]:
    """Each reader thread would otherwise start a team of threads of its own for a conversion or a sum."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _span_bytes(groups: Sequence[GroupLayout]) -> int:
    return sum(group.nbytes for group in groups)


def _cut_spans(memory: Tensor, groups: Sequence[GroupLayout]) -> dict[GroupId, Tensor]:
    """The spans lie one after the other; each is a multiple of 256 bytes long, so all are aligned."""
    return {group.group: span for group, span in zip(groups, memory.split([group.nbytes for group in groups]))}
