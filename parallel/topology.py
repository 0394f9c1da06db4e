"""The device and the NUMA node of a rank, which are found once at start.

A rank's host memory should lie on the NUMA node to which its GPU is attached: the link is slower from another one.
Linux allocates a page on the node of the CPU that first touches it, so it is enough to restrict the process to the
node's CPUs before the arena is allocated. This file does not know how ranks find each other (launch.py, rendezvous.py).
"""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

_SYS = Path("/sys")


@dataclass(frozen=True)
class Topology:
    """The device of one rank. `numa_node` is None where it is unknown or does not matter (CPU)."""

    rank: int
    tp_size: int
    local_rank: int
    device: torch.device
    numa_node: int | None = None

    def describe(self) -> str:
        """Returns one line, e.g. `rank 1 of 2: cuda:1 (NVIDIA H200), NUMA node 0, 48 CPUs`."""
        name = f" ({device_name(self.device)})" if self.device.type == "cuda" else ""
        node = "unknown" if self.numa_node is None else self.numa_node
        numa = f", NUMA node {node}" if self.device.type == "cuda" else ""
        cpus = len(_affinity())
        return f"rank {self.rank} of {self.tp_size}: {self.device}{name}{numa}, {cpus} CPU{'s' * (cpus != 1)}"


def device_name(device: torch.device) -> str:
    """The name of a GPU, or the architecture of a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def resolve_topology(
    rank: int, tp_size: int, local_rank: int, device: str = "auto", num_local_ranks: int | None = None
) -> Topology:
    """Chooses the device of a rank: cuda:local_rank where torch sees a GPU and the CPU is not asked for, else the CPU.

    `num_local_ranks`, of those that see the same GPUs, lets rank 0 refuse too few before any other rank starts.
    Raises ValueError, naming the flag, if there is no CUDA device or fewer than these ranks.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device={device!r}: expected auto, cuda or cpu")
    num_gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and num_gpus == 0:
        raise ValueError("device=cuda: no CUDA device is visible to torch")
    if num_gpus == 0:
        return Topology(rank, tp_size, local_rank, torch.device("cpu"))
    needed = max(num_local_ranks or 0, local_rank + 1)
    if needed > num_gpus:
        raise ValueError(
            f"device={device}: {needed} ranks on this host need {needed} GPUs, {num_gpus} visible "
            "(lower tensor_parallel_size, or device=cpu)"
        )
    device = torch.device("cuda", local_rank)
    return Topology(rank, tp_size, local_rank, device, read_numa_node(local_rank))


def read_numa_node(gpu: int, sys: Path = _SYS) -> int | None:
    """The NUMA node of a GPU, found by its PCI address; None where the system does not say."""
    properties = torch.cuda.get_device_properties(gpu)
    parts = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    if None in parts:
        return None
    domain, bus, device = parts
    return _read_node(sys / f"bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/numa_node")


def _read_node(path: Path) -> int | None:
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # the kernel writes -1 on hosts with one node


def bind_to_numa(topology: Topology, sys: Path = _SYS) -> set[int] | None:
    """Restricts this process to the CPUs of its NUMA node, so that the host memory which it first touches lies there.

    Returns the CPUs to which it is bound. Returns None if nothing changed: the node is unknown, or the process may use
    none of its CPUs (a container's CPU set wins). Threads that already run keep their CPUs, so call this before
    loading.
    """
    if topology.numa_node is None:
        return None
    try:
        text = (sys / f"devices/system/node/node{topology.numa_node}/cpulist").read_text()
    except OSError:
        return None
    cpus = parse_cpu_list(text) & _affinity()
    if not cpus:
        return None
    os.sched_setaffinity(0, cpus)
    return cpus


def parse_cpu_list(text: str) -> set[int]:
    """Parses the list format of Linux: `0-2,8` is {0, 1, 2, 8}; an empty line is no CPU."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
