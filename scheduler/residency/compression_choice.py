"""Decides whether weights are kept compressed, and which of those that stay: by predicted tokens/s.

Torch-free. Compressed weights are fewer bytes, on the link and in memory, and cost decompression in every pass.
family.py weighs one against the other by decode passes; here either all that streams is compressed, or nothing is. A
pass with prompts is filled with the tokens that the link hides, and decompression takes the time of some. So the groups
that stay are kept plain where that costs few sequences.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from penstock.scheduler.passes.pass_plan import GroupId
from penstock.scheduler.residency.decide import Residency, plan_residency
from penstock.scheduler.residency.demand import Demand
from penstock.scheduler.residency.family import Cost
from penstock.scheduler.residency.search import plan_fastest
from penstock.scheduler.units import show_bytes

LEAST_GAIN = 0.005  # share of the tokens/s that "auto" must gain to compress, since loading takes longer
STAYING_GAIN = 0.05  # share that compressing what stays must gain over keeping the same groups plain
LEAST_SHRINK = 0.02  # share of the bytes of floats that compression must save, once sizes are known

Planned = tuple[Demand, Residency]


@dataclass(frozen=True)
class CompressionOffer:
    """The ways in which weights may be compressed: `choice` is that of `--weights-compression`, `cost` predicts decode
    passes."""

    choice: str
    cost: Cost


def choose_compression(offer: CompressionOffer, demand: Demand) -> Planned:
    """The demand, with its number of sequences settled, and the residency with the most tokens/s, but for what stays:
    that is compressed only if it has no room to be plain or gains STAYING_GAIN. "auto" compresses what streams only if
    that is faster; "lossless" always does.

    Raises ValueError, as plan_residency does, if what was asked for does not fit.
    """
    if offer.choice == "none" or not demand.compressed:
        return plan_fastest(demand, offer.cost, compressed=False)
    if offer.choice == "lossless":
        return _plan_compressed(offer, demand)
    try:
        compressed = _plan_compressed(offer, demand)
    except ValueError:
        compressed = None
    try:
        plain = plan_fastest(demand, offer.cost, compressed=False)
    except ValueError:  # which says what would fit
        if compressed is None:
            raise
        return compressed
    tokens_s = offer.cost.tokens_s
    return compressed if compressed and tokens_s(*compressed) > (1 + LEAST_GAIN) * tokens_s(*plain) else plain


def _plan_compressed(offer: CompressionOffer, demand: Demand) -> Planned:
    """The fastest plan in which what streams is compressed; or the same with all that stays plain, if that leaves room
    for the ring and for sequences as long, and costs less than STAYING_GAIN."""
    kept, fastest = plan_fastest(demand, offer.cost, compressed=True)
    split = replace(fastest.split, compressed=fastest.compressed - fastest.resident)
    try:
        plain = plan_residency(kept, split)
    except ValueError:  # not even the smallest ring and KV cache fit
        return kept, fastest
    is_cut = plain.ring.ring_bytes < min(fastest.ring.ring_bytes, kept.usual_ring_bytes(split))
    is_shorter = plain.max_model_len < fastest.max_model_len
    gains = offer.cost.tokens_s(kept, fastest) >= (1 + STAYING_GAIN) * offer.cost.tokens_s(kept, plain)
    return kept, fastest if is_cut or is_shorter or gains else plain


class CompressionDoesNotPay(ValueError):
    """Weights that are compressed only if that pays do not shrink enough: they are to be kept plain."""


def settle(offer: CompressionOffer, planned: Planned, sizes: Mapping[GroupId, int]) -> Planned:
    """The same split with the bytes that its compressed groups really have; ring and KV cache are planned anew. If the
    choice is "auto", raises CompressionDoesNotPay where the groups hardly shrink or do not fit; for another choice,
    raises ValueError where they do not fit."""
    demand, residency = planned
    compressed = {group: sizes[group] for group in residency.compressed}
    settled = replace(demand, compressed=compressed)
    expected, plain = (sum(each[group] for group in compressed) for each in (demand.compressed, dict(demand.groups)))
    saved, least = plain - sum(compressed.values()), LEAST_SHRINK * demand.decompressed_bytes(compressed)
    found = f"compressed weights have {show_bytes(sum(compressed.values()))}, where {show_bytes(expected)} were planned"
    if offer.choice == "auto" and saved < least:
        raise CompressionDoesNotPay(f"weights_compression: {found}, and plain ones {show_bytes(plain)}")
    try:
        return settled, plan_residency(settled, residency.split)
    except ValueError as error:
        kind = CompressionDoesNotPay if offer.choice == "auto" else ValueError
        raise kind(
            f"weights_compression: {found}: they do not fit; weights_compression='none' keeps them plain"
        ) from error
