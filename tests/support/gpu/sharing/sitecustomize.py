"""Ranks that share a GPU. Python imports this module at the start of every process of __main__.py.

Ranks sum as on GPUs of their own: in our kernels through each other's memory, and by NCCL, which takes each for a host
and so goes over the network. The GPU computes for one rank at a time, in slices of milliseconds: nothing here says how
fast several ranks are.
"""

import dataclasses
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[4]))

from tests.support.after_import import AfterImport

os.environ |= {
    "CUDA_VISIBLE_DEVICES": "0",
    "NCCL_HOSTID": str(os.getpid()),
    "NCCL_SOCKET_IFNAME": "lo",
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    "TESTS_RANKS_A_GPU": "4",
}


def all_on_the_first(topology):
    resolve = topology.resolve_topology

    def resolve_topology(rank, tp_size, local_rank, device="auto", num_local_ranks=None):
        found = resolve(rank, tp_size, 0, device)
        return dataclasses.replace(found, local_rank=local_rank)

    topology.resolve_topology = resolve_topology


def reach_by_process(reach):
    """Each process says that its GPU is another one, and that it reaches those of its host."""
    gpu_id = reach.gpu_id
    reach.gpu_id = lambda index: f"{gpu_id(index)} of process {os.getpid()}"
    reach.all_reach_each_other = lambda reaches: len({one.host for one in reaches}) == 1


AfterImport("penstock.parallel.topology", all_on_the_first)
AfterImport("penstock.parallel.reach", reach_by_process)
