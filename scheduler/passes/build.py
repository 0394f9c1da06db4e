"""Makes a PassPlan: gives streamed groups their slots in the ring and compressed ones their slots in the decompression
buffer, and adds the copy lane to a model's steps."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from operator import add

from penstock.scheduler.passes.check import validate
from penstock.scheduler.passes.first_fit import first_fit
from penstock.scheduler.passes.pass_plan import (
    Acquire,
    Compute,
    Decompress,
    Fork,
    GroupId,
    Instruction,
    Join,
    PassPlan,
    Prefetch,
    Release,
    RingLayout,
    Slot,
)

NUM_WRAPPED = 2  # groups copied for the next pass while head and sampling run: one layer's attn and ffn
MOST_WRAPPED = 4  # where a ring has room for them: the link then has work until the host, too, is done with the pass


def minimum_ring_bytes(streamed: list[tuple[GroupId, int]]) -> int:
    """Bytes of the smallest ring in which a pass can run; the copy of a group as large as the ring overlaps no
    compute."""
    return max((nbytes for _, nbytes in streamed), default=0)


def default_ring_bytes(streamed: list[tuple[GroupId, int]]) -> int:
    """Bytes of a ring in which a copy never has to wait for the group that is being read (usual_ring_bytes)."""
    return usual_ring_bytes([nbytes for _, nbytes in streamed])


def usual_ring_bytes(sizes: Sequence[int]) -> int:
    """Bytes of the ring for groups of these `sizes`, in the order of a pass: any three groups in a row fit, and so does
    the last group of a pass beside its predecessor and the first groups of the next pass."""
    if len(sizes) <= 3:
        return sum(sizes)
    windows = map(add, map(add, sizes, sizes[1:]), sizes[2:])
    return max(max(windows), sum(sizes[:NUM_WRAPPED]) + sizes[-1] + sizes[-2])


def roomy_ring_bytes(streamed: list[tuple[GroupId, int]]) -> int:
    """Bytes of a ring in which the last two groups, mostly the last FFN and the head, have room beside those of
    `default_ring_bytes`. What reads them computes few rows and takes no time, so where compute takes about as long as
    the copies, theirs must begin while what lies before them is still to be read."""
    last = sum(nbytes for _, nbytes in streamed[-2:])
    return min(default_ring_bytes(streamed) + last, sum(nbytes for _, nbytes in streamed))


def lay_out_ring(streamed: list[tuple[GroupId, int]], ring_bytes: int, num_wrapped: int | None = None) -> RingLayout:
    """Gives every streamed group (id, bytes; in the order of a pass) its slot in a ring of `ring_bytes`, of which the
    first `num_wrapped` are copied ahead (None: MOST_WRAPPED if there is room, else NUM_WRAPPED).

    Slots follow each other and start again at 0 where the end is reached. The last group of a pass avoids the front:
    the next pass's first groups are copied there while it is still read. Raises ValueError if a group does not fit.
    """
    for group, nbytes in streamed:
        if nbytes > ring_bytes:
            raise ValueError(f"ring of {ring_bytes} bytes cannot hold group {group} of {nbytes} bytes")
    slots: list[tuple[GroupId, Slot]] = []
    offset = 0
    for group, nbytes in streamed:
        if offset + nbytes > ring_bytes:
            offset = 0
        slots.append((group, Slot(offset, nbytes)))
        offset += nbytes
    if num_wrapped is None:
        sizes = [nbytes for _, nbytes in streamed]
        has_room = sum(sizes[:MOST_WRAPPED]) + sum(sizes[-2:]) <= ring_bytes
        num_wrapped = MOST_WRAPPED if has_room else NUM_WRAPPED
    wrapped = 0  # the first groups that are in the ring together
    while wrapped < min(num_wrapped, len(slots)) and not any(
        slot.overlaps(slots[wrapped][1]) for _, slot in slots[:wrapped]
    ):
        wrapped += 1
    if len(slots) > wrapped:
        front = max(slot.end for _, slot in slots[:wrapped])
        group, last = slots[-1]
        if last.offset < front and front + last.nbytes <= ring_bytes:
            slots[-1] = (group, Slot(front, last.nbytes))
    return RingLayout(ring_bytes, wrapped, tuple(slots))


def lay_out_decompressed(steps: list[Compute], sizes: Mapping[GroupId, int]) -> dict[GroupId, Slot]:
    """A slot in the decompression buffer for each compressed group: the lowest that is free from its first reader to
    its last. `sizes` are bytes of decompressed groups. Groups whose readers do not interleave share a slot."""
    first, last = _readers(steps)
    in_order = sorted(sizes.keys() & first.keys(), key=first.get)
    return first_fit({g: sizes[g] for g in in_order}, lambda group, earlier: last[earlier] >= first[group])


def make_plan(
    steps: list[Compute],
    ring: RingLayout,
    decompressed: Mapping[GroupId, int] | None = None,
    partly: AbstractSet[GroupId] = frozenset(),
) -> PassPlan:
    """Adds the copy lane to a model's steps: each streamed group is acquired before its first reader and released
    after its last, and each copy is issued as soon as the groups it overwrites are released. The groups in
    `decompressed` (bytes when decompressed) are decompressed before their first reader; nothing else reads their ring
    slots, but for those in `partly`, of which steps read a part as it is kept.

    Raises ValueError if a streamed group has no reader; validates the plan that it returns.
    """
    slots = dict(ring.slots)
    decompression_slots = lay_out_decompressed(steps, decompressed or {})
    present = {group for group, _ in ring.slots[: ring.num_wrapped]}
    first_reader, last_reader = _readers(steps)
    pending = _copies(ring)
    released: set[GroupId] = set()
    plan: list[Instruction] = [Fork()] if pending else []

    def issue_copies() -> None:
        while pending and released.issuperset(pending[0].after):
            plan.append(pending.pop(0))

    def release(group: GroupId) -> None:
        if group in slots:
            plan.append(Release(group, slots[group]))
            released.add(group)
            issue_copies()

    issue_copies()
    for index, step in enumerate(steps):
        group = step.group
        if group is not None and first_reader[group] == index:
            if group in slots:
                plan.append(Acquire(group, slots[group], group in present))
            if group in decompression_slots:
                plan.append(Decompress(group, decompression_slots[group], group in partly))
                if group not in partly:
                    release(group)
        plan.append(step)
        is_held = group not in decompression_slots or group in partly
        if group is not None and last_reader[group] == index and is_held:
            release(group)
    if pending:
        raise ValueError(f"{pending[0]} waits for groups that no step reads: {', '.join(map(str, pending[0].after))}")
    if ring.slots:
        plan.append(Join(ring.slots[ring.num_wrapped - 1][0]))
    made = PassPlan(tuple(plan), ring)
    validate(made)
    return made


def _readers(steps: list[Compute]) -> tuple[dict[GroupId, int], dict[GroupId, int]]:
    """The indices of each group's first and last reader."""
    last = {step.group: index for index, step in enumerate(steps) if step.group is not None}
    first = {step.group: index for index, step in reversed(list(enumerate(steps))) if step.group is not None}
    return first, last


def _copies(ring: RingLayout) -> list[Prefetch]:
    """The copy lane of a pass, in order: the groups that are not yet in the ring, then the first ones again."""
    order = [*ring.slots[ring.num_wrapped :], *ring.slots[: ring.num_wrapped]]
    held = list(ring.slots[: ring.num_wrapped])  # the groups with bytes in the ring that are not yet overwritten
    copies = []
    for index, (group, slot) in enumerate(order):
        after = tuple(holder for holder, other in held if other.overlaps(slot))
        held = [(holder, other) for holder, other in held if not other.overlaps(slot)] + [(group, slot)]
        wrapped = index >= len(order) - ring.num_wrapped
        copies.append(Prefetch(group, slot, after, first=index == 0, wrapped=wrapped))
    return copies
