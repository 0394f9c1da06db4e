"""Finds out whether the GPUs of a group reach each other's memory: each rank says what it sees, and all judge alike."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from penstock.parallel.processes import host_id


@dataclass(frozen=True)
class Reach:
    """The facts that one rank knows of its device: the host, the GPU's identity ("" for a CPU), and the identities of
    the GPUs on this host whose memory it can use."""

    host: str
    gpu: str
    peers: tuple[str, ...] | list[str] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def reach_of(device: torch.device) -> Reach:
    """The facts of this process' device."""
    if device.type != "cuda":
        return Reach(host_id(), "")
    others = [gpu for gpu in range(torch.cuda.device_count()) if gpu != device.index]
    peers = [gpu_id(gpu) for gpu in others if torch.cuda.can_device_access_peer(device, gpu)]
    return Reach(host_id(), gpu_id(device.index), peers)


def gpu_id(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


def all_reach_each_other(reaches: list[Reach]) -> bool:
    """Tells whether all GPUs are on one host and each can use the memory of every other one. All ranks have the same
    `reaches`, one a rank, so they agree."""
    same_host = len({one.host for one in reaches}) == 1
    return same_host and all(
        other.gpu in one.peers
        for rank, one in enumerate(reaches)
        for other_rank, other in enumerate(reaches)
        if other_rank != rank
    )
