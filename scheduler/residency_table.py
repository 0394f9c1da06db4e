"""Shows a Residency and its predicted passes as text. PURE; every figure has its unit."""

from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.demand import show_bytes
from scheduler.residency import Residency
from scheduler.time_model import PassTime, Rates


@dataclass(frozen=True)
class Prediction:
    """Decode passes of `num_seqs` sequences; `label` says which they are."""

    label: str
    num_seqs: int
    time: PassTime

    @property
    def tokens_s(self) -> float:
        """Tokens per second."""
        return self.num_seqs / self.time.total_s


@dataclass(frozen=True)
class Variant:
    """The same engine with another split: batch 1 and the best batch, or None where it does not fit."""

    label: str
    streamed_bytes: int
    one: Prediction
    best: Prediction


def table(
    residency: Residency,
    page_size: int,
    rates: Rates,
    predictions: Sequence[Prediction],
    variants: Sequence[Variant],
    free_tokens: int,
) -> str:
    """What stays and what streams, a rank; what a pass takes and what holds it; what other splits would give."""
    lines = [*_memory(residency, page_size), "", *_passes(rates, predictions, free_tokens)]
    if variants:
        lines += ["", *_variants(variants)]
    lines += ["", *(f"note: {note}" for note in residency.notes)] if residency.notes else []
    return "\n".join(lines)


def show_time(seconds: float) -> str:
    """In s or ms."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _memory(residency: Residency, page_size: int) -> list[str]:
    num_coded = len(residency.coded & residency.resident)
    remarks = {
        "ring": f"{len(residency.ring.slots)} streamed groups pass through it, "
        f"{residency.ring.num_wrapped} of them copied ahead for the next pass",
        "KV cache": f"{residency.num_pages} pages of {page_size} tokens (page 0 is reserved)",
        "resident weights": f"{len(residency.resident)} of {len(residency.resident) + len(residency.streamed)} groups"
        + (f", {num_coded} of them coded" if num_coded else "")
        + (", and the embedding" if residency.embed_resident else ""),
        "decode buffer": "where coded groups are decoded to, one after the other",
    }
    budget = "no limit (plain memory)" if residency.memory_bytes is None else show_bytes(residency.memory_bytes)
    lines = [f"device memory a rank      {budget:>12}"]
    for name, nbytes in residency.claims:
        if nbytes:
            lines.append(f"  {name:<22}  {show_bytes(nbytes):>12}   {remarks.get(name, '')}".rstrip())
    if residency.memory_bytes is not None:
        lines.append(f"  {'unused':<22}  {show_bytes(residency.memory_bytes - residency.claimed_bytes):>12}")
    embed = "" if residency.embed_resident else "   streamed groups; the embedding's rows are gathered from here"
    coded = "   coded without loss" if residency.coded - residency.resident else ""
    return [
        *lines,
        f"host memory a rank        {show_bytes(residency.host_bytes):>12}{embed}",
        f"streamed a pass and rank  {show_bytes(residency.streamed_bytes):>12}{coded}",
        f"longest context           {residency.max_model_len:>12} tokens",
    ]


def _passes(rates: Rates, predictions: Sequence[Prediction], free_tokens: int) -> list[str]:
    link = f"link {rates.link_gb_s:g} GB/s, memory {rates.memory_gb_s:g} GB/s, {rates.gemm_tflops:g} TFLOP/s a rank"
    lines = [f"rates ({rates.source}): {link}", f"{'predicted decode pass':<38}{'a pass':>12}{'tokens/s':>12}   bound"]
    for p in predictions:
        lines.append(f"  {p.label:<36}{show_time(p.time.total_s):>12}{p.tokens_s:>12.2f}   {_bound(p.time)}")
    free = f"up to {free_tokens} tokens a pass cost no extra time: the link binds"
    return [*lines, f"  {free if free_tokens else 'every token costs time: the link does not bind'}"]


def _bound(time: PassTime) -> str:
    return f"{time.bound} ({show_time(getattr(time, time.bound + '_s'))})"


def _variants(variants: Sequence[Variant]) -> list[str]:
    lines = [f"{'other splits':<38}{'streamed':>12}{'batch 1':>12}{'best batch':>12}   tokens/s"]
    for v in variants:
        rates = f"{v.one.tokens_s:>12.2f}{v.best.tokens_s:>12.2f}   at batch {v.best.num_seqs}"
        lines.append(f"  {v.label:<36}{show_bytes(v.streamed_bytes):>12}{rates}")
    return lines
