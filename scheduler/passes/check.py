"""Proves that a PassPlan is safe, and lays out its activations.

The proof follows two passes in a row and keeps, for each lane, what is known to have finished. A clock (c, k) says that
the first c compute and k copy instructions are done. An instruction starts when its lane's clock, joined with the
clocks of the events that it waits for, is reached. Bytes may be written only if that clock says that every earlier
reader has finished, and read only if it says that their copy has.
"""

from penstock.scheduler.passes.first_fit import first_fit
from penstock.scheduler.passes.pass_plan import (
    COMPUTE,
    COPY,
    Acquire,
    Compute,
    Decompress,
    Event,
    GroupId,
    Instruction,
    PassPlan,
    Prefetch,
    Release,
    Slot,
)


def validate(plan: PassPlan) -> None:
    """Raises ValueError, naming the instruction, if an event, the ring's contract or a lifetime is broken."""
    check_events(plan.instructions)
    check_ring(plan)
    check_decompressed(plan)
    check_lifetimes(plan.instructions)
    check_copies(plan)


def check_copies(plan: PassPlan) -> None:
    """Checks that every pass has the same copy lane, so that passes of any kind follow each other: each streamed group
    is copied once, in order, and the first groups of the next pass come last."""
    copies = [(i.group, i.slot, i.wrapped) for i in plan.instructions if isinstance(i, Prefetch)]
    first, num = plan.ring.slots, plan.ring.num_wrapped
    expected = [(*entry, False) for entry in first[num:]] + [(*entry, True) for entry in first[:num]]
    if copies != expected:
        raise ValueError(
            "the copy lane must copy each streamed group once, in order, and the next pass's first ones last"
        )


def check_events(instructions: tuple[Instruction, ...]) -> None:
    """Checks that every event is recorded once, and that its record is issued before any wait for it: on a GPU a wait
    for an event that was not yet recorded returns at once."""
    recorded: set[Event] = set()
    for instruction in instructions:
        for event in instruction.waits:
            if event not in recorded:
                raise ValueError(f"{instruction} waits for {event}, which nothing before it records")
        if instruction.records is not None:
            if instruction.records in recorded:
                raise ValueError(f"{instruction} records {instruction.records} twice in one pass")
            recorded.add(instruction.records)


def check_ring(plan: PassPlan) -> None:
    """Proves the safety contract of the ring over two passes, the wrap-around between them included."""
    proof = _RingProof(plan)
    for _ in range(2):
        for instruction in plan.instructions:
            proof.follow(instruction)
        proof.end_pass()


class _RingProof:
    """The state of check_ring's proof after the instructions that it has followed."""

    def __init__(self, plan: PassPlan):
        self.ring = plan.ring
        self.slots = dict(plan.ring.slots)
        self.present = plan.ring.slots[: plan.ring.num_wrapped]
        self.count = {COMPUTE: 0, COPY: 0}  # instructions followed so far
        self.behind = {COMPUTE: (0, 0), COPY: (0, 0)}  # the clock that each lane has reached
        self.clock_of: dict[Event, tuple[int, int]] = {}
        # Each with the number of the copy that wrote it, or of the instruction that read it.
        self.written: list[tuple[GroupId, Slot, int]] = [(g, s, 0) for g, s in self.present]
        self.read: list[tuple[GroupId, Slot, int]] = []
        self.held: set[GroupId] = set()
        decompressed = {decompress.group for decompress in plan.decompressions if not decompress.is_partial}
        steps = (step for step in plan.steps if step.group not in decompressed)
        self.readers = {reader for reader in (*plan.decompressions, *steps) if reader.group in self.slots}

    def follow(self, instruction: Instruction) -> None:
        lane = instruction.lane
        clocks = [self.behind[lane], *(self.clock_of[event] for event in instruction.waits)]
        clock = (max(c for c, _ in clocks), max(k for _, k in clocks))
        self.count[lane] += 1
        if isinstance(instruction, Prefetch):
            self.write(instruction, clock)
        elif isinstance(instruction, Acquire):
            self.held.add(instruction.group)
            self.read_slot(instruction, clock)
        elif instruction in self.readers:
            if instruction.group not in self.held:
                raise ValueError(f"{instruction} reads {instruction.group} outside of acquire and release")
            self.read_slot(instruction, clock)
        elif isinstance(instruction, Release):
            if instruction.group not in self.held:
                raise ValueError(f"{instruction} has no acquire before it")
            self.held.discard(instruction.group)
        self.behind[lane] = (self.count[COMPUTE], clock[1]) if lane == COMPUTE else (clock[0], self.count[COPY])
        if instruction.records is not None:
            self.clock_of[instruction.records] = self.behind[lane]

    def write(self, copy: Prefetch, clock: tuple[int, int]) -> None:
        slot = copy.slot
        if slot.offset < 0 or slot.end > self.ring.ring_bytes or self.slots.get(copy.group) != slot:
            raise ValueError(f"{copy} goes to {slot}, which the layout of the ring does not give it")
        self.read = [one for one in self.read if clock[0] < one[2]]  # for later copies too the others have finished
        for group, other, _ in self.read:
            if other.overlaps(slot):
                raise ValueError(f"{copy} may overwrite {group} while it is read: no wait for free({group})")
        for group in self.held:
            if self.slots[group].overlaps(slot):
                raise ValueError(f"{copy} overwrites {group} between its acquire and its release")
        self.written = [w for w in self.written if not w[1].overlaps(slot)]
        self.written.append((copy.group, slot, self.count[COPY]))

    def read_slot(self, reader: Instruction, clock: tuple[int, int]) -> None:
        group = reader.group
        copied = [count for holder, slot, count in self.written if (holder, slot) == (group, self.slots.get(group))]
        if not copied:
            raise ValueError(f"{reader} reads {group}, which is not in the ring")
        if clock[1] < copied[-1]:
            raise ValueError(f"{reader} may read {group} before it has arrived: no wait for ready({group})")
        self.read.append((group, self.slots[group], self.count[COMPUTE]))

    def end_pass(self) -> None:
        if self.held:
            raise ValueError(f"the pass ends with {', '.join(map(str, sorted(self.held)))} not released")
        if self.behind[COMPUTE][1] < self.count[COPY]:
            raise ValueError("the pass ends before its last copy is joined")
        for group, slot in self.present:
            if not any((holder, held) == (group, slot) for holder, held, _ in self.written):
                raise ValueError(f"the next pass expects {group} in the ring")


