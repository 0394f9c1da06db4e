"""Describes what rank 0 decided of a plan, for the other ranks: they make the same plan from it, without a search of
their own.

Torch-free.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Self

from penstock.engine.config import EngineConfig
from penstock.scheduler.cost.time_model import Rates
from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.residency.demand import Split


@dataclass(frozen=True)
class Decision:
    """`job_num_seqs` is max_num_seqs in rank 0's config, which knows its job; `num_seqs` and `num_tokens` are the most
    of a pass that were planned for; `split` says which groups stay and which are compressed."""

    job_num_seqs: int | None
    num_seqs: int
    num_tokens: int
    split: Split
    rates: Rates

    def pack(self) -> bytes:
        fields = dataclasses.asdict(self)
        fields["split"] |= {name: sorted(fields["split"][name]) for name in ("resident", "compressed")}
        return json.dumps(fields).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        fields = json.loads(packed)
        split, rates = fields.pop("split"), fields.pop("rates")
        groups = {name: frozenset(GroupId(*group) for group in split.pop(name)) for name in ("resident", "compressed")}
        return cls(**fields, split=Split(**split, **groups), rates=Rates(**rates))

    def as_told(self, config: EngineConfig) -> EngineConfig:
        """The config of another rank, for rank 0's job."""
        return dataclasses.replace(config, max_num_seqs=self.job_num_seqs)
