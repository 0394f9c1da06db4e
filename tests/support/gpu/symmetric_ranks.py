"""One rank of test_symmetric.py: sums of every size and dtype, eagerly and in a graph, and large ones in pieces."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from penstock.parallel import symmetric
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
    with group.for_graphs():
        group.all_reduce(static, "warm-up")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        static.copy_(part)
        group.all_reduce(static, "graph")
    graph.replay()
    torch.cuda.synchronize()
    static.fill_(float("nan"))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    graph.reset()
    return static, start.elapsed_time(end) * 1e3 / REPLAYS


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


def sum_in_pieces(group: Symmetric) -> dict:
    """64 MiB by NCCL and in pieces; 16 MiB whole and in pieces."""
    parts = parts_of(group, 64 * MIB, torch.bfloat16)
    part = parts[group.rank].cuda().view(-1, 4096)
    nccl, pieces = part.clone(), part.clone()
    whole, cut = part[:2048].clone(), part[:2048].clone()
    group.all_reduce(nccl, "nccl")
    plain, before = (symmetric.LARGEST_BYTES, symmetric.TWO_SHOT_BYTES), group.num_symmetric
    symmetric.LARGEST_BYTES = 64 * MIB
    group.all_reduce(pieces, "pieces")
    in_graph, microseconds = sum_in_graph(group, part)
    group.all_reduce(whole, "whole")
    symmetric.TWO_SHOT_BYTES = 4 * MIB
    group.all_reduce(cut, "cut")
    symmetric.LARGEST_BYTES, symmetric.TWO_SHOT_BYTES = plain
    return {
        "ways": group.num_symmetric - before,
        "close": is_close(pieces, nccl, parts),
        "same_on_all": same_on_all(pieces),
        "graph_is_eager": torch.equal(pieces, in_graph),
        "whole_is_cut": torch.equal(whole, cut),
        "microseconds": microseconds,
    }


def work(topology: Topology, group: Symmetric) -> None:
    rows = [sum_up(group, dtype, nbytes) for dtype in DTYPES for nbytes in SIZES]
    report = {"rows": rows, "pieces": sum_in_pieces(group)}
    if topology.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(report))


def main() -> None:
    run_in_group(resolve_launch(), "cuda", work)


if __name__ == "__main__":
    sys.exit(run_rank(main))
