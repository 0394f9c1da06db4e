"""Which groups stay on the device and which stream, how large the ring is and how many KV pages there are.

PURE: bytes in, a `Residency` out, before a byte of weights is loaded. Claims on a rank's memory, in order:

    | ring | workspace, activations, context, collectives, graphs | KV cache | resident groups | what is left: KV |

With `resident="all"`, or where all weights fit beside one full sequence, the weights come first and the KV cache
gets the rest. Why "auto" knows only these two: with R bytes left for KV and residency and W bytes of weights, tokens/s
goes as (R - r W) / (1 - r) in the resident fraction r, which rises with r if R > W and falls otherwise. It knows
bytes and no rates; what a pass costs is time_model.py's, and what a table shows is residency_table.py's.
"""

from dataclasses import dataclass, replace

from scheduler.demand import KV_LEN, Demand, show_bytes
from scheduler.plan_build import default_ring_bytes, lay_out_ring, minimum_ring_bytes
from scheduler.spread import spread_resident
from scheduler.step_plan import GroupId, RingLayout

CPU_KV_BYTES = 2**30  # KV cache where no memory budget and no num_pages are given


@dataclass(frozen=True)
class Residency:
    """The decision for one rank, in bytes. `coded` are the groups kept so, where they stay or where they stream from;
    the bytes of `streamed` are those that cross the link. `num_pages` counts the reserved page 0; `claims` are named
    parts of the device's memory; `notes` say in a sentence each what was shrunk, and why."""

    resident: frozenset[GroupId]
    coded: frozenset[GroupId]
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
    def streamed_bytes(self) -> int:
        """Bytes that cross the link in one pass."""
        return sum(nbytes for _, nbytes in self.streamed)

    @property
    def claimed_bytes(self) -> int:
        return sum(nbytes for _, nbytes in self.claims)


def plan_residency(demand: Demand) -> Residency:
    """Decides for one rank.

    Raises ValueError, with what was asked, what there is and what would fit, if the demand does not fit, and if
    max_model_len, ring or num_pages cannot be meant.
    """
    if demand.max_model_len is not None and demand.max_model_len > demand.max_position:
        raise ValueError(
            f"max_model_len={demand.max_model_len}: the model was trained for {demand.max_position} tokens"
        )
    if demand.num_pages is not None and demand.num_pages < 2:
        raise ValueError(f"num_pages={demand.num_pages}: expected at least 2 (page 0 is reserved for padding)")
    resident = _choose(demand)
    planned = _fit(demand, resident)
    if planned is None:
        raise ValueError(_refusal(demand, resident))
    return planned


def _choose(demand: Demand) -> frozenset[GroupId]:
    """The groups that stay. A fraction is of the layers' bytes; 1.0 is "all" and 0.0 is "none"."""
    everything = frozenset(group for group, _ in demand.groups)
    choice = demand.resident
    if isinstance(choice, frozenset):
        return choice
    if choice == "auto":
        if demand.memory_bytes is None or _fit(demand, everything) is not None:
            return everything
        return max((_fill(demand, head) for head in (False, True)), key=lambda resident: _worth(demand, resident))
    if choice == "all" or choice == 1.0:
        return everything
    if choice == "none":
        return frozenset()
    layers = demand.stored[:-1]
    return spread_resident(layers, int(choice * sum(nbytes for _, nbytes in layers)))


def _fill(demand: Demand, head: bool) -> frozenset[GroupId]:
    """What stays in the memory that ring, fixed claims and the wished KV cache leave, with or without the head."""
    layers, last = demand.stored[:-1], demand.stored[-1]
    always = frozenset([last[0]]) if head else frozenset()
    best = kept = always
    claimed = demand.fixed_bytes + demand.wanted_pages * demand.page_bytes
    for _ in range(4):  # the ring depends on what streams: a few rounds settle both
        others = claimed + demand.usual_ring_bytes(kept) + demand.plain + (last[1] if head else 0)
        kept = spread_resident(layers, demand.memory_bytes - others) | always
        used = demand.weights_bytes(kept) + claimed + demand.usual_ring_bytes(kept)
        if used <= demand.memory_bytes and demand.weights_bytes(kept) > demand.weights_bytes(best):
            best = kept
    return best


def _worth(demand: Demand, resident: frozenset[GroupId]) -> float:
    """Tokens/s of the largest batch, but for a factor: sequences in the KV cache over bytes that cross the link."""
    planned = _fit(demand, resident)
    return min(planned.num_pages, demand.wanted_pages) / planned.streamed_bytes if planned else -1.0


