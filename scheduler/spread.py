"""Which groups stay, given how many bytes may: as many as fit, spread evenly over depth.

Streamed groups must lie evenly over a pass: a run of resident layers is time in which the link idles once the ring is
full. PURE; groups of the same name are taken to be of the same size (the largest counts).
"""

from collections.abc import Sequence

from scheduler.step_plan import GroupId


def spread_resident(groups: Sequence[tuple[GroupId, int]], most_bytes: int) -> frozenset[GroupId]:
    """The whole groups (id, bytes) with the most bytes together that are not above `most_bytes`: a count for each
    name, and the groups of a name spread evenly over depth."""
    by_name: dict[str, list[tuple[GroupId, int]]] = {}
    for group, nbytes in groups:
        by_name.setdefault(group.name, []).append((group, nbytes))
    members_by_kind = sorted(by_name.values(), key=len)  # the few first: all counts but the last kind's are tried
    kinds = [(max(nbytes for _, nbytes in members), len(members)) for members in members_by_kind]
    counts = _best_counts(kinds, max(most_bytes, 0))
    chosen = (_every(members, count) for members, count in zip(members_by_kind, counts, strict=True))
    return frozenset(group for members in chosen for group, _ in members)


def _every(members: list[tuple[GroupId, int]], count: int) -> list[tuple[GroupId, int]]:
    """`count` of the members at even distances."""
    total = len(members)
    return [member for i, member in enumerate(members) if (i + 1) * count // total > i * count // total]


def _best_counts(kinds: list[tuple[int, int]], most_bytes: int) -> list[int]:
    """For each kind (bytes, how many there are) a count, with the largest sum of bytes that fits; ties go to the
    counts that are most alike, so that whole layers stay or stream."""
    if not kinds:
        return []
    (nbytes, total), rest = kinds[0], kinds[1:]
    most = min(total, most_bytes // nbytes) if nbytes else total
    if not rest:
        return [most]
    options = ([count, *_best_counts(rest, most_bytes - count * nbytes)] for count in range(most + 1))
    sizes = [size for size, _ in kinds]
    return max(options, key=lambda counts: (sum(map(int.__mul__, counts, sizes)), -(max(counts) - min(counts))))
