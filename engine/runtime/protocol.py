"""Describes what ranks say to each other while an engine runs. Rank 0 decides and says it, the others hear it and do
the same.

    rank 0   BATCH b       ANNOUNCED b  RUN      CALL c         OUTPUTS, outputs | transfers      STOP
    others   run b         keep b       run it   join in it     return them      | send theirs    leave

Under torchrun every rank makes the calls of LLM. They are numbered: rank 0 says CALL, then all say what they were given
(calls.py), and no rank runs a call that one of them refuses. Only a measurement is rank 0's word alone.

Messages are packed int32, or JSON bytes; never pickle. That of a pass holds what changed in its rows.
One rank alone says nothing, and packs nothing.
"""

import dataclasses
import json
from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Protocol

from penstock.engine.runtime.calls import Call, objection
from penstock.parallel.collectives import Collectives
from penstock.scheduler.batching.batch import Batch
from penstock.scheduler.batching.message import RowMessages


class Kind(IntEnum):
    """The first integer of a message."""

    BATCH = 1
    ANNOUNCED = 2
    RUN = 3
    OUTPUTS = 4
    STOP = 5
    CALL = 6


class Output(Protocol):
    """Holds what a call gives for one prompt."""

    def to_dict(self) -> dict[str, Any]: ...


class Messages:
    """One rank's mouth and ear. `num_calls` counts the calls that this rank has made."""

    def __init__(self, collectives: Collectives):
        self.collectives = collectives
        self.num_calls = 0
        self._rows = RowMessages()
        self._announced: Batch | None = None

    def count_call(self) -> int:
        """Counts a call that this rank makes, and returns its number."""
        self.num_calls += 1
        return self.num_calls

    def say(self, kind: Kind) -> None:
        """Says something of this kind; on rank 0."""
        if self.collectives.size > 1:
            self.collectives.broadcast_ints([kind])

    def say_call(self, call: Call) -> None:
        """Says which call rank 0 makes; on rank 0."""
        if self.collectives.size > 1:
            self.collectives.broadcast_ints([Kind.CALL, *array("i", call.pack())])

    def say_batch(self, kind: Kind, batch: Batch) -> None:
        """Says what a pass computes: BATCH, which runs now, or ANNOUNCED, which may follow; on rank 0."""
        if self.collectives.size > 1:
            self.collectives.broadcast_ints([kind, *self._rows.pack(batch)])
            self._note(kind, batch)

    def say_run(self) -> None:
        """Says that the pass that was announced last runs now; on rank 0."""
        if self.collectives.size > 1:
            self.collectives.broadcast_ints([Kind.RUN])
            self._note(Kind.RUN, self._announced)

    def hear(self) -> tuple[Kind, Batch | Call | None]:
        """Hears what rank 0 says next: with BATCH and RUN the pass that runs, with CALL the call; on the other
        ranks."""
        kind, *message = self.collectives.broadcast_ints(None)
        if kind in (Kind.BATCH, Kind.ANNOUNCED, Kind.RUN):
            batch = self._announced if kind == Kind.RUN else self._rows.unpack(message)
            self._note(kind, batch)
            return Kind(kind), batch
        return Kind(kind), Call.unpack(array("i", message).tobytes()) if kind == Kind.CALL else None

    def _note(self, kind: Kind, batch: Batch) -> None:
        """Keeps a pass that may follow. One that runs changes what later messages build on."""
        self._announced = batch if kind == Kind.ANNOUNCED else None
        if kind != Kind.ANNOUNCED:
            self._rows.note(batch)

    def give_outputs(self, outputs: Sequence[Output], transfers: dict[str, Any]) -> list[dict[str, Any]]:
        """Ends a call and gives the other ranks its outputs. Returns all ranks' transfers, by rank; on rank 0."""
        if self.collectives.size == 1:
            return [transfers]
        self.say(Kind.OUTPUTS)
        self.collectives.broadcast_bytes(json.dumps([output.to_dict() for output in outputs]).encode())
        return [json.loads(data) for data in self.collectives.gather_bytes(json.dumps(transfers).encode())]

    def take_outputs(self, transfers: dict[str, Any]) -> list[dict[str, Any]]:
        """The outputs that rank 0 gives, once it has said so. `transfers` are this rank's; on the other ranks."""
        outputs = self.collectives.broadcast_bytes(None)
        self.collectives.gather_bytes(json.dumps(transfers).encode())  # rank 0 waits for these, and for no more
        return json.loads(outputs)

    def exchange(self, call: Call) -> str:
        """Tells all ranks this rank's call, on all together. Returns why they cannot run it, the same on all; empty if
        they can. Calls are numbered from rank 0's number on."""
        frames = self.collectives.share_frames(dataclasses.replace(call, number=self.num_calls).pack())
        calls = [Call.unpack(frame) for frame in frames]
        self.num_calls = calls[0].number
        return objection(calls)
