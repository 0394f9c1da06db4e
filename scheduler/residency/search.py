"""The split with the most predicted tokens/s, and for how many sequences. Where all weights fit, they stay as they are
stored, unless streaming or compressing some gains STREAMING_GAIN of the tokens/s.

Torch-free. The number of sequences that is asked for need not be the best: with a few fewer all weights may stay,
and the others wait. A pass over more sequences never takes less time, so a number between two known ones, low < high,
gives at most high / time(low) tokens/s: numbers between are tried only while that is more than the best so far.
family.py finds the fastest split of a given number of sequences.
"""

import bisect
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from penstock.scheduler.residency.decide import Residency, check_demand, plan_residency
from penstock.scheduler.residency.demand import CPU_KV_BYTES, KV_PARTS, Demand, Split
from penstock.scheduler.residency.family import Cost, Family, Found
from penstock.scheduler.residency.kinds import are_alike, mean

TOLERANCE = 0.003  # the share of the tokens/s that the number found may give less than the best one
USUAL_SEQS = 512  # sequences that are let in wherever they fit; more only where that pays
SHORT_LEN = 512  # tokens of each of these
LEAST_GAIN = 0.05  # share of the tokens/s that twice as many must gain
STREAMING_GAIN = 0.05  # share that other plans must gain where all weights fit: they slow one sequence, predictions err


def plan_fastest(demand: Demand, cost: Cost, compressed: bool) -> tuple[Demand, Residency]:
    """The demand, with the planned number of sequences if no number was asked for, and the residency with the most
    tokens/s, or that in which all weights stay as they are stored, if they fit and no other gains STREAMING_GAIN. Where
    groups stream, either all are plain, or those that may be compressed are; those of one name that differ in size all
    count as the largest, or as their mean where the split that is found so is faster, and allows sequences as long. The
    residency is the one that leaves most to the KV cache where not even one full sequence fits otherwise. That one is
    also tried where neither the number nor the length of sequences is set and more of them would fit.

    Raises ValueError, as plan_residency does, if nothing fits.
    """
    check_demand(demand)
    planned = _fastest(demand, cost, compressed, max)
    if planned[1].streamed and not are_alike(demand):
        planned = _or_by_mean(demand, cost, compressed, planned)
    is_plain = not planned[1].streamed and not planned[1].compressed
    staying = _all_stay(demand, cost) if demand.resident == "auto" and not is_plain else None
    if staying and cost.tokens_s(*planned) < (1 + STREAMING_GAIN) * cost.tokens_s(*staying):
        planned = staying
    return _with_more_seqs(demand, cost, *planned)


def _all_stay(demand: Demand, cost: Cost) -> tuple[Demand, Residency] | None:
    """The fastest plan in which all weights stay as they are stored: the embedding, too, unless that costs more than
    TOLERANCE, since its rows can be gathered from the host. None if not all fit beside the KV cache."""
    groups = _best_plan(demand, Family(demand, cost, compressed=False, size=mean, all_stay=True))
    everything = _best_plan(demand, Family(replace(demand, resident="all"), cost, compressed=False, size=mean))
    if groups is None or everything is None:
        return groups
    return max(everything, groups, key=lambda each: cost.tokens_s(*each) * (1 + TOLERANCE * each[1].embed_resident))


def _or_by_mean(
    demand: Demand, cost: Cost, compressed: bool, planned: tuple[Demand, Residency]
) -> tuple[Demand, Residency]:
    """The plan, or the one that is found where groups of one name count as their mean, if it is better."""
    try:
        other = _fastest_by_mean(demand, cost, compressed)
        _with_more_seqs(demand, cost, *other)
    except ValueError:  # the larger ones of those that stay are too many
        return planned
    is_as_long = other[1].max_model_len >= planned[1].max_model_len
    return other if is_as_long and cost.tokens_s(*other) > cost.tokens_s(*planned) else planned


def _fastest_by_mean(demand: Demand, cost: Cost, compressed: bool) -> tuple[Demand, Residency]:
    """The fastest split where groups of one name count as their mean. Those that stay may be larger than it, or lie
    together in the ring: the bytes that the KV cache lacks then are left aside in a second search."""
    kept, residency = _fastest(demand, cost, compressed, mean)
    missing = kept.kv_bytes(kept.wanted_pages(kept.max_num_seqs)) - kept.kv_bytes(residency.num_pages)
    if demand.memory_bytes is None or missing <= 0:
        return kept, residency
    less = replace(demand, memory_bytes=demand.memory_bytes - missing)
    kept, residency = _fastest(less, cost, compressed, mean)
    kept = replace(kept, memory_bytes=demand.memory_bytes)
    return kept, plan_residency(kept, residency.split)


