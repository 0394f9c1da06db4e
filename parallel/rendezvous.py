"""The meeting of the ranks: each says in a store at one address who it is; then a pulse runs between them; then they
form a process group, with the Collectives that all their devices allow.

This file does not know who starts the ranks (launch.py), nor what they say to each other afterwards.
"""

import itertools
import json
import os
import socket
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from penstock.parallel.collectives import Collectives, Solo
from penstock.parallel.connections import Connections
from penstock.parallel.failure import PeerLost
from penstock.parallel.gloo import Distributed, Gloo, peer_errors
from penstock.parallel.interfaces import check_interfaces, is_loopback, own_address, prefer_interface_of
from penstock.parallel.launch import Launch
from penstock.parallel.nccl import Nccl
from penstock.parallel.processes import Process, this_process
from penstock.parallel.reach import Reach, all_reach_each_other, reach_of
from penstock.parallel.symmetric import Symmetric
from penstock.parallel.topology import Topology
from penstock.parallel.watch import Know

Result = TypeVar("Result")
MEETING_S = 600.0
_POLL_S = 0.02
_generation = itertools.count()  # of groups: keys of an earlier one in a launcher's store must not be read again


def read_together(launch: Launch, read: Callable[[], Result]) -> Result:
    """Returns what `read`, which checks the input of this rank, returns. Under torchrun ranks meet before, so that each
    hears why another one does not go on.

    Raises what `read` raises, even if other ranks have failed: if all ranks were given the same mistake, all raise it.
    Ranks without a mistake raise RankFailed if another one has failed.
    """
    if launch.kind != "torchrun":
        return read()
    found = []
    with launch.guard(own=True):
        meet(launch, read=lambda: found.append(read()))
    return found[0]


def meet(launch: Launch, timeout_s: float = MEETING_S, read: Callable[[], None] | None = None) -> dist.Store:
    """Returns the store of the ranks of `launch`, once all of them are there and hear each other; idempotent. `read`
    may check this rank's input meanwhile.

    Raises ValueError if the port is in use or this process has a group already, PeerLost if ranks are missing after
    `timeout_s`, and what `launch.check`, check_interfaces and `read` raise.
    """
    if launch.store is None:
        if not _agent_has_store():  # an older group may hold the store's port
            _check_no_group()
        _prepare_environment(launch.master_addr)
        with launch.watching() as know:
            launch.met_in(_meet(launch, timeout_s, read, know))
    return launch.store


def _meet(launch: Launch, timeout_s: float, read: Callable[[], None] | None, know: Know) -> dist.Store:
    """Says first of all which process this is: from then on `know` is told, and this rank is looked at."""
    store = _open_store(launch, timedelta(seconds=timeout_s))
    meeting = Meeting(store, launch.rank, launch.tp_size, timeout_s, launch.check)
    told = meeting.tell("process", this_process().to_dict(), lambda rank, one: know(rank, Process(**one)))
    people = [Process(**one) for one in told]
    addresses = _addresses(launch, meeting, people) if len({one.host for one in people}) > 1 else []
    try:
        launch.hear(people, lambda text: meeting.tell("pulse", text)[0], addresses)
    except OSError as error:
        raise PeerLost(f"rank 0 cannot be reached: {error}") from None
    _end_meeting(meeting, _mistake(launch, read))
    return store


def _mistake(launch: Launch, read: Callable[[], None] | None) -> Exception | None:
    """The mistake of this rank alone, if it has one."""
    try:
        _check_no_group()
        if launch.tp_size > 1:
            check_interfaces()
        if read is not None:
            read()
    except Exception as error:
        return error
    return None


def _end_meeting(meeting: "Meeting", mistake: Exception | None) -> None:
    """Raises this rank's mistake, but only once all ranks hear each other and know their own mistakes. If a rank hears
    of a failure after that, it is another rank's."""
    try:
        meeting.tell("knows", True)
    except Exception:
        if mistake is None:
            raise
    if mistake is not None:
        raise mistake


def connect(topology: Topology, launch: Launch, timeout_s: float = MEETING_S) -> Collectives:
    """Joins the group of the ranks of `launch`, and meets them first if they have not met.

    `timeout_s` bounds the meeting, every tensor collective and every barrier. Raises as `meet` does.
    """
    if launch.tp_size == 1:
        return Solo()
    store = meet(launch, timeout_s)
    meeting = Meeting(store, launch.rank, launch.tp_size, timeout_s, launch.check)
    reaches = [Reach(**one) for one in meeting.tell("reach", reach_of(topology.device).to_dict())]
    _check_alike(reaches)
    kind = _kind(reaches, topology)
    backend, device = ("nccl", topology.device) if topology.device.type == "cuda" else ("gloo", None)
    if device is not None:
        torch.cuda.set_device(device)
    connections = Connections()
    with peer_errors():
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.tp_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device,
        )
        collectives = kind(timeout_s, connections)
    try:
        _keep_connections(connections, meeting)
        launch.on_failure(collectives.stop)
        if isinstance(collectives, Symmetric):
            with peer_errors():
                collectives.share_memory(store)
    except BaseException:
        with launch.leaving():
            collectives.abandon()
        raise
    return collectives


