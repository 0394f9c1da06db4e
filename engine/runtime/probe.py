"""What this rank's hardware does, measured in well under a second, all ranks at once: the rates that predict a pass.

The link is measured on the real path, by a stretch of the copy lane: spans of the host arena into their slots of the
ring (a buffer of its own where nothing streams).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.runtime.arena import aligned_bytes
from engine.weights.host_arena import HostArena
from parallel.collectives import Collectives
from scheduler.time_model import Rates

GPU_BYTES = 2**29
CPU_BYTES = 8 * 2**20
OPS_A_STEP = 6  # kernels that an eager step launches, in the mean


def seconds(run: Callable[[], None], device: torch.device, repeats: int = 5) -> float:
    """The best of `repeats`, after one to warm up; waits for the device."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(repeats))


def link_gb_s(copies: list[tuple[Tensor, Tensor]], collectives: Collectives) -> float:
    """1e9 bytes/s of a sustained run of copies (host source, device target; uint8), while all ranks do so; best of
    five."""
    device = copies[0][1].device

    def run() -> None:
        for source, target in copies:
            target.copy_(source, non_blocking=True)

    def once() -> float:
        collectives.barrier()
        return seconds(run, device, repeats=1)

    return sum(source.nbytes for source, _ in copies) / min(once() for _ in range(5)) / 1e9


def measure_rates(
    copies: list[tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    hidden_size: int,
    collectives: Collectives,
    device: torch.device,
) -> Rates:
    """`copies` are spans of the registered arena and their slots in the ring; without any, a buffer like them serves.
    Link and reduces are the slowest rank's; all ranks must call this together."""
    num_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    arena = None
    if not copies:
        arena = HostArena(num_bytes)
        arena.tensor.fill_(1)
        if device.type == "cuda":
            arena.register()
        copies = [(arena.tensor, aligned_bytes(num_bytes, device))]
    link = link_gb_s(copies, collectives)
    data = torch.ones(num_bytes // 4, device=device)
    memory_s = seconds(lambda: data.sum(), device)
    side = 4096 if device.type == "cuda" else 256
    matrix = torch.randn(side, side, device=device).to(dtype)
    gemm_s = seconds(lambda: matrix @ matrix, device)
    row = torch.zeros(hidden_size, device=device, dtype=dtype)
    launch_s = seconds(lambda: [row.add_(0.0) for _ in range(100)], device) / 100
    small_s = seconds(lambda: collectives.all_reduce(row, "probe"), device)
    large = torch.zeros(num_bytes // 8, device=device)
    large_s = seconds(lambda: collectives.all_reduce(large, "probe"), device)
    del copies
    if arena is not None:
        arena.close()
    link, reduce_gb_s = _slowest([link, large.nbytes / max(large_s - small_s, 1e-9) / 1e9], collectives, device)
    return Rates(
        link_gb_s=link,
        memory_gb_s=data.nbytes / memory_s / 1e9,
        gemm_tflops=2 * side**3 / gemm_s / 1e12,
        reduce_latency_s=small_s,
        reduce_gb_s=reduce_gb_s,
        source="measured",
        step_latency_s=OPS_A_STEP * launch_s,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
    )


def _slowest(rates: list[float], collectives: Collectives, device: torch.device) -> list[float]:
    """The least of each rate over all ranks."""
    table = torch.zeros(collectives.size, len(rates), device=device)
    table[collectives.rank] = torch.tensor(rates)
    collectives.all_reduce(table, "probe")
    return table.amin(0).tolist()