def _fit(demand: Demand, resident: frozenset[GroupId]) -> Residency | None:
    """The residency that keeps just these groups, or None where it does not fit even with the smallest ring and KV."""
    streamed = demand.streamed(resident)
    notes: list[str] = []
    ring_bytes = _ring_bytes(demand, streamed, notes)
    num_pages = demand.wanted_pages
    if demand.memory_bytes is not None:
        room = demand.memory_bytes - demand.fixed_bytes - demand.weights_bytes(resident)
        ring_room = room - demand.least_pages * demand.page_bytes
        if ring_room < (minimum_ring_bytes(streamed) if demand.ring_bytes is None else ring_bytes):
            return None
        if ring_bytes > ring_room:
            notes.append(f"ring cut from {show_bytes(ring_bytes)} to {show_bytes(ring_room)}: no more memory is left")
            ring_bytes = ring_room
        most = demand.max_num_seqs * demand.pages(demand.full_len) + 1
        num_pages = demand.num_pages or min(most, (room - ring_bytes) // demand.page_bytes)
    elif demand.num_pages is None:
        num_pages = min(num_pages, max(demand.least_pages, CPU_KV_BYTES // demand.page_bytes + 1))
    made = _assemble(demand, resident, ring_bytes, num_pages)
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


def _assemble(demand: Demand, resident: frozenset[GroupId], ring_bytes: int, num_pages: int) -> Residency:
    streamed = demand.streamed(resident)
    embed_resident = len(resident) == len(demand.groups) or (
        not demand.embed_bytes and demand.groups[-1][0] in resident
    )
    weights = demand.weights_bytes(resident)
    max_model_len = min(demand.full_len, demand.tokens_in(num_pages))
    if demand.max_model_len is not None and max_model_len < demand.max_model_len:
        asked = f"{demand.len_option}={demand.max_model_len} is asked"
        raise ValueError(f"num_pages={num_pages}: {max_model_len} tokens fit, and {asked}")
    claims = [("ring", ring_bytes), *demand.fixed, ("KV cache", num_pages * demand.page_bytes)]
    claims.insert(0 if not streamed else len(claims), ("resident weights", weights))
    return Residency(
        resident=resident,
        coded=demand.coded_groups(resident),
        streamed=tuple(streamed),
        embed_resident=embed_resident,
        ring=lay_out_ring(streamed, ring_bytes),
        num_pages=num_pages,
        max_model_len=max_model_len,
        resident_bytes=weights,
        host_bytes=sum(nbytes for _, nbytes in streamed) + (0 if embed_resident else demand.embed_bytes),
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
    length = min(made.max_model_len, KV_LEN)
    num_seqs = (made.num_pages - 1) // demand.pages(length)
    if num_seqs < demand.max_num_seqs:
        asked = f"max_num_seqs={demand.max_num_seqs} asked; the others wait"
        notes.append(f"the KV cache holds {num_seqs} sequences of {length} tokens at once ({asked})")
    return notes


def _refusal(demand: Demand, resident: frozenset[GroupId]) -> str:
    """What was asked, what there is, and what would fit."""
    streamed = demand.streamed(resident)
    ring = demand.ring_bytes or minimum_ring_bytes(streamed)
    kv, weights = demand.least_pages * demand.page_bytes, demand.weights_bytes(resident)
    held = f"KV of {demand.least_len} tokens" if demand.num_pages is None else f"num_pages={demand.num_pages}"
    parts = [("resident weights", weights), ("ring", ring), *demand.fixed, (held, kv)]
    need = sum(nbytes for _, nbytes in parts)
    listed = ", ".join(f"{name} {show_bytes(nbytes)}" for name, nbytes in parts if nbytes)
    left = (demand.memory_bytes - need + kv) // demand.page_bytes
    fits = [f"gpu_memory of at least {show_bytes(need)}"]
    if resident and _fit(replace(demand, resident="none"), frozenset()) is not None:
        fits.append("resident=auto")
    if left > 1 and demand.tokens_in(left) > 0:
        fits.append(f"{demand.len_option} up to {demand.tokens_in(left)}, or num_pages up to {left}")
    fits += ["a smaller max_num_batched_tokens or max_num_seqs (activations, workspace)", "more ranks"]
    asked = f"resident={demand.resident} needs {show_bytes(need)} of memory a rank ({listed})"
    return f"{asked}, and there are {show_bytes(demand.memory_bytes)}. What would fit: {'; '.join(fits)}"
