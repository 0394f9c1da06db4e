"""The residency of a split: how large the ring is, how many KV pages there are, and what of it was shrunk.

Torch-free: it makes a `Residency` out of numbers of bytes, before a byte of weights is loaded. These claim a rank's
memory, in order:

    | ring | workspace, activations, context, collectives, graphs | KV cache | resident groups | what is left: KV |

Where nothing streams, the weights come first. search.py chooses which groups stay, time_model.py says what a pass
costs, and residency_table.py shows the decision.
"""

from dataclasses import dataclass, replace

from penstock.scheduler.passes.build import default_ring_bytes, lay_out_ring, minimum_ring_bytes, roomy_ring_bytes
from penstock.scheduler.passes.pass_plan import GroupId, RingLayout
from penstock.scheduler.residency.demand import CPU_KV_BYTES, KV_PARTS, Demand, Split
from penstock.scheduler.units import show_bytes


@dataclass(frozen=True)
class Residency:
    """The decision for one rank, in bytes. `compressed` are the groups that are kept compressed, on the device or on
    the host; the bytes of `streamed` are those that cross the link. `num_pages` counts the reserved page 0; `claims`
    are named parts of the device's memory; each of `notes` says in a sentence what was shrunk, and why."""

    resident: frozenset[GroupId]
    compressed: frozenset[GroupId]
    streamed: tuple[tuple[GroupId, int], ...]
    embed_resident: bool
    ring: RingLayout
    num_pages: int
    max_model_len: int
    resident_bytes: int
    host_bytes: int
    memory_bytes: int | None
    claims: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]

    @property
    def split(self) -> Split:
        return Split(self.resident, self.compressed, self.embed_resident)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that cross the link in one pass."""
        return sum(nbytes for _, nbytes in self.streamed)

    @property
    def claimed_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.claims)


def check_demand(demand: Demand) -> None:
    """Raises ValueError if max_model_len or num_pages is out of range."""
    if demand.max_model_len is not None and demand.max_model_len > demand.max_position:
        raise ValueError(
            f"max_model_len={demand.max_model_len}: the model was trained for {demand.max_position} tokens"
        )
    if demand.num_pages is not None and demand.num_pages < 2:
        raise ValueError(f"num_pages={demand.num_pages}: expected at least 2 (page 0 is reserved for padding)")


def plan_residency(demand: Demand, split: Split) -> Residency:
    """The residency of one rank that keeps exactly this split. The memory that is left goes to the KV cache.

    Raises ValueError, with what was asked, what there is and what would fit, if the split does not fit even with the
    smallest ring and KV cache, and if max_model_len, ring or num_pages is out of range.
    """
    check_demand(demand)
    planned = _fit(demand, split)
    if planned is None:
        raise ValueError(_refusal(demand, split))
    return planned


def _fit(demand: Demand, split: Split) -> Residency | None:
    """The residency, or None where the split does not fit even with the smallest ring and KV cache."""
    streamed = demand.streamed(split)
    notes: list[str] = []
    ring_bytes = _ring_bytes(demand, streamed, notes)
    num_pages = demand.wanted_pages(demand.max_num_seqs)
    if demand.memory_bytes is not None:
        room = demand.memory_bytes - demand.claims_bytes(split) - demand.weights_bytes(split)
        ring_room = room - demand.kv_bytes(demand.least_pages)
        if ring_room < (minimum_ring_bytes(streamed) if demand.ring_bytes is None else ring_bytes):
            return None
        if ring_bytes > ring_room:
            notes.append(f"ring cut from {show_bytes(ring_bytes)} to {show_bytes(ring_room)}: no more memory is left")
            ring_bytes = ring_room
        most = demand.max_num_seqs * demand.pages(demand.full_len) + 1
        num_pages = demand.num_pages or min(most, demand.pages_in(room - ring_bytes))
        roomy_bytes = roomy_ring_bytes(streamed)
        left = min(num_pages, demand.pages_in(max(room - roomy_bytes, 0)))
        if demand.ring_bytes is None and left >= max(demand.least_pages, num_pages - num_pages // KV_PARTS):
            ring_bytes, num_pages = roomy_bytes, left
    elif demand.num_pages is None:
        num_pages = min(num_pages, max(demand.least_pages, CPU_KV_BYTES // demand.page_bytes + 1))
    made = _assemble(demand, split, ring_bytes, num_pages)
    return replace(made, notes=(*notes, *_kv_notes(demand, made)))


def _ring_bytes(demand: Demand, streamed: list[tuple[GroupId, int]], notes: list[str]) -> int:
    wanted, total = demand.ring_bytes, sum(nbytes for _, nbytes in streamed)
    if wanted is None or not streamed:
        return default_ring_bytes(streamed)
    if wanted < minimum_ring_bytes(streamed):
        least = show_bytes(minimum_ring_bytes(streamed))
        raise ValueError(f"ring={wanted} bytes ({show_bytes(wanted)}): the largest streamed group has {least}")
    if wanted > total:
        notes.append(f"ring cut from {show_bytes(wanted)} to {show_bytes(total)}: all that streams fits into it")
    return min(wanted, total)


def _assemble(demand: Demand, split: Split, ring_bytes: int, num_pages: int) -> Residency:
    streamed, weights = demand.streamed(split), demand.weights_bytes(split)
    max_model_len = min(demand.full_len, demand.tokens_in(num_pages))
    if demand.max_model_len is not None and max_model_len < demand.max_model_len:
        asked = f"{demand.len_option}={demand.max_model_len} is asked"
        raise ValueError(f"num_pages={num_pages}: {max_model_len} tokens fit, and {asked}")
    claims = [("ring", ring_bytes), *demand.claims(split), ("KV cache", num_pages * demand.page_bytes)]
    if demand.gathered_page_bytes:
        claims.append(("gathered context", demand.gathered_bytes(num_pages)))
    if demand.partials_page_bytes:
        claims.append(("attention partials", num_pages * demand.partials_page_bytes))
    claims.insert(0 if not streamed else len(claims), ("resident weights", weights))
    return Residency(
        resident=split.resident,
        compressed=split.compressed,
        streamed=tuple(streamed),
        embed_resident=split.embed_resident,
        ring=lay_out_ring(streamed, ring_bytes),
        num_pages=num_pages,
        max_model_len=max_model_len,
        resident_bytes=weights,
        host_bytes=sum(nbytes for _, nbytes in streamed) + (0 if split.embed_resident else demand.embed_bytes),
        memory_bytes=demand.memory_bytes,
        claims=tuple(claims),
        notes=(),
    )


def _kv_notes(demand: Demand, made: Residency) -> list[str]:
    notes = []
    if made.max_model_len < demand.full_len:
        where = "memory" if demand.num_pages is None else f"num_pages={demand.num_pages}"
        notes.append(
            f"max_model_len shrunk from the trained {demand.full_len} to {made.max_model_len}, which fit in {where}"
        )
    num_seqs = demand.seqs_in(made.num_pages)
    if num_seqs < demand.max_num_seqs:
        most = f"up to max_num_seqs={demand.max_num_seqs}"
        held = f"{num_seqs} sequence{'s' * (num_seqs != 1)} of {demand.kv_len} tokens"
        notes.append(f"the KV cache holds {held}, or more shorter ones, {most}")
    return notes


def _refusal(demand: Demand, split: Split) -> str:
    """A message with what was asked, what there is, and what would fit."""
    ring = demand.ring_bytes or minimum_ring_bytes(demand.streamed(split))
    kv, weights = demand.kv_bytes(demand.least_pages), demand.weights_bytes(split)
    held = f"KV of {demand.least_len} tokens" if demand.num_pages is None else f"num_pages={demand.num_pages}"
    parts = [("resident weights", weights), ("ring", ring), *demand.claims(split), (held, kv)]
    need = sum(nbytes for _, nbytes in parts)
    listed = ", ".join(f"{name} {show_bytes(nbytes)}" for name, nbytes in parts if nbytes)
    left = demand.pages_in(demand.memory_bytes - need + kv)
    fits = [f"gpu_memory of at least {show_bytes(need)}"]
    nothing = [Split(frozenset(), compressed, embed_resident=False) for compressed in (split.compressed, frozenset())]
    if split.resident and demand.resident != "auto" and any(_fit(demand, one) is not None for one in nothing):
        fits.append("resident=auto")
    if left > 1 and demand.tokens_in(left) > 0:
        fits.append(f"{demand.len_option} up to {demand.tokens_in(left)}, or num_pages up to {left}")
    fits += ["a smaller max_num_batched_tokens or max_num_seqs (activations, workspace)", "more ranks"]
    asked = f"resident={demand.resident} needs {show_bytes(need)} of memory a rank ({listed})"
    return f"{asked}, and there are {show_bytes(demand.memory_bytes)}. What would fit: {'; '.join(fits)}"
