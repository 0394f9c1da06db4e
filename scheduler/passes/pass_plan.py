"""A pass over the model as data: the PassPlan and the instructions of its two lanes.

There is one plan for each kind of pass; tokens and rows are bound when it runs. It is made once (build.py), validated
(check.py), then read by the executor, the lifetime checker, the trace, the time model and the table. No second
description of a pass exists.

Two lanes run side by side, and only events order them:

    compute   fork | acquire g2 ... release g2 |   acquire g3 ...           | ... head, sample | join
                |        ^ ready g2     v free g2        ^ ready g3                               ^
    copy        +- prefetch g2 ---- prefetch g3 ---- prefetch g4 (waits free g2) ... prefetch g0, g1

Safety contract of the ring: the bytes of a slot may be written only after `free` of every group that held them,
and read only after `ready` of the group that holds them. A pass starts with the first `num_wrapped` streamed groups
in the ring and ends, joined, with them there again, so that passes of any kind follow each other freely.

A compressed group is decompressed on the compute lane before its first step, into a slot of the decompression buffer
that no group with steps still to come holds. Its slot in the ring is free as soon as it is decompressed; where steps
read a part of it as it is kept, after the last of them.
"""

from dataclasses import dataclass
from typing import NamedTuple


class GroupId(NamedTuple):
    """The name of a group, which is the unit that is streamed; the head counts as a group of layer num_layers."""

    layer_idx: int
    name: str

    def __str__(self) -> str:
        return self.name if self.name in ("head", "embed") else f"{self.layer_idx}.{self.name}"


class Event(NamedTuple):
    """An event that a lane waits for. `ready`: the copy of a group has finished; `free`: its last reader has finished;
    `fork`: the copy lane may start."""

    kind: str
    group: GroupId | None = None

    def __str__(self) -> str:
        return self.kind if self.group is None else f"{self.kind}({self.group})"


class Slot(NamedTuple):
    """A byte range of the ring, or of the decompression buffer."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    def overlaps(self, other: "Slot") -> bool:
        return self.offset < other.end and other.offset < self.end


COMPUTE, COPY = "compute", "copy"


@dataclass(frozen=True)
class Instruction:
    """The fields that all instructions share: a lane, the events that they wait for before they run, and the event that
    they record after."""

    lane = COMPUTE

    @property
    def waits(self) -> tuple[Event, ...]:
        return ()

    @property
    def records(self) -> Event | None:
        return None


@dataclass(frozen=True)
class Compute(Instruction):
    """One step of the model. `effects` says what it does to each activation it touches, in the table's letters:
    + create, r read, w write, x destroy. The name of a fused step joins those of its parts. One `of_rows` computes the
    rows that are sampled, and nothing where there are none; the others compute all tokens of the pass."""

    step: str
    layer_idx: int
    group: GroupId | None
    effects: tuple[tuple[str, str], ...]
    of_rows: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The model's steps that this one does: one, unless it is fused."""
        return tuple(self.step.split("+"))

    def __str__(self) -> str:
        return self.step


def fused_name(*parts: str) -> str:
    """The name of the step that joins these parts."""
    return "+".join(parts)


@dataclass(frozen=True)
class Fork(Instruction):
    """Lets the copy lane start: everything before this pass has been issued."""

    @property
    def records(self) -> Event:
        return Event("fork")

    def __str__(self) -> str:
        return "fork"


@dataclass(frozen=True)
class Join(Instruction):
    """Makes the compute lane wait for the last copy."""

    last: GroupId

    @property
    def waits(self) -> tuple[Event, ...]:
        return (Event("ready", self.last),)

    def __str__(self) -> str:
        return "join"


@dataclass(frozen=True)
class Prefetch(Instruction):
    """Copies a group's span from the host arena into its slot, once `after` (groups that held those bytes) are free."""

    group: GroupId
    slot: Slot
    after: tuple[GroupId, ...]
    first: bool = False  # the first copy of a pass waits for the fork
    wrapped: bool = False  # the copy is for the next pass
    lane = COPY

    @property
    def waits(self) -> tuple[Event, ...]:
        return ((Event("fork"),) if self.first else ()) + tuple(Event("free", group) for group in self.after)

    @property
    def records(self) -> Event:
        return Event("ready", self.group)

    def __str__(self) -> str:
        return f"prefetch {self.group}" + (" (next pass)" if self.wrapped else "")


@dataclass(frozen=True)
class Acquire(Instruction):
    """Makes the compute lane wait until the group is in its slot; the first groups of a pass are there already."""

    group: GroupId
    slot: Slot
    present: bool

    @property
    def waits(self) -> tuple[Event, ...]:
        return () if self.present else (Event("ready", self.group),)

    def __str__(self) -> str:
        return f"acquire {self.group}"


@dataclass(frozen=True)
class Release(Instruction):
    """Records that the group's last reader has finished: its bytes may be written again."""

    group: GroupId
    slot: Slot

    @property
    def records(self) -> Event:
        return Event("free", self.group)

    def __str__(self) -> str:
        return f"release {self.group}"


@dataclass(frozen=True)
class Decompress(Instruction):
    """Decompresses a compressed group, or makes floats of a quantised one, from its ring slot or from where it stays,
    to `slot` of the decompression buffer. `is_partial`: steps read what it was made from as well."""

    group: GroupId
    slot: Slot
    is_partial: bool = False

    def __str__(self) -> str:
        return f"decompress {self.group}"


@dataclass(frozen=True)
class RingLayout:
    """The slot of each streamed group in the ring; `slots` are in the order of the pass."""

    ring_bytes: int
    num_wrapped: int
    slots: tuple[tuple[GroupId, Slot], ...]


@dataclass(frozen=True)
class PassPlan:
    """A validated pass. `activations` are the names that the table's columns show, in order of creation."""

    instructions: tuple[Instruction, ...]
    ring: RingLayout

    @property
    def steps(self) -> tuple[Compute, ...]:
        """The compute steps, in order."""
        return tuple(i for i in self.instructions if isinstance(i, Compute))

    @property
    def activations(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for step in self.steps for name, _ in step.effects))

    @property
    def decompressions(self) -> tuple[Decompress, ...]:
        """The decompressions of a pass, in order."""
        return tuple(i for i in self.instructions if isinstance(i, Decompress))

    @property
    def decompression_buffer_bytes(self) -> int:
        return max((i.slot.end for i in self.decompressions), default=0)

    @property
    def prologue(self) -> tuple[Instruction, ...]:
        """Instructions that fill the ring before the first pass and after an abort: fork, the wrapped copies alone,
        join."""
        wrapped = [i for i in self.instructions if isinstance(i, Prefetch) and i.wrapped]
        if not wrapped:
            return ()
        copies = [Prefetch(i.group, i.slot, (), first=index == 0, wrapped=True) for index, i in enumerate(wrapped)]
        return (Fork(), *copies, Join(wrapped[-1].group))

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross the link in one pass."""
        return sum(i.slot.nbytes for i in self.instructions if isinstance(i, Prefetch))
