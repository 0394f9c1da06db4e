"""How the two lanes of a plan run: as CUDA streams with events, or interleaved in one thread on a CPU.

Both walk the same instructions and honour the same waits and records; neither knows what an instruction does.
"""

import random
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch

from engine.runtime.trace import Tracer
from scheduler.step_plan import COMPUTE, COPY, Event, Instruction

Do = Callable[[Instruction], None]


class Lanes(Protocol):
    """Runs instructions in their lanes' order, each after the events it waits for. `do` performs one instruction and,
    where lanes are streams, only enqueues it."""

    def run(self, instructions: tuple[Instruction, ...], do: Do) -> None: ...


class CudaLanes:
    """The compute lane is the current stream, the copy lane a stream of its own. Instructions are enqueued in plan
    order, so that every event is recorded before something waits for it."""

    def __init__(self, device: torch.device, tracer: Tracer):
        self.copy_stream = torch.cuda.Stream(device)
        self.tracer = tracer
        self.events: dict[Event, torch.cuda.Event] = {}

    def run(self, instructions: tuple[Instruction, ...], do: Do) -> None:
        streams = {COMPUTE: torch.cuda.current_stream(), COPY: self.copy_stream}
        for instruction in instructions:
            stream = streams[instruction.lane]
            with self.tracer.span(instruction, stream) as span:
                for event in instruction.waits:
                    stream.wait_event(self.events[event])
                span.waited()
                with torch.cuda.stream(stream):
                    do(instruction)
            if instruction.records is not None:
                event = self.events.setdefault(instruction.records, torch.cuda.Event())
                event.record(stream)


class InterleavedLanes:
    """Runs the lanes in one thread, in an order that the events allow: copies as early as they can, as late as they
    must, or at random (seeded). Sequential execution would never show a missing wait; this does."""

    def __init__(self, order: str, seed: int, tracer: Tracer):
        self.order, self.tracer = order, tracer
        self.random = random.Random(seed)

    def run(self, instructions: tuple[Instruction, ...], do: Do) -> None:
        lanes = {lane: deque(i for i in instructions if i.lane == lane) for lane in (COMPUTE, COPY)}
        done: set[Event] = set()

        def left(lane: str) -> int:
            may_run = bool(lanes[lane]) and done.issuperset(lanes[lane][0].waits)
            return len(lanes[lane]) if may_run else 0

        while lanes[COMPUTE] or lanes[COPY]:
            instruction = lanes[self._choose(left(COMPUTE), left(COPY))].popleft()
            with self.tracer.span(instruction) as span:
                span.waited()
                do(instruction)
            if instruction.records is not None:
                done.add(instruction.records)

    def _choose(self, compute: int, copy: int) -> str:
        """By the instructions left in each lane that may go on. At random, all orders are equally likely: with even
        chances the few copies would nearly always be far ahead."""
        assert compute or copy, "the plan deadlocks"
        if compute and copy:
            first = {"earliest": COPY, "latest": COMPUTE}.get(self.order)
            return first or self.random.choices((COMPUTE, COPY), (compute, copy))[0]
        return COMPUTE if compute else COPY
