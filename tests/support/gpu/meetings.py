"""Meetings for symmetric memory in a process of its own, which numbers them from its start: in each of two groups, one
after the other, three of a rank alone and one of all, which are that one rank.

Prints a JSON array with a pair for each group: the numbers that its rank alone told the store, and those of all."""

import json
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

NUM_ALONE, MOST = 3, 40
WAIT = timedelta(seconds=30)


def main() -> None:
    device = torch.device("cuda", 0)
    inner = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=WAIT)
    print(json.dumps([meet(dist.PrefixStore(f"group{index}", inner), device) for index in range(2)]))


def meet(store: dist.Store, device: torch.device) -> tuple[list[int], list[int]]:
    """Makes a group, lets its rank meet, and ends the group."""
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    of_all = dist.group.WORLD.group_name
    alone = dist.new_group([0], backend="gloo", use_local_synchronization=True).group_name
    held = [share(name, device) for name in (*[alone] * NUM_ALONE, of_all)]
    told = numbers(store, f"{of_all}//{alone}/"), numbers(store, f"{of_all}/")
    held.clear()
    dist.destroy_process_group()
    return told


def share(name: str, device: torch.device) -> tuple[torch.Tensor, object]:
    """Meets for a buffer, which is mapped as long as what is returned lives."""
    words = symm_mem.empty(1, dtype=torch.int32, device=device)
    handle = symm_mem.rendezvous(words, name)
    assert handle.buffer_ptrs[0] == words.data_ptr()
    return words, handle


def numbers(store: dist.Store, prefix: str) -> list[int]:
    """The numbers under which rank 0 told something."""
    return [number for number in range(MOST) if store.check([f"{prefix}/CUDASymmetricMemory/{number}/0"])]


if __name__ == "__main__":
    main()
