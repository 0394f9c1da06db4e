"""Probes as they could have been: four H200s, and the same figures without CUDA."""

from dataclasses import replace

from penstock.engine.planning.device_profile import Probe

FOUR = Probe(
    device="NVIDIA H200",
    device_type="cuda",
    num_ranks=4,
    date="2026-11-21",
    dtype="bfloat16",
    memory_bytes=141 * 10**9,
    link_gb_s=[55.1, 53.0, 48.0, 40.0],
    link_alone_gb_s=[55.1, 55.2, 55.1, 55.0],
    link_together_gb_s=[41.0, 40.5, 40.0, 40.2],
    memory_gb_s=[4100.0, 4130.0, 4120.0, 4110.0],
    gemm_tflops=[740.0, 730.0, 735.0, 745.0],
    decompress_gb_s=[2010.0, 2000.0, 2020.0, 2005.0],
    launch_s=2.5e-6,
    node_s=1e-6,
    reduces=[
        {"bytes": 4096, "eager_s": 40e-6, "graph_s": 8e-6, "nccl_eager_s": 42e-6, "nccl_graph_s": 17e-6},
        {"bytes": 16384, "eager_s": 41e-6, "graph_s": 9e-6, "nccl_eager_s": 48e-6, "nccl_graph_s": 17.4e-6},
        {"bytes": 64 * 2**20, "eager_s": 330e-6, "graph_s": 332e-6, "nccl_eager_s": 325e-6, "nccl_graph_s": 332e-6},
    ],
)
CPU = replace(FOUR, decompress_gb_s=[0.1] * 4, device="x86_64", device_type="cpu", node_s=None, memory_bytes=None)
