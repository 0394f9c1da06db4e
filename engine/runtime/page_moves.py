"""Moves pages between the KV cache and host memory, before the pass that their batch computes.

Pages are read and written on the compute lane alone, in the order of the passes: one is gathered behind the pass that
wrote it, and given to another owner by the pass that follows. The copy lane moves what was gathered while that pass
runs, through two slots of staging memory in turn; of a slot's chunks each waits for the one before it:

    compute   begin | gather 0 | gather 1 |            | scatter 2 |   the pass ...
    copy                       | copy 0 out | copy 1 out | copy 2 in | -> scattered before the pass

Shapes: P pages of the device, H of the host, L layers, N elements of a page in a layer's keys or values.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from penstock.engine.compute.inputs import to_device
from penstock.engine.runtime.lanes import Lanes
from penstock.engine.weights.host_arena import HostArena
from penstock.parallel.ledger import Site, TransferLedger
from penstock.scheduler.batching.host_pages import Move
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY, Event, Instruction
from torch import Tensor

OUT, IN = Site("kv_out", -1), Site("kv_in", -1)
_BEGUN, _COPIED = Event("moves begun"), Event("earlier copies ended")


@dataclass(frozen=True)
class Work(Instruction):
    """A part of the moves in its lane."""

    run: Callable[[], None] = lambda: None
    lane: str = COMPUTE
    waits: tuple[Event, ...] = ()
    records: Event | None = None


class PageMover:
    """Moves between `pages` (P, 2L, N) of the device and `num_host_pages` of a host arena, `num_staged` at a time. With
    `poison` a slot is filled with NaN when it is free. `moved` counts pages and bytes. Raises MemoryError or
    RuntimeError if the system or CUDA refuses the memory."""

    def __init__(self, pages: Tensor, num_host_pages: int, num_staged: int, lanes: Lanes, poison: bool = False):
        self.pages, self.lanes, self.poison = pages, lanes, poison
        self.num_host_pages, self.moved = num_host_pages, TransferLedger()
        self.page_bytes = pages[0].numel() * pages.element_size()
        self.slots = torch.empty(2, num_staged, *pages.shape[1:], dtype=pages.dtype, device=pages.device)
        self._arena = HostArena(num_host_pages * self.page_bytes)
        if pages.is_cuda:
            self._arena.tensor.zero_()  # memory that was touched is registered in a tenth of the time
            self._arena.register()
        self.host = self._arena.tensor.view(pages.dtype).view(num_host_pages, *pages.shape[1:])  # (H, 2L, N)

    def run(self, moves: Sequence[Move]) -> None:
        """Enqueues the moves, in effect one after another. On a CPU they are done when this returns."""
        if not moves:
            return
        works = [Work(records=_BEGUN), Work(lane=COPY, records=_COPIED)]
        pages = to_device([move.page for move in moves], torch.int64, self.pages.device)
        start = 0
        for index, chunk in enumerate(self._chunks(moves)):
            works += self._chunk(index, chunk, pages[start : start + len(chunk)])
            start += len(chunk)
        self.lanes.run(tuple(works), lambda work: work.run())
        for move in moves:
            out, back = (self.page_bytes, 0) if move.is_out else (0, self.page_bytes)
            self.moved.add(OUT if move.is_out else IN, back, out)

    def _chunks(self, moves: Sequence[Move]) -> Iterator[list[Move]]:
        """The moves, in order, by direction, no more at a time than a slot holds and no page twice: a GPU writes the
        pages of a chunk in any order."""
        chunk: list[Move] = []
        for move in moves:
            is_full = len(chunk) == self.slots.shape[1]
            if chunk and (is_full or move.is_out != chunk[0].is_out or move.page in {one.page for one in chunk}):
                yield chunk
                chunk = []
            chunk.append(move)
        yield chunk

    def _chunk(self, index: int, moves: Sequence[Move], pages: Tensor) -> list[Work]:
        """The works of a chunk of moves, with their `pages` on the device, by way of its slot. The events of an earlier
        run mean nothing: its chunks are behind by the order of the lanes."""
        slot = self.slots[index % 2, : len(moves)]
        staged, free = Event(f"staged {index}"), Event(f"free {index}")
        before = None if index < 2 else Event(f"free {index - 2}")

        def gather() -> None:
            torch.index_select(self.pages, 0, pages, out=slot)

        def copy_out() -> None:
            for part, held in self._runs(moves, slot):
                held.copy_(part, non_blocking=True)
            self._poison(slot)

        def copy_in() -> None:
            for part, held in self._runs(moves, slot):
                part.copy_(held, non_blocking=True)

        def scatter() -> None:
            self.pages.index_copy_(0, pages, slot)
            self._poison(slot)

        if moves[0].is_out:
            return [Work(gather, COMPUTE, (before or _COPIED,), staged), Work(copy_out, COPY, (staged,), free)]
        return [Work(copy_in, COPY, (before or _BEGUN,), staged), Work(scatter, COMPUTE, (staged,), free)]

    def _runs(self, moves: Sequence[Move], slot: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the slot with the host pages for them, neighbours at once: (n, 2L, N) each."""
        for _, run in itertools.groupby(enumerate(moves), key=lambda one: one[1].host_page - one[0]):
            (first, move), *others = run
            num = 1 + len(others)
            yield slot[first : first + num], self.host[move.host_page : move.host_page + num]

    def _poison(self, slot: Tensor) -> None:
        if self.poison:
            slot.view(torch.uint8).fill_(0xFF)

    def close(self) -> None:
        """Gives the host memory back; the device must be idle. Idempotent."""
        self.host = self.host[:0]
        self._arena.close()
