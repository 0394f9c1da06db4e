"""The split with the most predicted tokens/s, and for how many sequences.

PURE. The number of sequences that is asked for need not be the best: a few less may let all weights stay, and then the
others wait. A pass over more sequences never takes less, so of the numbers between two that are known, low < high, none
gives more tokens/s than high / time(low): they are looked at only as long as that is more than the best so far. What
the fastest split of a number of sequences takes is family.py's.
"""

import heapq
import math
from collections.abc import Callable

from scheduler.demand import CPU_KV_BYTES, Demand
from scheduler.family import Cost, Family, Found
from scheduler.residency import Residency, check_demand, plan_residency

TOLERANCE = 0.003  # of the tokens/s, that a number of sequences may be from the best one


def plan_fastest(demand: Demand, cost: Cost, coded: bool) -> tuple[Demand, Residency]:
    """The demand, with the number of sequences that was planned if it was not asked for, and the residency with the
    most tokens/s, all groups plain or those coded that may be. Where not even one full sequence fits, the one that
    leaves the KV cache most.

    Raises ValueError, as plan_residency does, if nothing fits.
    """
    check_demand(demand)
    family = Family(demand, cost, coded)
    best = _best(family)
    if best is None:
        return _plan_smallest(family)
    num_seqs, found = best
    settled = demand.planned_for(num_seqs)
    return settled, plan_residency(settled, family.split(found))


def _best(family: Family) -> tuple[int, Found] | None:
    """The number of sequences with the most tokens/s, and its fastest split; None where nothing fits."""
    found: dict[int, Found | None] = {}

    def seconds(num_seqs: int) -> float:
        if num_seqs not in found:
            found[num_seqs] = family.fastest(num_seqs)
        return found[num_seqs].seconds if found[num_seqs] else math.inf

    num_seqs = most_per_second(_most_seqs(family.demand), seconds)
    return (num_seqs, found[num_seqs]) if num_seqs else None


def _most_seqs(demand: Demand) -> int:
    """Of max_num_seqs, as far as the number of pages is known."""
    num_pages = demand.num_pages
    if num_pages is None and demand.memory_bytes is None:
        num_pages = CPU_KV_BYTES // demand.page_bytes + 1
    return demand.max_num_seqs if num_pages is None else max(demand.seqs_in(num_pages), 1)


def _plan_smallest(family: Family) -> tuple[Demand, Residency]:
    """As many sequences as the least split leaves memory for."""
    split, num_seqs = family.split(family.smallest()), 1
    if family.demand.plans_num_seqs:
        planned = plan_residency(family.demand.planned_for(1), split)
        num_seqs = max((planned.num_pages - 1) // family.demand.pages(family.demand.kv_len), 1)
    settled = family.demand.planned_for(min(num_seqs, family.demand.max_num_seqs))
    return settled, plan_residency(settled, split)


def most_per_second(most: int, seconds: Callable[[int], float]) -> int | None:
    """The n of 1 .. most with the greatest n / seconds(n), to TOLERANCE. `seconds` never falls, and is infinite from
    where nothing fits; None if nothing ever does."""
    if seconds(1) == math.inf:
        return None
    low, high = 1, most + 1
    while high - low > 1:  # the largest that fits; often all do
        middle = most if high > most else (low + high) // 2
        low, high = (middle, high) if seconds(middle) < math.inf else (low, middle)
    best = max((1, low), key=lambda n: n / seconds(n))
    between = [(-(low - 1) / seconds(1), 1, low)]
    while between:
        bound, start, end = heapq.heappop(between)
        if end - start < 2 or -bound <= best / seconds(best) * (1 + TOLERANCE):
            continue
        middle = (start + end) // 2
        best = max((best, middle), key=lambda n: n / seconds(n))
        for a, b in ((start, middle), (middle, end)):
            heapq.heappush(between, (-(b - 1) / seconds(a), a, b))
    return best
