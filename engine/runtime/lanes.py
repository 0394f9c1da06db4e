"""Runs the two lanes of a plan: as CUDA streams with events, or interleaved in one thread on a CPU.

Both walk the same instructions and honour the same waits and records; neither knows what an instruction does.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from penstock.scheduler.passes.pass_plan import COMPUTE, COPY, Event, Instruction

Do = Callable[[Instruction], None]


class Lanes(Protocol):
    """Runs instructions in their lanes' order, each after the events it waits for. `do` performs one instruction and,
    where lanes are streams, only enqueues it."""

    def run(self, instructions: tuple[Instruction, ...], do: Do) -> None: ...


class CudaLanes:
    """The compute lane is the current stream, the copy lane a stream of its own. Instructions are enqueued in plan
    order, so that every event is recorded before something waits for it."""

    def __init__(self, device: torch.device):
        self.copy_stream = torch.cuda.Stream(device)
        self.events: dict[Event, torch.cuda.Event] = {}

    def run(self, instructions: tuple[Instruction, ...], do: Do) -> None:
        streams = {COMPUTE: torch.cuda.current_stream(), COPY: self.copy_stream}
        for instruction in instructions:
            stream = streams[instruction.lane]
            for event in instruction.waits:
                stream.wait_event(self.events[event])
            if instruction.lane == COMPUTE:
                do(instruction)
            else:
                with torch.cuda.stream(stream):
                    do(instruction)
            if instruction.records is not None:
                event = self.events.setdefault(instruction.records, torch.cuda.Event())
                event.record(stream)


# How many compute instructions may run before a copy that could. At random this is drawn anew for each copy: with an
# even chance at every instruction the few copies would nearly always be far ahead, and a missing wait would not show.
_DELAYS = {"earliest": (0,), "latest": (2**31,), "random": (0, 1, 4, 16, 64)}


class InterleavedLanes:
    """Runs the lanes in one thread, in an order that the events allow: copies as early as they can, as late as they
    must, or at random (seeded). Sequential execution would never show a missing wait; this does."""

    def __init__(self, order: str, seed: int):
        self.delays = _DELAYS[order]
        self.random = random.Random(seed)
        self.delay = self.random.choice(self.delays)  # left for the next copy

    def run(self, instructions: tuple[Instruction, ...], do: Do) -> None:
        lanes = {lane: deque(i for i in instructions if i.lane == lane) for lane in (COMPUTE, COPY)}
        done: set[Event] = set()

        def ready(lane: str) -> bool:
            return bool(lanes[lane]) and done.issuperset(lanes[lane][0].waits)

        while lanes[COMPUTE] or lanes[COPY]:
            instruction = lanes[self._choose(ready(COMPUTE), ready(COPY))].popleft()
            do(instruction)
            if instruction.records is not None:
                done.add(instruction.records)

    def _choose(self, compute: bool, copy: bool) -> str:
        assert compute or copy, "the plan deadlocks"
        if copy and (self.delay == 0 or not compute):
            self.delay = self.random.choice(self.delays)
            return COPY
        self.delay -= copy
        return COMPUTE
