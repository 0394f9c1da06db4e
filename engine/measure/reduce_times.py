"""Times all-reduces by size: the engine's own way (collectives.all_reduce), eagerly and in a CUDA graph, and plain NCCL
beside it where the engine's way is symmetric memory.

All ranks must call these functions together. The slowest rank's time counts.
"""

from collections.abc import Callable
from functools import partial

import torch
from penstock.engine.measure.rates import REPEATS, all_ranks, capture, seconds
from penstock.parallel.collectives import Collectives
from penstock.parallel.nccl import Nccl
from penstock.parallel.symmetric import Symmetric
from penstock.scheduler.units import KIB

SIZES = tuple(KIB * 4**power for power in range(1, 9))  # 4 KiB to 64 MiB
CPU_SIZES = SIZES[:5]  # to 1 MiB
RUN_BYTES = 2**28  # about so many are reduced in one timed run
MAX_CALLS, MIN_CALLS, CPU_CALLS = 50, 4, 5
Reduce = Callable[[torch.Tensor, str], None]


def default_sizes(device: torch.device) -> tuple[int, ...]:
    """The sizes to measure, in bytes."""
    return SIZES if device.type == "cuda" else CPU_SIZES


def ways(collectives: Collectives, device: torch.device) -> dict[str, tuple[Reduce, bool]]:
    """Ways to reduce by name: the call, and whether it runs in a graph."""
    calls: dict[str, Reduce] = {"": collectives.all_reduce}
    if isinstance(collectives, Symmetric):
        calls["nccl_"] = partial(Nccl.all_reduce, collectives)
    modes = {"eager": False, "graph": True} if device.type == "cuda" else {"eager": False}
    return {prefix + mode: (call, graph) for prefix, call in calls.items() for mode, graph in modes.items()}


def reduce_table(
    collectives: Collectives, device: torch.device, sizes: tuple[int, ...], dtype: torch.dtype
) -> list[dict[str, float]]:
    """A row a size: `bytes`, and seconds of one all-reduce by each way (`eager_s`, `graph_s`, `nccl_eager_s`, ...)."""
    rows = []
    for nbytes in sizes:
        tensor = torch.zeros(nbytes // dtype.itemsize, dtype=dtype, device=device)
        row = {"bytes": nbytes}
        for name, (reduce, in_graph) in ways(collectives, device).items():
            row[f"{name}_s"] = reduce_seconds(reduce, tensor, collectives, in_graph)
        rows.append(row)
    return rows


def reduce_seconds(reduce: Reduce, tensor: torch.Tensor, collectives: Collectives, in_graph: bool = False) -> float:
    """Seconds of one call among several in a row, after as many that line the ranks up."""
    device, num_calls = tensor.device, CPU_CALLS
    if device.type == "cuda":
        num_calls = max(MIN_CALLS, min(MAX_CALLS, RUN_BYTES // tensor.nbytes))

    def calls() -> None:
        for _ in range(num_calls):
            reduce(tensor, "probe")

    graph = None
    if in_graph:
        with collectives.for_graphs():
            graph = capture(calls, device)
    run, runs_s = (graph.replay if in_graph else calls), []
    try:
        for _ in range(REPEATS):
            collectives.barrier()
            runs_s.append(seconds(run, device, repeats=1))
    finally:
        if graph is not None:
            graph.reset()
    slowest = [max(times) for times in zip(*all_ranks(runs_s, collectives, device))]
    return min(slowest) / num_calls
