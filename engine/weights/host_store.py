"""Loading, from a source of weights to the host arena (what streams) and to the device (what stays).

    source --read_piece--> span in an arena                           streamed; on a CPU also resident
    source --read_piece--> staging buffer --copy--> span on the GPU   resident on CUDA

A group that is compressed goes by way of a scratch span on the device, where it is compressed:

    scratch span --compress--> blob --copy--> host arena, or memory of its own on the device

Host memory is registered group by group, while the groups behind are read.
Reader threads are our own: torchrun sets OMP_NUM_THREADS=1. After loading, the spans are read-only by contract.
"""

import collections
import concurrent.futures
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet

import torch
from penstock.engine.model.compressed_size import planned_bytes
from penstock.engine.model.group_layout import GroupLayout
from penstock.engine.model.layout import ModelLayout
from penstock.engine.weights import codec
from penstock.engine.weights.blocks import Block, WeightSource, cut_blocks
from penstock.engine.weights.compressed_group import compress_group
from penstock.engine.weights.host_arena import check_host_memory
from penstock.engine.weights.kept_group import KeptGroup
from penstock.engine.weights.span_memory import CudaSpans, HostSpans, SpanMemory, Staging, span_bytes
from penstock.engine.weights.views import byte_range
from penstock.scheduler.passes.pass_plan import GroupId
from torch import Tensor

Blocks = dict[concurrent.futures.Future, int]  # the blocks that are being read, and their bytes
MOST_READERS = 8  # threads: of more each waits longer for the interpreter than its core brings


class LoadedWeights:
    """The spans of one rank, uint8, each as long as what its GroupLayout stores, or as `compressed` says of
    it: `host_spans` are views of one arena (registered for CUDA), `resident` lie on the device. `bytes_read`
    came from files; `compressed_from_bytes` of spans were compressed in `compress_s`. Loading lasted from `began_at_s`
    to `ended_at_s` on the clock of time.perf_counter."""

    def __init__(
        self, host: SpanMemory, resident: SpanMemory, compressor: "_Compressor", bytes_read: int, began_at_s: float
    ):
        self.began_at_s, self.ended_at_s = began_at_s, time.perf_counter()
        self.host_spans, self.resident, self.bytes_read = host.spans, resident.spans, bytes_read
        self.host_bytes, self.resident_bytes = host.nbytes, resident.nbytes
        self.compressed, self.compressed_from_bytes, self.compress_s = (
            compressor.compressed,
            compressor.from_bytes,
            compressor.compress_s,
        )
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
    num_threads: int | None = None,
    progress: Callable[[int], None] | None = None,
    ranks_on_host: int = 1,
    compressed: AbstractSet[GroupId] = frozenset(),
    kv_bytes: int = 0,
) -> LoadedWeights:
    """Loads every group of `layout`: those in `streamed` (and the embedding, if `embed_on_host`) into the host arena,
    the others onto `device`. Elements that no piece covers are zero. Those in `compressed` are compressed, wherever
    they lie. Without `num_threads`, as many read as this rank has CPUs, up to MOST_READERS.

    `progress` is called in this thread, with bytes of spans that add up to layout.nbytes. Raises ValueError if the
    cgroup's limit cannot hold the arena (compressed groups count as planned) and `kv_bytes` beside it,
    RuntimeError if CUDA cannot register it, and what the source raises; nothing stays allocated then.
    """
    began_at_s = time.perf_counter()
    groups = (*layout.groups, layout.embed)
    on_host = streamed | ({layout.embed.id} if embed_on_host else set())
    host_groups = [group for group in groups if group.id in on_host]
    device_groups = [group for group in groups if group.id not in on_host]
    compressed_groups = [group for group in groups if group.id in compressed]
    is_cuda, cores = device.type == "cuda", max(1, min(len(os.sched_getaffinity(0)) // ranks_on_host, MOST_READERS))
    if is_cuda and device.index is None:  # reader threads have a current device of their own
        device = torch.device("cuda", torch.cuda.current_device())
    in_memory = host_groups if is_cuda else groups
    needed = sum(planned_bytes(group) if group.id in compressed else group.stored_bytes for group in in_memory)
    check_host_memory(needed + kv_bytes, ranks_on_host, *(["weights and KV pages"] if kv_bytes else []))
    with contextlib.ExitStack() as undo:
        host = HostSpans(host_groups, compressed, register=is_cuda, num_threads=cores)
        undo.callback(host.close)
        resident = CudaSpans(device_groups, compressed, device) if is_cuda else HostSpans(device_groups, compressed)
        undo.callback(resident.close)
        memory = {group.id: host if group.id in on_host else resident for group in groups}
        compressor = _Compressor(device, cores)
        through_device = is_cuda and span_bytes(device_groups) + span_bytes(compressed_groups) > 0
        with _Reader(source, device if through_device else None, num_threads or cores, progress) as reader:
            plain = [group for group in groups if group.id not in compressed]
            begun = [(group.id, reader.begin(group, memory[group.id].spans[group.id])) for group in plain]
            for group, blocks in begun:
                reader.finish(blocks)
                memory[group].filled(group)
            compressor.load(compressed_groups, reader, memory)
            reader.report(layout.nbytes - reader.reported_bytes)  # gaps between tensors, and rows that are zero
        if is_cuda and compressed_groups:
            codec.warm_up(device)
            torch.cuda.empty_cache()  # what compressing took belongs to ring and KV cache
        resident.finish()
        host.finish()
        source.finish()
        undo.pop_all()
    return LoadedWeights(host, resident, compressor, reader.bytes_read, began_at_s)


class _Reader:
    """Threads that read blocks, onto `device` by way of staging buffers. It is a context manager; an error inside
    cancels what was not begun."""

    def __init__(
        self,
        source: WeightSource,
        device: torch.device | None,
        num_threads: int,
        progress: Callable[[int], None] | None,
    ):
        self.bytes_read = self.reported_bytes = 0
        self._source, self._progress = source, progress
        self._resources = contextlib.ExitStack()
        self._staging = Staging(device, num_threads) if device else None
        if self._staging:
            self._resources.callback(self._staging.close)
        self._resources.enter_context(_single_threaded_ops())
        self._threads = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="weights")
        self._resources.callback(self._threads.shutdown, cancel_futures=True)

    def begin(self, group: GroupLayout, span: Tensor) -> Blocks:
        return {self._threads.submit(self._load, block, span): block.nbytes for block in cut_blocks(group)}

    def finish(self, blocks: Blocks, reports: bool = True) -> None:
        """Returns when the blocks are read and, on CUDA, their copies under way."""
        for future in concurrent.futures.as_completed(blocks):
            self.bytes_read += future.result()
            if reports:
                self.report(blocks[future])

    def report(self, nbytes: int) -> None:
        self.reported_bytes += nbytes
        if self._progress:
            self._progress(nbytes)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *exc: object) -> None:
        self._resources.close()

    def _load(self, block: Block, span: Tensor) -> int:
        if span.is_cuda:
            return self._staging.load(block, self._source, span)
        return block.fill(self._source, [byte_range(span, *each) for each in block.ranges])


