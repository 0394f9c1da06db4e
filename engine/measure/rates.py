"""Measures rates of this rank's hardware, one function for each. Each warms up first and takes the best of several
runs (but of a GPU's products one long one): other work on a machine only ever adds time, and the first copies and
kernels of a fresh one are slower.
"""

import contextlib
from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from penstock.engine.compute.arena import aligned_bytes
from penstock.engine.weights.codec import CompressedLayout, compress, decompress
from penstock.engine.weights.host_arena import HostArena
from penstock.parallel.collectives import Collectives
from penstock.scheduler.units import MIB, gb_s
from torch import Tensor

REPEATS = 3
GPU_BYTES, CPU_BYTES = 2**29, 8 * MIB  # more than a GPU's L2 cache holds
GPU_SIDE, CPU_SIDE = 8192, 256  # of the matrices that are multiplied
NUM_READS, NUM_GEMMS, NUM_LAUNCHES = 8, 3, 100  # in one timed run, so that starting and ending it does not count
GEMMS_S = 0.1  # that a GPU multiplies for: its power soon bounds its clock
Copies = list[tuple[Tensor, Tensor]]


def seconds(run: Callable[[], object], device: torch.device, repeats: int = REPEATS, warm_ups: int = 1) -> float:
    """Seconds of the best of `repeats` runs, on the device's clock, after `warm_ups` that are enqueued before."""
    for _ in range(warm_ups):
        run()
    return min(_seconds_cuda(run) if device.type == "cuda" else _seconds_cpu(run) for _ in range(repeats))


def _seconds_cpu(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def _seconds_cuda(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capture(run: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """`run` as a graph, after one eager call on the same stream. Drop it (`reset`) before the group is left, also after
    an error, whose traceback would keep it."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run()
    except BaseException:
        graph.reset()
        raise
    return graph


@contextlib.contextmanager
def link_buffers(nbytes: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Host memory, filled and registered, and device memory: uint8 (nbytes,) each."""
    arena = HostArena(nbytes)
    arena.tensor.fill_(1)
    try:
        if device.type == "cuda":
            arena.register()
        yield arena.tensor, aligned_bytes(nbytes, device)
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        arena.close()


def link_gb_s(copies: Copies, collectives: Collectives, ranks: range | None = None, warm_ups: int = 1) -> float:
    """The rate in 1e9 bytes/s of a run of copies (source, target; uint8) while `ranks` (None: all) do so and the others
    idle behind a barrier, where the rate is 0. All ranks must call this together."""
    device, best_s = copies[0][1].device, float("inf")
    is_active = ranks is None or collectives.rank in ranks

    def run() -> None:
        for source, target in copies:
            target.copy_(source, non_blocking=True)

    for index in range(warm_ups + REPEATS):
        collectives.barrier()
        if is_active:
            run_s = seconds(run, device, repeats=1, warm_ups=0)
            best_s = min(best_s, run_s) if index >= warm_ups else best_s
    collectives.barrier()
    return gb_s(sum(source.nbytes for source, _ in copies), best_s)


def memory_gb_s(device: torch.device) -> float:
    """The rate in 1e9 bytes/s at which a sum reads."""
    data = torch.ones((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    run_s = seconds(lambda: [data.sum() for _ in range(NUM_READS)], device)
    return gb_s(NUM_READS * data.nbytes, run_s)


def decompress_gb_s(device: torch.device) -> float:
    """The rate in 1e9 bytes/s of bf16 at which compressed Gaussian weights are decompressed; on a GPU in a graph, from
    several matrices that together are more than the L2 cache holds."""
    nbytes, number = (GPU_BYTES // 16, 4) if device.type == "cuda" else (CPU_BYTES // 8, 1)
    weights = torch.randn(nbytes // 2, device=device).to(torch.bfloat16)
    layout, blob = compress(weights)
    pairs = [(blob.clone(), torch.empty_like(weights)) for _ in range(number)]
    run_s = decompress_seconds(layout, pairs, device)
    return gb_s(number * nbytes, run_s)


def decompress_seconds(layout: CompressedLayout, pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Seconds to decompress all pairs (blob, out), on a GPU in a graph."""

    def run() -> None:
        for blob, out in pairs:
            decompress(layout, blob, out)

    if device.type == "cpu":
        return seconds(run, device)
    graph = capture(run, device)
    run_s = seconds(graph.replay, device)
    graph.reset()
    return run_s


def gemm_tflops(dtype: torch.dtype, device: torch.device) -> float:
    """The rate in 1e12 FLOP/s of products of square matrices of random numbers (zeros would take less power, and run
    faster). A GPU multiplies for as long as a pass of many tokens, since no pass holds its rate of the first moment: an
    H200 has 793 for 4 ms, 709 over 0.1 s, and its linears 718 in passes of 200 ms."""
    side = GPU_SIDE if device.type == "cuda" else CPU_SIDE
    matrix = torch.randn(side, side, device=device).to(dtype)
    out = torch.empty_like(matrix)

    def multiply(number: int) -> None:
        for _ in range(number):
            torch.mm(matrix, matrix, out=out)

    number, run_s = NUM_GEMMS, seconds(lambda: multiply(NUM_GEMMS), device)
    if device.type == "cuda":
        number = max(round(GEMMS_S * NUM_GEMMS / run_s), NUM_GEMMS)
        run_s = seconds(lambda: multiply(number), device, repeats=1, warm_ups=0)
    return number * 2 * side**3 / run_s / 1e12


def launch_s(device: torch.device, in_graph: bool = False) -> float:
    """Seconds that a kernel costs which computes next to nothing: launched one by one, or as a node of a graph."""
    row = torch.zeros(1024, device=device)

    def run() -> None:
        for _ in range(NUM_LAUNCHES):
            row.add_(0.0)

    if not in_graph:
        return seconds(run, device) / NUM_LAUNCHES
    graph = capture(run, device)
    graph_s = seconds(graph.replay, device) / NUM_LAUNCHES
    graph.reset()
    return graph_s


def all_ranks(values: list[float], collectives: Collectives, device: torch.device) -> list[list[float]]:
    """Every rank's values, by rank. All ranks must call this together."""
    table = torch.zeros(collectives.size, len(values), device=device, dtype=torch.float64)
    table[collectives.rank] = torch.tensor(values, dtype=torch.float64)
    collectives.all_reduce(table, "probe")
    return table.tolist()