def _keep_connections(connections: Connections, meeting: "Meeting") -> None:
    """Keeps those that are another rank's too, to be cut when a rank has failed."""
    ports = meeting.tell("ports", connections.ports())
    theirs = {(there, here) for rank, ends in enumerate(ports) if rank != meeting.rank for here, there in ends}
    connections.keep(theirs.__contains__)


class Meeting:
    """The exchange of facts between ranks through the store. All ranks make the same calls."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float, check: Callable[[], None]):
        self.store, self.rank, self.size, self.timeout_s, self.check = store, rank, size, timeout_s, check

    def tell(self, what: str, own: object, hear: Callable[[int, Any], None] = lambda *_: None) -> list:
        """Exchanges what each rank tells (JSON), by rank; `hear` is called with each as it comes. torch's own
        rendezvous could not be stopped if one had died."""
        deadline, told = time.monotonic() + self.timeout_s, {}
        with peer_errors():
            self.store.set(f"{what}/{self.rank}", json.dumps(own))
        while missing := [rank for rank in range(self.size) if rank not in told]:
            came = self._told(what, missing)
            for rank, one in came.items():
                hear(rank, one)
            told |= came
            if not came:
                self.check()
                if time.monotonic() > deadline:
                    raise PeerLost(f"ranks {missing} did not connect within {self.timeout_s:g} s")
                time.sleep(_POLL_S)
        return [told[rank] for rank in range(self.size)]

    def _told(self, what: str, ranks: list[int]) -> dict[int, Any]:
        """Reads what these ranks have told so far, by rank."""
        with peer_errors():
            keys = {rank: f"{what}/{rank}" for rank in ranks}
            return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}


def _check_alike(reaches: list[Reach]) -> None:
    """Raises ValueError, on all ranks the same, if some of them compute on a GPU and others on a CPU, or two on one
    GPU, as groups of torchrun side by side do that see the same GPUs."""
    kinds = ["cuda" if one.gpu else "cpu" for one in reaches]
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"device: {kinds[0]} on rank 0, but {kind} on rank {rank}: all ranks compute on the same kind"
            )
    gpus = [one.gpu for one in reaches if one.gpu]
    for rank, gpu in enumerate(gpus):
        if (first := gpus.index(gpu)) != rank:
            own = "CUDA_VISIBLE_DEVICES can give each group of ranks its own"
            raise ValueError(f"device: ranks {first} and {rank} are both on GPU {gpu}: {own}")


def _kind(reaches: list[Reach], topology: Topology) -> type[Distributed]:
    """Chooses the Collectives, the same on all ranks. Symmetric memory needs every GPU to reach the memory of every
    other one; where that is not so, rank 0 warns."""
    if topology.device.type == "cpu":
        return Gloo
    if all_reach_each_other(reaches):
        return Symmetric
    if topology.rank == 0:
        warnings.warn("GPUs cannot reach each other's memory: all-reduces go through NCCL alone", stacklevel=3)
    return Nccl


def _addresses(launch: Launch, meeting: "Meeting", people: list[Process]) -> list[str]:
    """Addresses where ranks on other hosts may find this one: that of the interface from which it reaches them, which
    gloo is told to take as well, and its name. On the store's own host the way to the store is a loopback, so what
    counts there is the way to another host."""
    told = meeting.tell("address", own_address(launch.master_addr, launch.master_port))
    elsewhere = [address for address, one in zip(told, people) if one.host != people[launch.rank].host]
    there = next((address for address in elsewhere if not is_loopback(address)), None)
    own = told[launch.rank] if there is None else own_address(there, launch.master_port)
    prefer_interface_of(own)
    return [own, socket.gethostname()]


def _check_no_group() -> None:
    if dist.is_initialized():
        raise ValueError("this process belongs to a process group already: close it (or the other LLM) first")


def _agent_has_store() -> bool:
    """Tells whether torchrun's agent hosts the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _prepare_environment(master_addr: str) -> None:
    os.environ["NCCL_GRAPH_REGISTER"] = "0"  # captured reduces must not register their buffers
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # unused; a meeting of one rank might go another way with it
    if master_addr in ("127.0.0.1", "localhost") and os.path.exists("/sys/class/net/lo"):
        # Without it gloo asks the resolver for the host's own name, which a container may not know.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _open_store(launch: Launch, timeout: timedelta) -> dist.Store:
    """Opens the store where ranks meet, which torchrun's agent or rank 0 hosts. A failure of a rank ends all waiting
    for it."""
    hosts = launch.rank == 0 and not _agent_has_store()
    options = {} if launch.listener is None else {"master_listen_fd": launch.listener.detach()}
    connections = Connections()
    try:
        with peer_errors():
            store = dist.TCPStore(
                launch.master_addr,
                launch.master_port,
                is_master=hosts or launch.listener is not None,
                timeout=timeout,
                wait_for_workers=False,
                **options,
            )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise ValueError(f"MASTER_PORT={launch.master_port} is in use on this host") from None
        raise
    connections.keep(lambda ports: ports[1] == launch.master_port)
    launch.on_failure(connections.cut)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    generation = 0 if launch.listener is not None else next(_generation)
    return dist.PrefixStore(f"penstock/{attempt}/{generation}", store)