class _Compressor:
    """Compresses groups by way of scratch spans on the device: on CUDA one is read while the one before it is
    compressed, and the blob of the one before that kept; on a CPU, where compressing takes all cores and most of the
    time, there is but one."""

    def __init__(self, device: torch.device, num_threads: int):
        self.compressed: dict[GroupId, KeptGroup] = {}
        self.from_bytes, self.compress_s = 0, 0.0
        self._device, self._num_threads = device, num_threads
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # no copy waits for a compression
        self._kept: concurrent.futures.Future | None = None

    def load(self, groups: Sequence[GroupLayout], reader: _Reader, memory: dict[GroupId, SpanMemory]) -> None:
        """Reads and compresses the groups, each into its `memory`. The largest comes first, since it needs most memory
        beside it and the device holds least then."""
        with concurrent.futures.ThreadPoolExecutor(1, "keeper", self._bind) as keeper:
            self._load(groups, reader, memory, keeper)
            if self._kept:
                self._kept.result()

    def _load(
        self,
        groups: Sequence[GroupLayout],
        reader: _Reader,
        memory: dict[GroupId, SpanMemory],
        keeper: concurrent.futures.Executor,
    ) -> None:
        begun: collections.deque[tuple[GroupLayout, Tensor, Blocks]] = collections.deque()

        def finish_oldest() -> None:
            group, scratch, blocks = begun.popleft()
            reader.finish(blocks, reports=False)
            blob = self._compress(group, scratch, reader.report)
            if self._kept:
                self._kept.result()
            self._kept = keeper.submit(memory[group.id].keep, group.id, blob)
            if not self._stream:
                self._kept.result()

        for group in sorted(groups, key=lambda group: -group.stored_bytes):
            if len(begun) > (self._stream is not None):
                finish_oldest()
            scratch = torch.zeros(group.stored_bytes, dtype=torch.uint8, device=self._device)
            self._synchronize()
            begun.append((group, scratch, reader.begin(group, scratch)))
            del scratch  # it goes when it is compressed
        while begun:
            finish_oldest()

    def _compress(self, group: GroupLayout, stored: Tensor, progress: Callable[[int], None]) -> Tensor:
        self._synchronize()
        began_at_s = time.perf_counter()
        with torch.cuda.stream(self._stream):
            compressed, blob = compress_group(group, stored, self._num_threads, progress)
        self._synchronize()
        self.compress_s += time.perf_counter() - began_at_s
        self.from_bytes += group.stored_bytes
        self.compressed[group.id] = compressed
        return blob

    def _bind(self) -> None:
        """Makes the device that of this thread, which registers memory."""
        if self._stream:
            torch.cuda.set_device(self._device)

    def _synchronize(self) -> None:
        if self._stream:
            torch.cuda.synchronize(self._device)


@contextlib.contextmanager
def _single_threaded_ops() -> Iterator[None]:
    """Lets torch use one thread for an operation: each reader thread would otherwise start a team of threads of its own
    for a conversion or a sum."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