def _fastest(
    demand: Demand, cost: Cost, compressed: bool, size: Callable[[Sequence[int]], int]
) -> tuple[Demand, Residency]:
    family = Family(demand, cost, compressed, size)
    planned, least = _best_plan(demand, family), family.split(family.smallest())
    if planned is None:
        return _plan_most(demand, least)
    num_seqs = planned[0].max_num_seqs
    if _may_shorten(demand, num_seqs) and _holds(demand.planned_for(num_seqs + 1), least):
        return max((planned, _plan_most(demand, least)), key=lambda each: cost.tokens_s(*each))
    return planned


def _best_plan(demand: Demand, family: Family) -> tuple[Demand, Residency] | None:
    """The demand for the number of sequences with the most tokens/s, and its residency; None where nothing fits."""
    best = _best(family)
    if best is None:
        return None
    num_seqs, found = best
    settled = demand.planned_for(num_seqs)
    return settled, plan_residency(settled, family.split(found))


def _with_more_seqs(demand: Demand, cost: Cost, kept: Demand, residency: Residency) -> tuple[Demand, Residency]:
    """The same split for more sequences than its number was planned for, since shorter ones fit at once in greater
    number. They take at most 1 / KV_PARTS of the KV cache, for activations, logits and what is kept of rows. The cache
    counts as it is with all pages that there is memory for, not only those of the planned number at full length."""
    if not demand.plans_num_seqs or demand.memory_bytes is None:
        return kept, residency
    roomy = plan_residency(replace(kept, max_num_seqs=max(kept.max_num_seqs, demand.most_let_in)), residency.split)
    most_bytes = kept.fixed_bytes + roomy.num_pages * demand.page_bytes // KV_PARTS
    more = range(kept.max_num_seqs + 1, min(_most_that_pay(kept, cost, roomy), demand.most_let_in) + 1)
    num_more = bisect.bisect_left(more, True, key=lambda n: demand.planned_for(n).fixed_bytes > most_bytes)
    if num_more == 0:
        return kept, residency
    settled = replace(kept, max_num_seqs=more[num_more - 1], fixed=demand.planned_for(more[num_more - 1]).fixed)
    return settled, plan_residency(settled, residency.split)


def _most_that_pay(kept: Demand, cost: Cost, residency: Residency) -> int:
    """The most sequences that are let in: USUAL_SEQS, and as many of SHORT_LEN as the KV cache holds while twice as
    many gain LEAST_GAIN at least. Where weights stream each is a gain, until the link no longer binds."""
    short_len = min(SHORT_LEN, kept.full_len)
    held = (residency.num_pages - 1) // kept.pages(short_len)

    def tokens_s(num_seqs: int) -> float:
        return cost.tokens_s_of(num_seqs, short_len, kept, residency)

    num_seqs = max(kept.max_num_seqs, USUAL_SEQS)
    while num_seqs < held:
        more = min(2 * num_seqs, held)
        if tokens_s(more) < tokens_s(num_seqs) * (1 + LEAST_GAIN * (more / num_seqs - 1)):
            break
        num_seqs = more
    return num_seqs


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
    """The most sequences: max_num_seqs, or fewer where the number of pages is known and bounds them."""
    num_pages = demand.num_pages
    if num_pages is None and demand.memory_bytes is None:
        num_pages = CPU_KV_BYTES // demand.page_bytes + 1
    return demand.max_num_seqs if num_pages is None else max(demand.seqs_in(num_pages), 1)


def _may_shorten(demand: Demand, num_seqs: int) -> bool:
    """Tells whether there may be more sequences than these, at the cost of the longest one."""
    is_open = demand.plans_num_seqs and demand.max_model_len is None and demand.memory_bytes is not None
    return is_open and num_seqs < demand.max_num_seqs


def _plan_most(demand: Demand, split: Split) -> tuple[Demand, Residency]:
    """The demand for as many sequences as this split leaves memory for, and its residency."""
    more = range(2, demand.max_num_seqs + 1)
    num_seqs = 1 + bisect.bisect_left(more, True, key=lambda n: not _holds(demand.planned_for(n), split))
    settled = demand.planned_for(num_seqs)
    return settled, plan_residency(settled, split)


def _holds(demand: Demand, split: Split) -> bool:
    """Tells whether max_num_seqs sequences fit beside this split, each of kv_len tokens and none of them longer."""
    num_pages = demand.max_num_seqs * demand.pages(demand.kv_len) + 1
    if demand.num_pages is not None or demand.memory_bytes is None:
        return num_pages <= (demand.num_pages or num_pages)
    held = demand.weights_bytes(split) + demand.usual_ring_bytes(split) + demand.claims_bytes(split)
    return held + demand.kv_bytes(num_pages) <= demand.memory_bytes


def most_per_second(most: int, seconds: Callable[[int], float]) -> int | None:
    """The n of 1 .. most with the greatest n / seconds(n), to TOLERANCE; None if not even one fits. `seconds` never
    falls and is infinite where n do not fit."""
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
