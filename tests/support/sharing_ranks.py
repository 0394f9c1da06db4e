"""One of three ranks whose buffers are files that all of them map, so that they sum as ranks on GPUs do, each at its
own pace; as a module for each rank:

    -m tests.support.sharing_ranks FOLDER

FOLDER/sharesN and FOLDER/pushesN are rank N's buffers, all EMPTY at first (`write_buffers`). Whatever does not hold is
raised.
"""

import os
import random
import sys
import time
from pathlib import Path

import torch
from penstock.parallel import two_step_reduce as module
from penstock.parallel.push_reduce import MAX_PROGRAMS, NUM_HALVES, PART_WORDS, WORD_BYTES, PeerBuffers, push_reduce
from penstock.parallel.two_step_reduce import BLOCK_WORDS, buffer_shape, two_step_reduce

RANKS = 3
SHAPES = {
    "shares": buffer_shape(RANKS, 16 * BLOCK_WORDS * WORD_BYTES),
    "pushes": (NUM_HALVES, RANKS, PART_WORDS),
}
CALLS = 8
MOST_DELAY_S = 0.05


def write_buffers(folder: Path) -> None:
    for name, shape in SHAPES.items():
        for rank in range(RANKS):
            (folder / f"{name}{rank}").write_bytes(b"\xff" * (WORD_BYTES * torch.Size(shape).numel()))


def map_buffers(name: str, folder: Path, rank: int) -> tuple[PeerBuffers, list[torch.Tensor]]:
    """The buffers of this rank, and those of all ranks as this process maps them."""
    shape = SHAPES[name]
    size = torch.Size(shape).numel()
    files = [str(folder / f"{name}{each}") for each in range(RANKS)]
    mapped = [torch.from_file(file, shared=True, size=size, dtype=torch.int32) for file in files]
    others = tuple(mapped[(rank + distance) % RANKS].data_ptr() for distance in range(1, RANKS))
    half, goes_on = torch.zeros(MAX_PROGRAMS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return PeerBuffers(rank, RANKS, mapped[rank].view(shape), others, half, goes_on), mapped


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    (shares, shares_of_all), (pushes, pushes_of_all) = (map_buffers(name, folder, rank) for name in SHAPES)
    module.MAX_PROGRAMS = 2
    delays, sizes = random.Random(rank), random.Random(0)
    for call in range(CALLS):
        large = torch.arange(sizes.randint(2 * BLOCK_WORDS + 1, 14 * BLOCK_WORDS), dtype=torch.float32) + call
        small = large[:100] * 2
        parts = [large * (rank + 1), small * (rank + 1)]
        time.sleep(delays.random() * MOST_DELAY_S)
        two_step_reduce(shares, parts[0])
        push_reduce(pushes, parts[1])
        assert torch.equal(parts[0], 6 * large) and torch.equal(parts[1], 6 * small), f"rank {rank}, call {call}"
    del shares_of_all, pushes_of_all  # mapped until here


if __name__ == "__main__":
    main()
