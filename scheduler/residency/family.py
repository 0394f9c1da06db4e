"""The splits of one demand: how many groups of each kind stay, and how many of those are kept compressed.

Torch-free. Groups of one name count as alike and are spread evenly, so a split is a few numbers. Of kind k there are L
groups of b bytes, c bytes compressed, which takes d seconds to decompress; s of them stream and p of those that stay
are plain. A decode pass of n sequences takes

    time = max(sum of s c / link,  steps(n) + sum of (L - p) d) + latency

and the split fits if

    ring(s) + buffer + sum of (L - s) c + sum of p (b - c)  <=  memory - fixed(n) - KV(n)

where ring is that of these streamed groups and buffer that of the kinds that are compressed. Weights that are not
compressed have c = b and d = 0. Every number is tried for all kinds but the largest. For the largest kind memory bounds
from above how many groups stay, and the link, with the best time so far, from below: few numbers lie between. The most
that could be plain, if groups could be cut, gives a lower bound of a split's time, which dismisses most splits. Nothing
is laid out before a split is chosen.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add
from typing import NamedTuple

from penstock.scheduler.cost.pass_work import PassShape, PassWork, StepWork
from penstock.scheduler.cost.time_model import Rates, decompress_s, free_tokens, pass_s, steps_s
from penstock.scheduler.passes.build import usual_ring_bytes
from penstock.scheduler.residency.decide import Residency
from penstock.scheduler.residency.demand import Demand, Split
from penstock.scheduler.residency.kinds import Others, find_kinds, others_of
from penstock.scheduler.residency.spread import every, spread
from penstock.scheduler.units import GB

LOOK_BACK = 8  # plain groups of a kind that may be given up for those of another


@dataclass(frozen=True)
class Cost:
    """The cost of a decode pass: the work of its steps, each with the number of times that it occurs, and the rates."""

    steps: tuple[tuple[StepWork, int], ...]
    rates: Rates

    def steps_s(self, num_seqs: int, context_tokens: int) -> float:
        return steps_s(self.steps, PassShape(num_seqs, num_seqs, num_seqs * context_tokens), self.rates)

    def pass_s(
        self, num_seqs: int, context_tokens: int, streamed_bytes: int, num_decompressed: int, decompressed_bytes: int
    ) -> float:
        decompressing_s = decompress_s(decompressed_bytes, num_decompressed, self.rates)
        return pass_s(streamed_bytes, self.steps_s(num_seqs, context_tokens), decompressing_s, self.rates)

    def tokens_s(self, demand: Demand, residency: Residency) -> float:
        """Predicted tokens/s of the sequences that are planned, as far as they fit."""
        return self.tokens_s_of(max(demand.seqs_in(residency.num_pages), 1), demand.kv_len, demand, residency)

    def tokens_s_of(self, num_seqs: int, context_tokens: int, demand: Demand, residency: Residency) -> float:
        """Predicted tokens/s of so many sequences of this length."""
        work = self._work(demand, residency)
        sizes = (work.streamed_bytes, work.num_decompressed, work.decompressed_bytes)
        return num_seqs / self.pass_s(num_seqs, context_tokens, *sizes)

    def free_tokens(self, demand: Demand, residency: Residency) -> int:
        """The tokens of a pass that the link hides."""
        return free_tokens(self._work(demand, residency), self.rates)

    def _work(self, demand: Demand, residency: Residency) -> PassWork:
        decompressed_bytes = demand.decompressed_bytes(residency.compressed)
        sizes = (residency.streamed_bytes, residency.resident_bytes)
        return PassWork(*sizes, self.steps, len(residency.compressed), decompressed_bytes)


class Found(NamedTuple):
    """A split as numbers by kind, in the family's order: groups that stay, and those of them that are plain. Splits
    compare by time, then by streamed bytes and by the time of decompression."""

    seconds: float
    streamed_bytes: int
    decompress_s: float
    stay: tuple[int, ...] = ()
    plain: tuple[int, ...] = ()
    left_bytes: float = 0


class Family:
    """The splits of a demand: either all groups are plain, or those that may be compressed are. Groups of one name that
    differ in size all count as `size` of them. With `all_stay` none streams."""

    def __init__(
        self,
        demand: Demand,
        cost: Cost,
        compressed: bool,
        size: Callable[[Sequence[int]], int] = max,
        all_stay: bool = False,
    ):
        self.demand, self.cost, self.compressed = demand, cost, compressed
        self.kinds = find_kinds(demand, cost.rates, compressed, size)
        if all_stay:
            self.kinds = [kind._replace(stay=(kind.total,)) for kind in self.kinds]
        *first, _ = self.kinds
        self._others = [others_of(first, stay) for stay in itertools.product(*(reversed(kind.stay) for kind in first))]
        self._order = [group.name for group, _ in demand.groups]
        self._rings: dict[tuple[int, ...], int | None] = {}
        self._buffers: dict[frozenset[str], int] = {}
        self._patterns: dict[tuple[int, int], list[int]] = {}
        compressible = [kind for kind in self.kinds if kind.decompress_s]
        self._all_decompress_s = sum(kind.total * kind.decompress_s for kind in compressible)
        self._most_saved = max(  # seconds a byte
            (k.decompress_s / k.extra_bytes for k in compressible if k.extra_bytes), default=0.0
        )

    def memory_for(self, num_seqs: int) -> float:
        """Bytes that so many sequences leave to weights, ring and decompression buffer."""
        demand = self.demand.planned_for(num_seqs)
        if demand.memory_bytes is None:
            return math.inf
        return demand.memory_bytes - demand.fixed_bytes - demand.kv_bytes(demand.wanted_pages(num_seqs))

    def fastest(self, num_seqs: int) -> Found | None:
        """The fastest split of so many sequences; None where no split fits."""
        memory = self.memory_for(num_seqs)
        base_s = self.cost.steps_s(num_seqs, self.demand.kv_len)
        best = Found(math.inf, 0, 0.0)
        for others in self._others:
            for count in self._counts(others, memory - others.held, base_s, best):
                best = min(best, self._try(others, count, memory - others.held, base_s, best))
        return best if best.stay else None

    def _counts(self, others: Others, room: float, base_s: float, best: Found) -> Sequence[int]:
        """The numbers of the largest kind that may stay: no fewer than the link allows, and as many as must be plain
        for the time, beside which there must be room for the fewest bytes of a ring. The more stay, the less is left
        of the room, since a ring grows by no more than what streams."""
        kind, rates = self.kinds[-1], self.cost.rates
        least, plain_s = 0.0, 0.0
        if best.seconds < math.inf:
            free_s = best.seconds - rates.pass_latency_s
            no_faster = best.seconds <= pass_s(0, base_s, 0.0, rates)  # can be found, but one that streams less can
            link_bytes = best.streamed_bytes if no_faster else free_s * rates.link_gb_s * GB
            least = kind.total - (link_bytes - others.streamed) / max(kind.kept_bytes, 1) - 1e-6
            plain_s = max(self._all_decompress_s + base_s - free_s - 1e-12, 0.0)
            if kind.decompress_s:
                least = max(least, (plain_s - others.kept_s) / kind.decompress_s - 1e-6)
        most = (room - others.largest) / max(kind.kept_bytes, 1)
        if least > most or most < 0 or others.kept_s + kind.total * kind.decompress_s < plain_s:
            return ()

        def has_room(count: int) -> bool:
            left = self._room_beside_ring(others, count, room)
            return left >= 0 and (plain_s == 0 or left * self._most_saved >= plain_s)  # left may be infinite

        first, last = bisect.bisect_left(kind.stay, least), bisect.bisect_right(kind.stay, most)
        last = bisect.bisect_left(kind.stay, True, first, max(first, last), key=lambda count: not has_room(count))
        return kind.stay[first:last][::-1]

    def _try(self, others: Others, count: int, room: float, base_s: float, best: Found) -> Found:
        """The split with these numbers and as many plain groups as `room` allows; `best` if it cannot be better."""
        kind, rates = self.kinds[-1], self.cost.rates
        streamed = others.streamed + (kind.total - count) * kind.kept_bytes
        kept_s = others.kept_s + count * kind.decompress_s
        saved_s = min(kept_s, self._room_beside_ring(others, count, room) * self._most_saved if kept_s else 0.0)
        if (pass_s(streamed, base_s, self._all_decompress_s - saved_s, rates), streamed) >= best[:2]:
            return best
        stay = (*others.stay, count)
        ring_bytes = self._ring(stay)
        room -= count * kind.kept_bytes
        if ring_bytes is None or ring_bytes > room:
            return best
        room -= ring_bytes
        if streamed == 0 and self.demand.resident in ("all", 1.0):
            room -= self.demand.embed_bytes
        plain = self._plain(stay, room)
        if plain is None:
            return best
        counts, saved_s, left = plain
        decompressing_s = self._all_decompress_s - saved_s
        return Found(pass_s(streamed, base_s, decompressing_s, rates), streamed, decompressing_s, stay, counts, left)

    def _room_beside_ring(self, others: Others, count: int, room: float) -> float:
        """The most bytes that `count` groups of the largest kind and the ring can leave of the room: a ring has the
        bytes of the largest group at least, or the mean of three groups in a row. (All runs of three together count
        each group three times, but for the two at either end.)"""
        kind = self.kinds[-1]
        room -= count * kind.kept_bytes
        if self.demand.ring_bytes is not None:
            return room
        num_streamed = kind.total - count
        streamed = others.streamed + num_streamed * kind.kept_bytes
        largest = max(others.largest, kind.kept_bytes) if num_streamed else others.largest
        num_streamed += others.num_streamed
        if num_streamed <= 3:
            return room - streamed
        return room - max(largest, (3 * streamed - 6 * largest) / (num_streamed - 2))

    def _ring(self, stay: tuple[int, ...]) -> int | None:
        """Bytes of the ring; None if the one that is asked for is too small."""
        if stay not in self._rings:
            sizes = self._streamed_sizes(stay)
            ring = usual_ring_bytes(sizes)
            if self.demand.ring_bytes is not None:
                asked = min(self.demand.ring_bytes, sum(sizes))
                ring = asked if asked >= max(sizes, default=0) else None
            self._rings[stay] = ring
        return self._rings[stay]

    def _streamed_sizes(self, stay: tuple[int, ...]) -> list[int]:
        """Bytes of the groups that stream, in the order of a pass."""
        sizes = functools.reduce(functools.partial(map, add), map(self._pattern, range(len(stay)), stay))
        return list(filter(None, sizes))

    def _pattern(self, kind_idx: int, stay: int) -> list[int]:
        """The streamed bytes of each group of the model: 0 for groups of other kinds and for those that stay."""
        if (kind_idx, stay) not in self._patterns:
            kind = self.kinds[kind_idx]
            stays = set(every(range(kind.total), stay))
            streamed = iter([0 if i in stays else kind.kept_bytes for i in range(kind.total)])
            self._patterns[kind_idx, stay] = [next(streamed) if name == kind.name else 0 for name in self._order]
        return self._patterns[kind_idx, stay]

    def _plain(self, stay: tuple[int, ...], room: float) -> tuple[tuple[int, ...], float, float] | None:
        """The number of staying groups of each kind that are plain, so that the least is decompressed; the seconds that
        this saves; and the bytes that are left. None if not even the decompression buffer fits. Its size depends on
        which kinds are compressed at all, and a kind is wholly plain only if all its groups stay."""
        best = None
        wholly = [kind.decompress_s > 0 and kind.total == count for count, kind in zip(stay, self.kinds)]
        for plain_kinds in itertools.product(*([False, True] if may else [False] for may in wholly)):
            compressed = [bool(kind.decompress_s) and not all_plain for kind, all_plain in zip(self.kinds, plain_kinds)]
            left = room - self._buffer(
                frozenset(kind.name for kind, is_compressed in zip(self.kinds, compressed) if is_compressed)
            )
            left -= sum(kind.total * kind.extra_bytes for kind, all_plain in zip(self.kinds, plain_kinds) if all_plain)
            if left < 0:
                continue
            counts, left = self._most_plain([n if c else 0 for n, c in zip(stay, compressed)], left)
            counts = tuple(n if is_compressed else s for n, s, is_compressed in zip(counts, stay, compressed))
            saved_s = sum(n * kind.decompress_s for n, kind in zip(counts, self.kinds))
            if best is None or saved_s > best[1]:
                best = (counts, saved_s, left)
        return best

    def _most_plain(self, most: Sequence[int], room: float) -> tuple[list[int], float]:
        """Counts of groups of each kind, up to `most`, that save the most seconds in `room` bytes, and the bytes left.
        Kinds are filled in turn, those that save most a byte first; a few groups fewer of one kind may make room for
        more of another."""
        in_turn = sorted((kind_idx for kind_idx, n in enumerate(most) if n), key=self._saved_a_byte, reverse=True)
        best, best_s = ([0] * len(most), room), -1.0

        def fill(turn: int, counts: list[int], left: float, saved_s: float) -> None:
            nonlocal best, best_s
            if turn == len(in_turn):
                if saved_s > best_s:
                    best, best_s = (counts.copy(), left), saved_s
                return
            kind_idx = in_turn[turn]
            extra, group_s = self.kinds[kind_idx].extra_bytes, self.kinds[kind_idx].decompress_s
            fits = most[kind_idx] if extra <= 0 else int(min(most[kind_idx], left // extra))
            least = fits if turn == len(in_turn) - 1 else max(fits - LOOK_BACK, 0)
            for count in range(fits, least - 1, -1):
                counts[kind_idx] = count
                fill(turn + 1, counts, left - count * extra, saved_s + count * group_s)

        fill(0, [0] * len(most), room, 0.0)
        return best

    def _saved_a_byte(self, kind_idx: int) -> float:
        kind = self.kinds[kind_idx]
        return kind.decompress_s / kind.extra_bytes if kind.extra_bytes > 0 else math.inf

    def _buffer(self, names: frozenset[str]) -> int:
        if names not in self._buffers:
            self._buffers[names] = self.demand.buffer_for(names)
        return self._buffers[names]

    def smallest(self) -> Found:
        """The split that leaves most memory to the KV cache, of those in which all groups of a kind stay or none
        does."""
        ends = itertools.product(*({kind.stay[0], kind.stay[-1]} for kind in self.kinds))
        return min((Found(0.0, 0, 0.0, stay, tuple(0 for _ in stay)) for stay in ends), key=self._used_bytes)

    def _used_bytes(self, found: Found) -> int:
        split = self.split(found)
        return self.demand.weights_bytes(split) + self.demand.usual_ring_bytes(split)

    def split(self, found: Found) -> Split:
        """The groups that the numbers stand for."""
        demand, groups = self.demand, [group for group, _ in self.demand.groups]
        resident = spread(groups, {kind.name: n for kind, n in zip(self.kinds, found.stay)})
        compressed = frozenset()
        if self.compressed:
            plain_counts = dict(zip((kind.name for kind in self.kinds), found.plain))
            staying = [group for group in groups if group in resident]
            compressed = frozenset(demand.compressed) - spread(staying, plain_counts)
        all_stay = len(resident) == len(groups)
        tied = not demand.embed_bytes and groups[-1] in resident
        must = demand.resident in ("all", 1.0)
        return Split(resident, compressed, tied or (all_stay and (must or found.left_bytes >= demand.embed_bytes)))
