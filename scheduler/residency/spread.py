"""Decides which groups stay, given their number by name, or their bytes: they are spread evenly over depth.

Streamed groups must lie evenly over a pass: a run of resident layers is time in which the link idles once the ring is
full. Torch-free; groups of the same name are taken to be of the same size (the largest counts).
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from penstock.scheduler.passes.pass_plan import GroupId

T = TypeVar("T")


def every(members: Sequence[T], count: int) -> list[T]:
    """Takes `count` of the members at even distances."""
    total = len(members)
    return [member for i, member in enumerate(members) if (i + 1) * count // total > i * count // total]


def by_name(groups: Sequence[GroupId]) -> dict[str, list[GroupId]]:
    """The groups of each name, in order."""
    found: dict[str, list[GroupId]] = {}
    for group in groups:
        found.setdefault(group.name, []).append(group)
    return found


def spread(groups: Sequence[GroupId], counts: Mapping[str, int]) -> frozenset[GroupId]:
    """The groups that stay: as many of each name as `counts` says."""
    return frozenset(g for name, members in by_name(groups).items() for g in every(members, counts[name]))


def counts_within(groups: Sequence[tuple[GroupId, int]], most_bytes: int) -> dict[str, int]:
    """The number of groups (id, bytes) of each name that stay, so that together they have as many bytes as possible up
    to `most_bytes`."""
    sizes = dict(groups)
    members = sorted(by_name([group for group, _ in groups]).items(), key=lambda item: len(item[1]))  # see _best_counts
    kinds = [(max(sizes[group] for group in of_name), len(of_name)) for _, of_name in members]
    return dict(zip((name for name, _ in members), _best_counts(kinds, max(most_bytes, 0)), strict=True))


def _best_counts(kinds: list[tuple[int, int]], most_bytes: int) -> list[int]:
    """A count for each kind (bytes, number of groups), with the largest sum of bytes that fits; ties go to the counts
    that are most alike, so that whole layers stay or stream. Every count is tried for all kinds but the last."""
    if not kinds:
        return []
    (nbytes, total), rest = kinds[0], kinds[1:]
    most = min(total, most_bytes // nbytes) if nbytes else total
    if not rest:
        return [most]
    options = ([count, *_best_counts(rest, most_bytes - count * nbytes)] for count in range(most + 1))
    sizes = [size for size, _ in kinds]
    return max(options, key=lambda counts: (sum(map(int.__mul__, counts, sizes)), -(max(counts) - min(counts))))
