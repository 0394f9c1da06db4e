"""Runs one piece of work on a group of ranks, without an engine: launches the ranks, lets them meet, and leaves."""

from collections.abc import Callable
from typing import TypeVar

from penstock.parallel.collectives import Collectives
from penstock.parallel.launch import WORKER_COMMAND, Launch
from penstock.parallel.rendezvous import connect, read_together
from penstock.parallel.topology import Topology, bind_to_numa, resolve_topology

Result = TypeVar("Result")


def run_in_group(
    launch: Launch,
    device: str,
    work: Callable[[Topology, Collectives], Result],
    message: str = "",
    command: tuple[str, ...] = WORKER_COMMAND,
) -> Result:
    """Runs `work` on this rank, bound to its NUMA node, while the other ranks run theirs; returns its result.

    Rank 0 of a self-launch starts the others by `command`, with `message` (one line) on their stdin. `work` has to drop
    every CUDA graph that it captured. Raises ValueError for a device that is not there, RankFailed if another rank
    ended.
    """
    position = launch.rank, launch.tp_size, launch.local_rank, device, launch.num_local_ranks
    try:
        topology = read_together(launch, lambda: resolve_topology(*position))
        launch.start(message, command)
        with launch.guard():
            collectives = connect(topology, launch)
            try:
                bind_to_numa(topology)
                result = work(topology, collectives)
                collectives.barrier()  # nobody leaves while another one still measures
            except BaseException:
                with launch.leaving():
                    collectives.abandon()
                raise
            with launch.leaving():
                collectives.close()
    finally:
        launch.close()
    return result
