"""Measured rates: the few of `generate`, in about a second and on the engine's own copy lane, and the many of
`penstock probe`, in a few seconds and without a model.
"""

import datetime
from collections.abc import Iterable

import torch

from engine.device_profile import KERNELS_A_STEP, NODES_A_STEP, Probe
from engine.runtime.measure import (
    CPU_BYTES,
    GPU_BYTES,
    Copies,
    all_ranks,
    gemm_tflops,
    launch_s,
    link_buffers,
    link_gb_s,
    memory_gb_s,
)
from engine.runtime.reduce_times import default_sizes, reduce_seconds, reduce_table
from parallel.collectives import Collectives
from parallel.topology import Topology, device_name
from scheduler.time_model import Rates

LINK_BYTES = 8 * 2**30  # in one run: memory that several ranks share holds a higher rate for a moment than for long
WARM_BYTES = 32 * 2**30  # before the first run: the first copies of a fresh machine are slower
GPU_BUFFER_BYTES, CPU_BUFFER_BYTES, CPU_LINK_BYTES = 2**30, CPU_BYTES, 4 * CPU_BYTES


def measure_rates(
    copies: Copies,
    dtype: torch.dtype,
    hidden_size: int,
    collectives: Collectives,
    device: torch.device,
    in_graphs: bool,
) -> Rates:
    """`copies` are spans of the registered arena and their slots in the ring; without any, a buffer like them serves.
    Reduces are measured in CUDA graphs if decode passes are. Link and reduces are the slowest rank's; all ranks
    must call this together."""
    num_bytes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    if copies:
        link = link_gb_s(copies, collectives)
    else:
        with link_buffers(num_bytes, device) as pair:
            link = link_gb_s([pair], collectives)
    memory = memory_gb_s(device)
    small_s, reduce_gb_s = 0.0, memory  # one rank: nothing is sent
    if collectives.size > 1:
        row, large = torch.zeros(hidden_size, device=device, dtype=dtype), torch.zeros(num_bytes // 8, device=device)
        small_s = reduce_seconds(collectives.all_reduce, row, collectives, in_graphs)
        large_s = reduce_seconds(collectives.all_reduce, large, collectives)
        reduce_gb_s = large.nbytes / max(large_s - small_s, 1e-9) / 1e9
    return Rates(
        link_gb_s=min(rate for (rate,) in all_ranks([link], collectives, device)),
        memory_gb_s=memory,
        gemm_tflops=gemm_tflops(dtype, device),
        reduce_latency_s=small_s,
        reduce_gb_s=reduce_gb_s,
        source="measured",
        step_latency_s=KERNELS_A_STEP * launch_s(device),
        node_latency_s=NODES_A_STEP * launch_s(device, in_graph=True) if in_graphs else None,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
    )


def run_probe(topology: Topology, collectives: Collectives, dtype: str) -> Probe:
    """Everything about the hardware of the group; the same on all ranks, which must call this together."""
    device, size = topology.device, topology.tp_size
    on_gpu = device.type == "cuda"
    by_ranks, alone, together = _links(collectives, device)
    own = [memory_gb_s(device), gemm_tflops(getattr(torch, dtype), device), launch_s(device)]
    own.append(launch_s(device, in_graph=True) if on_gpu else 0.0)
    memory, gemm, launch, node = zip(*all_ranks(own, collectives, device))
    return Probe(
        device=device_name(device),
        device_type=device.type,
        num_ranks=size,
        date=datetime.date.today().isoformat(),
        dtype=dtype,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        link_gb_s=_rounded(by_ranks),
        link_alone_gb_s=_rounded(alone),
        link_together_gb_s=_rounded(together),
        memory_gb_s=_rounded(memory),
        gemm_tflops=_rounded(gemm),
        launch_s=max(launch),
        node_s=max(node) if on_gpu else None,
        reduces=reduce_table(collectives, device, default_sizes(device), getattr(torch, dtype)) if size > 1 else [],
    )


def _rounded(rates: Iterable[float]) -> list[float]:
    """To the digits that mean something."""
    return [float(f"{rate:.4g}") for rate in rates]


def _links(collectives: Collectives, device: torch.device) -> tuple[list[float], list[float], list[float]]:
    """The slowest of the first 1, 2, ... ranks while these copy; by rank, each alone; by rank, all at once."""
    on_gpu, size = device.type == "cuda", collectives.size
    buffer_bytes, link_bytes = (GPU_BUFFER_BYTES, LINK_BYTES) if on_gpu else (CPU_BUFFER_BYTES, CPU_LINK_BYTES)
    with link_buffers(buffer_bytes, device) as pair:
        copies = [pair] * (link_bytes // buffer_bytes)
        warm_ups = WARM_BYTES // LINK_BYTES if on_gpu else 1

        def rates(ranks: range, warm_ups: int = 1) -> list[float]:
            own = link_gb_s(copies, collectives, ranks, warm_ups=warm_ups)
            return [rate for (rate,) in all_ranks([own], collectives, device)]

        together = rates(range(size), warm_ups)
        alone = [rates(range(rank, rank + 1))[rank] for rank in range(size)]
        between = [min(rates(range(number))[:number]) for number in range(2, size)]
    by_ranks = [alone[0], *between, min(together)] if size > 1 else alone
    return by_ranks, alone, together
