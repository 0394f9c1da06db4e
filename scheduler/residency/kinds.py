"""The kinds of groups that a demand has, and how many groups of each may stay. Torch-free.

The groups of one name are taken to be alike, so they are counted and not told apart.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from penstock.scheduler.cost.time_model import Rates, decompress_s
from penstock.scheduler.residency.demand import Demand
from penstock.scheduler.residency.spread import by_name, counts_within

MOST_ALL, MOST_COUNTS = 128, 48  # of up to 128 groups of a kind every number is tried, of more groups 48 numbers


class Kind(NamedTuple):
    """Groups of one name: `kept_bytes` and `decompress_s` are those of a compressed one, if the family is compressed;
    `stay` are the numbers that may stay, ascending."""

    name: str
    total: int
    plain_bytes: int
    kept_bytes: int
    decompress_s: float
    stay: tuple[int, ...]

    @property
    def extra_bytes(self) -> int:
        """Bytes by which a plain group is larger than a compressed one."""
        return self.plain_bytes - self.kept_bytes


class Others(NamedTuple):
    """Numbers of groups that stay, of all kinds but the largest, and what follows from them: bytes of the groups that
    stay and of those that stream, seconds of decompressing those that stay, the number of those that stream, and the
    bytes of the largest of these."""

    stay: tuple[int, ...]
    held: int
    streamed: int
    kept_s: float
    num_streamed: int
    largest: int


def others_of(kinds: Sequence[Kind], stay: tuple[int, ...]) -> Others:
    """Adds up what follows if so many groups of each of these kinds stay."""
    both = list(zip(stay, kinds))
    return Others(
        stay,
        held=sum(count * kind.kept_bytes for count, kind in both),
        streamed=sum((kind.total - count) * kind.kept_bytes for count, kind in both),
        kept_s=sum(count * kind.decompress_s for count, kind in both),
        num_streamed=sum(kind.total - count for count, kind in both),
        largest=max((kind.kept_bytes for count, kind in both if count < kind.total), default=0),
    )


def mean(sizes: Sequence[int]) -> int:
    """Their mean, rounded up."""
    return -(-sum(sizes) // len(sizes))


def are_alike(demand: Demand) -> bool:
    """Tells whether the groups of each name have the same bytes, plain and compressed."""
    sizes = {(group.name, nbytes, demand.compressed.get(group)) for group, nbytes in demand.groups}
    return len(sizes) == len({group.name for group, _ in demand.groups})


def find_kinds(
    demand: Demand, rates: Rates, compressed: bool, size: Callable[[Sequence[int]], int] = max
) -> list[Kind]:
    """The kinds of a demand, the largest last; either all groups are plain, or those that may be compressed are. Groups
    of one name that differ in size all count as `size` of them."""
    allowed = _allowed(demand, compressed)
    sizes, kinds = dict(demand.groups), []
    for name, members in by_name([group for group, _ in demand.groups]).items():
        plain = kept = size([sizes[group] for group in members])
        group_s, shrink = 0.0, {group for group in members if compressed and group in demand.compressed}
        if shrink:
            kept = size([demand.compressed[group] if group in shrink else sizes[group] for group in members])
            group_s = decompress_s(size([demand.decompressed_bytes({group} & shrink) for group in members]), 1, rates)
        kinds.append(Kind(name, len(members), plain, kept, group_s, allowed[name]))
    return sorted(kinds, key=lambda kind: kind.total * kind.plain_bytes)


def _allowed(demand: Demand, compressed: bool) -> dict[str, tuple[int, ...]]:
    """The numbers of groups of each name that may stay. A fraction that was asked for counts the layers' bytes as they
    are kept."""
    totals = {name: len(members) for name, members in by_name([group for group, _ in demand.groups]).items()}
    if demand.resident == "auto":
        if demand.memory_bytes is None:
            return {name: (total,) for name, total in totals.items()}
        return {name: (*range(0, total, _step(total)), total) for name, total in totals.items()}
    if demand.resident in ("all", 1.0):
        return {name: (total,) for name, total in totals.items()}
    if demand.resident == "none":
        return dict.fromkeys(totals, (0,))
    layers = [(g, demand.compressed.get(g, nbytes) if compressed else nbytes) for g, nbytes in demand.groups[:-1]]
    counts = counts_within(layers, int(demand.resident * sum(nbytes for _, nbytes in layers)))
    return {name: (counts.get(name, 0),) for name in totals}


def _step(total: int) -> int:
    return 1 if total <= MOST_ALL else -(-total // MOST_COUNTS)
