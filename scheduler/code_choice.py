"""Whether weights are kept coded, and which of those that stay: by the predicted time of a decode pass of one row.

PURE. Coded weights are fewer bytes, on the link and in memory, and cost their decoding in every pass. So what streams
is coded where the link binds; of what stays, as much is plain as memory allows once nothing more has to stream for it.
In between the two are weighed: a few more groups that stream may cost less than decoding many that stay.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from scheduler.demand import Demand, show_bytes
from scheduler.residency import Residency, plan_residency
from scheduler.step_plan import GroupId

NUM_TRIED = 16  # ways to divide memory between more groups and plain ones
LEAST_GAIN = 0.02  # of a pass, for which "auto" codes: loading takes longer

Planned = tuple[Demand, Residency]


@dataclass(frozen=True)
class CodeOffer:
    """What coding has to offer an engine: `coded` has the bytes of the groups that may be coded, `buffer_bytes` is what
    decoding them needs; `pass_s` predicts a decode pass of one row. `choice` is that of `--weights-code`."""

    choice: str
    coded: Mapping[GroupId, int]
    buffer_bytes: int
    pass_s: Callable[[Residency], float]


def choose_code(offer: CodeOffer, demand: Demand) -> Planned:
    """The demand that was chosen, coded or the plain one that is given, and its residency. "auto" codes only where
    something would stream or nothing fit, and only if that is faster; "lossless" whatever does not stay plain.

    Raises ValueError, as plan_residency does, if what was asked for does not fit.
    """
    if offer.choice == "none" or not offer.coded:
        return demand, plan_residency(demand)
    coded_demand = replace(demand, coded=offer.coded, fixed=(*demand.fixed, ("decode buffer", offer.buffer_bytes)))
    if offer.choice == "lossless":
        coded = _fastest(offer, coded_demand) or (coded_demand, plan_residency(coded_demand))  # says what would fit
        return coded if coded[1].coded else (demand, plan_residency(demand))
    plain = _plan(demand)
    if plain is not None and not plain.streamed:
        return demand, plain
    coded = _fastest(offer, coded_demand)
    if coded is None or (plain and offer.pass_s(coded[1]) > (1 - LEAST_GAIN) * offer.pass_s(plain)):
        return demand, plain or plan_residency(demand)  # which says what would fit
    return coded


def _fastest(offer: CodeOffer, demand: Demand) -> Planned | None:
    """Of those ways to divide memory that leave the KV cache as large as where all is coded, or as is wished for."""
    most = sum(nbytes - offer.coded.get(group, nbytes) for group, nbytes in demand.groups)
    coded = _plan(demand)
    if coded is None:
        return None
    parts = range(1, NUM_TRIED + 1) if demand.memory_bytes is not None else (NUM_TRIED,)
    tried = [replace(demand, plain=most * part // NUM_TRIED) for part in parts if coded.resident]
    planned = [(demand, coded)]
    planned += [(each, residency) for each in tried if (residency := _plan(each)) is not None]
    least_pages = min(planned[0][1].num_pages, demand.wanted_pages)
    return min((each for each in planned if each[1].num_pages >= least_pages), key=lambda each: offer.pass_s(each[1]))


def _plan(demand: Demand) -> Residency | None:
    try:
        return plan_residency(demand)
    except ValueError:
        return None


class CodeDoesNotPay(ValueError):
    """Weights were to be coded if that pays, and do not shrink enough: they are to be kept plain."""


def settle(offer: CodeOffer, planned: Planned, sizes: Mapping[GroupId, int]) -> Planned:
    """The same groups resident, coded and plain, with the bytes that they really have coded: ring and KV cache are
    planned anew. Raises CodeDoesNotPay where they hardly shrink or do not fit, and the choice is "auto"; ValueError
    where they do not fit, and it is not."""
    demand, residency = planned
    coded = {group: sizes[group] for group in residency.coded}
    settled = replace(demand, coded=coded, resident=residency.resident, plain=frozenset())
    expected, plain = (sum(each[group] for group in coded) for each in (demand.coded, dict(demand.groups)))
    found = f"coded weights have {show_bytes(sum(coded.values()))}, where {show_bytes(expected)} were planned"
    if offer.choice == "auto" and sum(coded.values()) > (1 - LEAST_GAIN) * plain:
        raise CodeDoesNotPay(f"weights_code: {found}, and plain ones {show_bytes(plain)}")
    try:
        return settled, plan_residency(settled)
    except ValueError as error:
        kind = CodeDoesNotPay if offer.choice == "auto" else ValueError
        raise kind(f"weights_code: {found}: they do not fit; weights_code='none' keeps them plain") from error
