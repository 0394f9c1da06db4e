"""How ranks meet: a store at one address, then a process group over it, then the Collectives of the device.

What it does not know: who starts the ranks (launch.py), and what they say to each other afterwards.
"""

import itertools
import os
import socket
import time
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.collectives import Collectives, Gloo, Solo, peer_errors
from parallel.failure import PeerLost
from parallel.nccl import Nccl
from parallel.symmetric import Symmetric
from parallel.topology import Topology

_POLL_S = 0.02
_generation = itertools.count()  # keys of an earlier group in a launcher's store must not be read again


def connect(
    topology: Topology,
    master_addr: str,
    master_port: int,
    *,
    timeout_s: float = 600.0,
    listener: socket.socket | None = None,
    check: Callable[[], None] | None = None,
) -> Collectives:
    """Join the group of `topology.tp_size` ranks that meet at `master_addr:master_port`.

    `timeout_s` bounds the meeting, every tensor collective and every barrier. `listener` is the bound socket
    of a self-launch (rank 0 takes it over); `check` is called while rank 0 waits and may raise. Raises
    ValueError if the port is in use or this process has a group already, PeerLost if ranks are missing.
    """
    if topology.tp_size == 1:
        return Solo()
    if dist.is_initialized():
        raise ValueError("this process belongs to a process group already: close it (or the other LLM) first")
    _prepare_environment(master_addr)
    timeout = timedelta(seconds=timeout_s)
    store = _open_store(topology.rank, master_addr, master_port, timeout, listener)
    _meet(store, topology.rank, topology.tp_size, timeout_s, check)
    backend, device = ("nccl", topology.device) if topology.device.type == "cuda" else ("gloo", None)
    if device is not None:
        torch.cuda.set_device(device)
    with peer_errors():
        dist.init_process_group(
            backend,
            store=store,
            rank=topology.rank,
            world_size=topology.tp_size,
            timeout=timeout,
            device_id=device,
        )
        return _kind(topology)(timeout_s)


def _kind(topology: Topology) -> type[Collectives]:
    """Symmetric memory needs every GPU of the group to reach every other one; where it cannot, that is said once."""
    if topology.device.type == "cpu":
        return Gloo
    others = [gpu for gpu in range(min(topology.tp_size, torch.cuda.device_count())) if gpu != topology.device.index]
    if all(torch.cuda.can_device_access_peer(topology.device, gpu) for gpu in others):
        return Symmetric
    if topology.rank == 0:
        warnings.warn("GPUs cannot reach each other's memory: all-reduces go through NCCL alone", stacklevel=3)
    return Nccl


def _prepare_environment(master_addr: str) -> None:
    os.environ["NCCL_GRAPH_REGISTER"] = "0"  # captured reduces must not register their buffers
    if master_addr in ("127.0.0.1", "localhost") and os.path.exists("/sys/class/net/lo"):
        # Else gloo asks the resolver for the host's own name, which a container may not know.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _open_store(rank: int, addr: str, port: int, timeout: timedelta, listener: socket.socket | None) -> dist.Store:
    """The store where ranks meet: torchrun's agent hosts it, else rank 0 does."""
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    options = {} if listener is None else {"master_listen_fd": listener.detach()}
    try:
        with peer_errors():
            store = dist.TCPStore(
                addr,
                port,
                is_master=hosts or listener is not None,
                timeout=timeout,
                wait_for_workers=False,
                **options,
            )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise ValueError(f"MASTER_PORT={port} is in use on this host") from None
        raise
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    generation = 0 if listener is not None else next(_generation)
    return dist.PrefixStore(f"penstock/{attempt}/{generation}", store)


def _meet(store: dist.Store, rank: int, size: int, timeout_s: float, check: Callable[[], None] | None) -> None:
    """Rank 0 returns when all are there: torch's own rendezvous could not be stopped if one had died."""
    deadline = time.monotonic() + timeout_s
    with peer_errors():
        store.set(f"here/{rank}", "1")
    while rank == 0 and (missing := _missing(store, size)):
        if check is not None:
            check()
        if time.monotonic() > deadline:
            raise PeerLost(f"ranks {missing} did not connect within {timeout_s:g} s")
        time.sleep(_POLL_S)


def _missing(store: dist.Store, size: int) -> list[int]:
    with peer_errors():
        return [rank for rank in range(size) if not store.check([f"here/{rank}"])]
