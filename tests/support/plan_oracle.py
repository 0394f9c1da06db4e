"""Judges whether a PassPlan is safe, by another way than check.py: it runs the plan, twice in a row, on two clocks.

One run has copies that take no time (a copy comes as early as its waits allow), one has copies that take for ever.
If a wait is missing, one of the two shows it: with no path of events between a copy and a reader, the copy starts no
later than the reader in the one run, and the reader no later than the copy in the other.
"""

from dataclasses import dataclass

from penstock.scheduler.passes.pass_plan import COMPUTE, COPY, Compute, Decompress, GroupId, PassPlan, Prefetch, Slot


@dataclass
class Use:
    """A stretch of time in which a group's bytes are written or read, for one of the passes."""

    num_pass: int
    group: GroupId
    slot: Slot
    start: float
    end: float


def is_hazardous(plan: PassPlan) -> bool:
    speeds = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    return _decompresses_too_late(plan) or any(_hazard(plan, compute_s, copy_s) for compute_s, copy_s in speeds)


def _decompresses_too_late(plan: PassPlan) -> bool:
    """Tells whether a step of a compressed group finds bytes in its group's slot that are not those of its group."""
    compressed, bytes_of = {i.group: i.slot for i in plan.instructions if isinstance(i, Decompress)}, {}
    for instruction in plan.instructions:
        group = getattr(instruction, "group", None)
        if isinstance(instruction, Decompress):
            bytes_of |= dict.fromkeys(range(*_bounds(instruction.slot)), group)
        elif isinstance(instruction, Compute) and group in compressed:
            found = {bytes_of.get(byte) for byte in range(*_bounds(compressed[group]))}
            if found != {group}:
                return True
    return False


def _bounds(slot: Slot) -> tuple[int, int]:
    """Bounds of a slot in units of 256 bytes, of which all sizes here are multiples."""
    return slot.offset // 256, slot.end // 256


def _hazard(plan: PassPlan, compute_s: float, copy_s: float) -> bool:
    """Tells whether a reader finds bytes that are not its own, or a copy writes while someone reads."""
    clock = {COMPUTE: 0.0, COPY: 0.0}
    writes = [Use(0, g, s, -2.0, -1.0) for g, s in plan.ring.slots[: plan.ring.num_wrapped]]
    reads: list[Use] = []
    slots = dict(plan.ring.slots)
    compressed = {i.group for i in plan.instructions if isinstance(i, Decompress) and not i.is_partial}
    for num_pass in range(2):
        at = {}
        for instruction in plan.instructions:
            lane = instruction.lane
            start = max([clock[lane], *(at.get(event, 0.0) for event in instruction.waits)])
            end = start
            if isinstance(instruction, Compute | Decompress):
                end = start + compute_s
                if instruction.group in slots and (
                    isinstance(instruction, Decompress) or instruction.group not in compressed
                ):
                    reads.append(Use(num_pass, instruction.group, slots[instruction.group], start, end))
            elif isinstance(instruction, Prefetch):
                end = start + copy_s
                writes.append(Use(num_pass + instruction.wrapped, instruction.group, instruction.slot, start, end))
            # A tick after each piece of work, so that what is ordered by an event is later, and what is not may tie.
            clock[lane] = end + (1e-9 if isinstance(instruction, Compute | Decompress | Prefetch) else 0.0)
            if instruction.records is not None:
                at[instruction.records] = clock[lane]
    return any(_is_stale(read, writes) for read in reads)


def _is_stale(read: Use, writes: list[Use]) -> bool:
    """Tells whether the last write into these bytes that began before the read ended is another group's, was not
    complete, or is for a later pass: a copy of the same bytes over themselves is a race as well."""
    last = None
    for write in writes:
        if write.slot.overlaps(read.slot) and write.start <= read.end:
            last = write if last is None or write.start >= last.start else last
    return last is None or last.group != read.group or last.end > read.start or last.num_pass > read.num_pass
