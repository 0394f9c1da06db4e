"""What this rank's hardware does, measured in well under a second, all ranks at once: the rates that predict a pass.

The link is measured on the real path, from the host arena (a buffer like it where nothing streams) to the ring.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from engine.runtime.arena import aligned_bytes
from engine.weights.host_arena import HostArena
from parallel.collectives import Collectives
from scheduler.time_model import Rates

LINK_BYTES = 2**31  # sustained on a GPU: long enough that all ranks copy at once
GPU_BYTES = 256 * 2**20
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


def link_gb_s(source: Tensor, target: Tensor, collectives: Collectives) -> float:
    """1e9 bytes/s of copying `source` (host, uint8) to `target`, while all ranks do so; best of five."""
    copies = -(-LINK_BYTES // source.nbytes) if target.device.type == "cuda" else 1

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source, non_blocking=True)

    def once() -> float:
        collectives.barrier()
        return seconds(copy, target.device, repeats=1)

    return copies * source.nbytes / min(once() for _ in range(5)) / 1e9


def measure_rates(
    host: Tensor | None, ring: Tensor, dtype: torch.dtype, hidden_size: int, collectives: Collectives
) -> Rates:
    """`host` (uint8) is a span of the registered arena, `ring` the device ring; both may be missing or small where
    nothing streams. Link and reduces are the slowest rank's; all ranks must call this together."""
    device = ring.device
    num_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    arena = None
    if host is None or not ring.nbytes:
        arena = HostArena(num_bytes)
        arena.tensor.fill_(1)
        if device.type == "cuda":
            arena.register()
        host, ring = arena.tensor, aligned_bytes(num_bytes, device)
    size = min(host.nbytes, ring.nbytes)
    link = link_gb_s(host[:size], ring[:size], collectives)
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
