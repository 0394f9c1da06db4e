"""Sums through symmetric memory on two GPUs: right, counted, the same bits on both ranks, eagerly and in a graph."""

import json

import pytest
import torch
from commands import run_ranks

pytestmark = pytest.mark.gpu
RANK_SCRIPT = """
import json, sys, torch
from parallel.launch import resolve_launch
from parallel.rendezvous import connect
from parallel.topology import resolve_topology

launch = resolve_launch()
topology = resolve_topology(launch.rank, launch.tp_size, launch.local_rank)
group = connect(topology, launch.master_addr, launch.master_port)
rows = []
for dtype in (torch.bfloat16, torch.float32, torch.float16):
    for nbytes in (30, 4096, 262144, 1 << 20, 16 << 20, 64 << 20):
        seeds = [torch.Generator().manual_seed(rank) for rank in range(2)]
        parts = [torch.randn(nbytes // dtype.itemsize, generator=seed).to(dtype) for seed in seeds]
        expected = (parts[0].double() + parts[1].double()).cuda()
        before = group.num_symmetric
        summed = parts[launch.rank].cuda()
        group.all_reduce(summed, "eager")
        ways = group.num_symmetric - before
        captured = parts[launch.rank].cuda()
        static = captured.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            static.copy_(captured)
            group.all_reduce(static, "graph")
        for _ in range(3):
            static.fill_(float("nan"))
            graph.replay()
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(20):
            graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        close = torch.allclose(summed.double(), expected, rtol=tolerance, atol=tolerance)
        both = [torch.zeros_like(summed) for _ in range(2)]
        torch.distributed.all_gather(both, summed)
        rows.append([str(dtype), nbytes, ways, close, torch.equal(both[0], both[1]), torch.equal(summed, static),
                     events[0].elapsed_time(events[1]) * 50])
        graph.reset()
if launch.rank == 0:
    json.dump(rows, open(sys.argv[1], "w"))
group.close()
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_sums_of_every_size(tmp_path):
    script, out = tmp_path / "rank.py", tmp_path / "rows.json"
    script.write_text(RANK_SCRIPT)
    run_ranks(2, script, out, timeout=120)
    rows = json.loads(out.read_text())
    for dtype, nbytes, ways, close, same_on_both, graph_is_eager, microseconds in rows:
        print(f"{dtype:>15} {nbytes:>9} bytes {microseconds:8.1f} us in a graph, symmetric: {bool(ways)}")
        assert close and same_on_both and graph_is_eager, (dtype, nbytes)
        least = 4096 if "16" in dtype else 30  # of which 28 bytes are whole elements, and whole words
        most = 1 << 20 if dtype == "torch.float16" else 16 << 20
        assert ways == (least <= nbytes <= most), (dtype, nbytes)
