"""One rank of test_symmetric.py: sums of every size and dtype, eagerly and in a graph, and torch's two-shot beside."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from penstock.parallel.group import run_in_group
from penstock.parallel.launch import resolve_launch, run_rank
from penstock.parallel.symmetric import Symmetric
from penstock.parallel.topology import Topology
from penstock.scheduler.units import MIB

from tests.support.rounding import sums_apart

SIZES = (30, 4096, 262144, MIB, 16 * MIB, 64 * MIB)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REPLAYS = 20


def parts_of(group: Symmetric, nbytes: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Every rank's."""
    seeds = [torch.Generator().manual_seed(rank) for rank in range(group.size)]
    return [torch.randn(nbytes // dtype.itemsize, generator=seed).to(dtype) for seed in seeds]


def is_close(sums: torch.Tensor, expected: torch.Tensor, parts: list[torch.Tensor]) -> bool:
    """Within what roundings of partial sums add up to; those of two ranks have one."""
    sizes = sum(part.double().abs() for part in parts).view(sums.shape).to(sums.device)
    bound = sums_apart(len(parts) - 1, sizes, sums.dtype)
    return bool(((sums.double() - expected.double()).abs() <= bound).all())


def same_on_all(tensor: torch.Tensor) -> bool:
    everybody = [torch.zeros_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everybody, tensor)
    return all(torch.equal(one, tensor) for one in everybody)


def sum_in_graph(group: Symmetric, part: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The sum that a graph leaves behind when it was replayed often, and the microseconds of a replay."""
    static = part.clone()

    def run() -> None:
        static.copy_(part)
        group.all_reduce(static, "graph")

    with group.for_graphs():
        group.all_reduce(static, "warm-up")
    return static, timed_in_graph(run, group, before=lambda: static.fill_(float("nan")))


def timed_in_graph(run: Callable[[], None], group: Symmetric, before: Callable[[], object] = lambda: None) -> float:
    """Microseconds of a replay of `run`, of many in a row; `before` runs ahead of them."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    graph.replay()
    torch.cuda.synchronize()
    group.barrier()
    before()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    graph.reset()
    return start.elapsed_time(end) * 1e3 / REPLAYS


def sum_up(group: Symmetric, dtype: torch.dtype, nbytes: int) -> dict:
    parts = parts_of(group, nbytes, dtype)
    part, before = parts[group.rank].cuda(), group.num_symmetric
    sums = part.clone()
    group.all_reduce(sums, "eager")
    ways = group.num_symmetric - before
    in_graph, microseconds = sum_in_graph(group, part)
    return {
        "dtype": str(dtype),
        "bytes": nbytes,
        "ways": ways,
        "close": is_close(sums, sum(one.double() for one in parts).cuda(), parts),
        "same_on_all": same_on_all(sums),
        "graph_is_eager": torch.equal(sums, in_graph),
        "microseconds": microseconds,
    }


def two_shot_microseconds(group: Symmetric) -> dict[int, float]:
    """Of torch's own kernel for such sums, in a graph with the copies to and from its buffer, by bytes."""
    name, found = dist.group.WORLD.group_name, {}
    for nbytes in SIZES[3:5]:
        part = torch.ones(nbytes // 2, dtype=torch.bfloat16, device="cuda")
        buffer = symm_mem.empty(nbytes // 2, dtype=torch.bfloat16, device="cuda")
        symm_mem.rendezvous(buffer, name)

        def run(part=part, buffer=buffer) -> None:
            buffer.copy_(part)
            torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", name)
            part.copy_(buffer)

        found[nbytes] = timed_in_graph(run, group)
    return found


def work(topology: Topology, group: Symmetric) -> None:
    rows = [sum_up(group, dtype, nbytes) for dtype in DTYPES for nbytes in SIZES]
    report = {"rows": rows, "two_shot": two_shot_microseconds(group)}
    if topology.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(report))


def main() -> None:
    run_in_group(resolve_launch(), "cuda", work)


if __name__ == "__main__":
    sys.exit(run_rank(main))
