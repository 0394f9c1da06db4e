"""Measures rates: those that `generate` needs, in about a second and on the engine's own copy lane, and those of
`penstock probe`, in a few seconds and without a model.
"""

import dataclasses
import datetime
from collections.abc import Iterable

import torch
from penstock.engine.measure.rates import (
    CPU_BYTES,
    GPU_BYTES,
    Copies,
    all_ranks,
    decompress_gb_s,
    gemm_tflops,
    launch_s,
    link_buffers,
    link_gb_s,
    memory_gb_s,
    seconds,
)
from penstock.engine.measure.reduce_times import default_sizes, reduce_seconds, reduce_table
from penstock.engine.planning.device_profile import KERNELS_A_STEP, NODES_A_STEP, Probe, sending_s
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.runtime.binding import on_own_device
from penstock.engine.runtime.pass_runner import PassRunner
from penstock.parallel.collectives import Collectives
from penstock.parallel.topology import Topology, device_name
from penstock.scheduler.batching.batch import Batch, BatchRow
from penstock.scheduler.batching.pages import RESERVED_PAGE
from penstock.scheduler.cost.pass_work import PassWork
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.units import GB, GIB, gb_s

LINK_BYTES = 8 * GIB  # in one run: memory that several ranks share holds a higher rate for a moment than for long
WARM_BYTES = 32 * GIB  # before the first run: the first copies of a fresh machine are slower
GPU_BUFFER_BYTES, CPU_BUFFER_BYTES, CPU_LINK_BYTES = GIB, CPU_BYTES, 4 * CPU_BYTES


@on_own_device
def measure_engine(runner: PassRunner, plan: EnginePlan, work: PassWork, link_bytes: int) -> Rates:
    """The rates of a running engine, the link's over the copy lane's first `link_bytes` (all of a pass's, if they are
    fewer). All ranks must call this together. The ring, which this copies over, is filled again on all of them."""
    executor, device, collectives = runner.executor, runner.device, runner.model.collectives
    copies, dtype = executor.stretch(link_bytes), getattr(torch, plan.dtype)
    rates = measure_rates(copies, dtype, plan.spec.hidden_size, collectives, device, runner.graphs is not None)
    if plan.residency.compressed:
        rates = dataclasses.replace(rates, decompress_gb_s=decompress_gb_s(device))
    executor.empty_ring()
    executor.fill_ring()
    if device.type == "cpu":
        rates = dataclasses.replace(rates, step_latency_s=_step_latency_s(runner, work, rates))
    else:
        torch.cuda.synchronize(device)
    collectives.barrier()
    executor.counters.clear()  # what was measured does not count
    executor.ledger.clear()
    return rates


def _step_latency_s(runner: PassRunner, work: PassWork, rates: Rates) -> float:
    """Seconds that a step costs on a CPU however little it computes, from passes over one token, which write to the
    reserved page. (A GPU's lanes hide this cost, so there launches are timed.)"""
    batch = Batch((BatchRow(index=0, tokens=(0,), start=0, pages=(RESERVED_PAGE,), samples=True, sampling=None),))

    def run() -> None:
        runner.submit(batch)
        runner.collect()

    known_s = work.num_reduces * rates.reduce_latency_s + work.streamed_bytes / rates.link_gb_s / GB
    return max(seconds(run, runner.device, repeats=3) - known_s, 0.0) / work.num_steps(batch.shape)


def measure_rates(
    copies: Copies,
    dtype: torch.dtype,
    hidden_size: int,
    collectives: Collectives,
    device: torch.device,
    in_graphs: bool,
) -> Rates:
    """Rates of this rank's hardware; of link and reduces the slowest rank's. `copies` are spans of the registered arena
    and their slots in the ring; if there are none, buffers of the same kind are copied. Reduces are measured in CUDA
    graphs if decode passes are graphs. All ranks must call this together."""
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
        reduce_gb_s = gb_s(large.nbytes, sending_s(large_s, small_s))
    return Rates(
        link_gb_s=min(rate for (rate,) in all_ranks([link], collectives, device)),
        memory_gb_s=memory,
        gemm_tflops=gemm_tflops(dtype, device),
        reduce_latency_s=small_s,
        reduce_gb_s=reduce_gb_s,
        source="measured",
        link_note="alone" if collectives.size == 1 else "with all ranks copying at once",
        step_latency_s=KERNELS_A_STEP * launch_s(device),
        node_latency_s=NODES_A_STEP * launch_s(device, in_graph=True) if in_graphs else None,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
    )


def run_probe(topology: Topology, collectives: Collectives, dtype: str) -> Probe:
    """Measures the hardware of all ranks, which must call this together and get the same result."""
    device, size = topology.device, topology.tp_size
    on_gpu = device.type == "cuda"
    by_ranks, alone, together = _links(collectives, device)
    own = [memory_gb_s(device), gemm_tflops(getattr(torch, dtype), device), decompress_gb_s(device), launch_s(device)]
    own.append(launch_s(device, in_graph=True) if on_gpu else 0.0)
    memory, gemm, decompression, launch, node = zip(*all_ranks(own, collectives, device))
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
        decompress_gb_s=_rounded(decompression),
        launch_s=max(launch),
        node_s=max(node) if on_gpu else None,
        reduces=reduce_table(collectives, device, default_sizes(device), getattr(torch, dtype)) if size > 1 else [],
    )


def _rounded(rates: Iterable[float]) -> list[float]:
    """Rounds rates to four digits: more mean nothing."""
    return [float(f"{rate:.4g}") for rate in rates]


def _links(collectives: Collectives, device: torch.device) -> tuple[list[float], list[float], list[float]]:
    """Link rates: of the slowest of the first 1, 2, ... ranks while these copy; by rank, each alone and all at once."""
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
