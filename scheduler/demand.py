"""What an engine asks of one rank's memory: the input of residency.py. PURE: sizes in bytes, lengths in tokens."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduler.plan_build import default_ring_bytes
from scheduler.retention import KeepAll, Retention
from scheduler.spread import spread_resident
from scheduler.step_plan import GroupId

KV_LEN = 2048  # tokens a sequence that the KV cache is sized for, before residency gets anything


@dataclass(frozen=True)
class Demand:
    """What an engine asks of one rank's memory. Sizes are bytes a rank, lengths are tokens.

    `groups` are in the order of a pass, the head last. `embed_bytes` is 0 where the head's bytes serve (tied).
    `resident` may name the groups that stay. `coded` has the bytes, coded, of groups that are kept so: of those that
    stay all but what `plain` allows, which is bytes more than coded, or names. `fixed` are named claims that no choice
    changes (activations, workspace, context ...). `memory_bytes` None is plain host memory (a CPU), which has no limit
    here. `max_model_len` None is as long as trained and as fits; `len_option` is the name of the option that says so.
    `retention` says how many pages a sequence needs: enough for all of its tokens, if it is not given.
    """

    groups: tuple[tuple[GroupId, int], ...]
    embed_bytes: int
    page_bytes: int
    page_size: int
    max_num_seqs: int
    max_position: int
    resident: str | float | frozenset[GroupId] = "auto"
    coded: Mapping[GroupId, int] = field(default_factory=dict)
    plain: int | frozenset[GroupId] = 0
    memory_bytes: int | None = None
    fixed: tuple[tuple[str, int], ...] = ()
    ring_bytes: int | None = None
    max_model_len: int | None = None
    len_option: str = "max_model_len"
    num_pages: int | None = None
    retention: Retention | None = None

    @property
    def fixed_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.fixed)

    @property
    def full_len(self) -> int:
        """Tokens of the longest sequence that is wished for."""
        return self.max_model_len or self.max_position

    @property
    def least_len(self) -> int:
        """Tokens of the longest sequence that must fit: an unset max_model_len may shrink to this."""
        return self.max_model_len or min(self.max_position, KV_LEN)

    def pages(self, num_tokens: int) -> int:
        return (self.retention or KeepAll(self.page_size)).num_pages(num_tokens)

    def tokens_in(self, num_pages: int) -> int:
        """Of one sequence, in so many pages and the reserved one."""
        return (num_pages - 1) * self.page_size - (self.retention.margin if self.retention else 0)

    @property
    def wanted_pages(self) -> int:
        """Pages of max_num_seqs sequences of KV_LEN tokens, of one full sequence at least, and the reserved one."""
        many = self.max_num_seqs * self.pages(min(self.full_len, KV_LEN))
        return self.num_pages or max(many, self.pages(self.full_len)) + 1

    @property
    def least_pages(self) -> int:
        return self.num_pages or self.pages(self.least_len) + 1

    @functools.cached_property
    def stored(self) -> tuple[tuple[GroupId, int], ...]:
        """The groups with their bytes as they are kept, coded where they may be."""
        return tuple((group, self.coded.get(group, nbytes)) for group, nbytes in self.groups)

    def streamed(self, resident: frozenset[GroupId]) -> list[tuple[GroupId, int]]:
        """What streams if `resident` stays, in the order of a pass."""
        return [(group, nbytes) for group, nbytes in self.stored if group not in resident]

    def plain_groups(self, resident: frozenset[GroupId]) -> frozenset[GroupId]:
        """Those of `resident` that could be kept coded and are not."""
        if isinstance(self.plain, frozenset):
            return self.plain
        sizes = [(g, nbytes - self.coded[g]) for g, nbytes in self.groups if g in resident and g in self.coded]
        return spread_resident(sizes, self.plain)

    def coded_groups(self, resident: frozenset[GroupId]) -> frozenset[GroupId]:
        """What is kept coded, on the host or on the device."""
        return frozenset(self.coded) - self.plain_groups(resident)

    def weights_bytes(self, resident: frozenset[GroupId]) -> int:
        """Device bytes of the weights that stay; the embedding stays only where all do."""
        plain, sizes = self.plain_groups(resident), dict(self.groups)
        weights = sum(sizes[g] if g in plain else nbytes for g, nbytes in self.stored if g in resident)
        return weights + (self.embed_bytes if len(resident) == len(self.groups) else 0)

    def usual_ring_bytes(self, resident: frozenset[GroupId]) -> int:
        """The ring as asked for, or the one in which no copy waits."""
        return self.ring_bytes or default_ring_bytes(self.streamed(resident))


def show_bytes(nbytes: float) -> str:
    """In GiB, or in MiB under a tenth of one, or in bytes; always labelled."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(nbytes) >= size / 10:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes:.0f} bytes"