def check_decompressed(plan: PassPlan) -> None:
    """Checks that the steps of a compressed group read it from its slot of the decompression buffer: it was
    decompressed in this pass, and no other group is decompressed over it before the last of these steps. All of them
    are on one lane, so the order of issue proves it."""
    compressed = {decompress.group for decompress in plan.decompressions}
    held: dict[GroupId, Slot] = {}
    for instruction in plan.instructions:
        if isinstance(instruction, Decompress):
            if instruction.group in held:
                raise ValueError(f"{instruction} is issued twice in one pass")
            held = {group: slot for group, slot in held.items() if not slot.overlaps(instruction.slot)}
            held[instruction.group] = instruction.slot
        elif isinstance(instruction, Compute) and instruction.group in compressed and instruction.group not in held:
            raise ValueError(f"{instruction} reads {instruction.group}, which is not in the decompression buffer")


def check_lifetimes(instructions: tuple[Instruction, ...]) -> None:
    """Checks that activations are created only while dead, touched only while alive, and destroyed by the end of the
    pass."""
    alive: set[str] = set()
    for instruction in instructions:
        for name, effect in getattr(instruction, "effects", ()):
            if ("+" in effect) == (name in alive):
                raise ValueError(f"{instruction} {'creates' if '+' in effect else 'touches'} {name} at the wrong time")
            alive.add(name)
            if "x" in effect:
                alive.discard(name)
    if alive:
        raise ValueError(f"the pass ends with {', '.join(sorted(alive))} alive")


def lifetimes(plan: PassPlan) -> dict[str, list[tuple[int, int]]]:
    """Intervals [first, last] of each activation in instruction indices, from creation to destruction."""
    intervals: dict[str, list[tuple[int, int]]] = {}
    born: dict[str, int] = {}
    for index, instruction in enumerate(plan.instructions):
        for name, effect in getattr(instruction, "effects", ()):
            if "+" in effect:
                born[name] = index
            if "x" in effect:
                intervals.setdefault(name, []).append((born.pop(name), index))
    return intervals


def lay_out_activations(plan: PassPlan, sizes: dict[str, int]) -> dict[str, int]:
    """Byte offset of each activation (`sizes` are in bytes). The largest is laid out first; each goes to the lowest
    bytes where no activation lies that is alive at the same time. All together take max(offset + size) bytes."""
    intervals = lifetimes(plan)

    def clash(a: str, b: str) -> bool:
        return any(s <= t2 and s2 <= t for s, t in intervals[a] for s2, t2 in intervals[b])

    largest_first = sorted(intervals, key=lambda n: (-sizes[n], n))
    slots = first_fit({name: sizes[name] for name in largest_first}, clash)
    return {name: slot.offset for name, slot in slots.items()}
