"""Shows a Residency and its predicted passes as text. Torch-free; every figure has its unit."""

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.scheduler.cost.time_model import PassTime, Rates
from penstock.scheduler.residency.decide import Residency
from penstock.scheduler.units import show_bytes, show_time

LEAST_SHARE = 0.005  # a smaller loss of tokens/s is not mentioned


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
    """The same engine with another split: its longest context, batch 1 and the most sequences that fit."""

    label: str
    streamed_bytes: int
    max_model_len: int
    one: Prediction
    best: Prediction


def gives_up(this: Variant, other: Variant) -> str:
    """Text of what the other split gives up, compared with this one."""
    lost = []
    if other.max_model_len < this.max_model_len:
        lost.append(f"contexts over {other.max_model_len} tokens")
    if other.best.num_seqs < this.best.num_seqs:
        fewer = this.best.num_seqs - other.best.num_seqs
        lost.append(f"{fewer} sequence{'s' * (fewer != 1)} at once")
    for name, mine, theirs in (("", this.best, other.best), (" of one sequence", this.one, other.one)):
        share = 1 - theirs.tokens_s / mine.tokens_s
        if share >= LEAST_SHARE:
            lost.append(f"{share:.0%} of the tokens/s{name}")
    return ", ".join(lost) or "nothing of these"


def table(
    residency: Residency,
    page_size: int,
    num_seqs: str,
    rates: Rates,
    predictions: Sequence[Prediction],
    variants: Sequence[tuple[Variant, str]],
    free_tokens: int,
    kv_in_host: str = "",
) -> str:
    """The table as text: what stays and streams on a rank, the time of a pass and its bound, and what other splits
    would give and give up. `kv_in_host` is a line about KV pages in host memory."""
    lines = [*_memory(residency, page_size, kv_in_host), f"most sequences a pass     {num_seqs}", ""]
    lines += _passes(rates, predictions, free_tokens)
    if variants:
        lines += ["", *_variants(variants)]
    lines += ["", *(f"note: {note}" for note in residency.notes)] if residency.notes else []
    return "\n".join(lines)


def short_table(
    residency: Residency, page_size: int, num_seqs: str, rates: Rates, one: Prediction, best: Prediction
) -> str:
    """The table in nine lines at most: what stays and streams, and the speed of one sequence and of the most."""
    speed = f"{show_time(one.time.total_s)} a pass of {one.label}, {one.tokens_s:.2f} tokens/s"
    many = f"; {best.tokens_s:.2f} of {best.num_seqs} at once" if best.num_seqs > 1 else ""
    return "\n".join(
        [
            *_memory(residency, page_size, shown=("resident weights", "KV cache")),
            f"most sequences a pass     {num_seqs}",
            _rates(rates),
            f"predicted: {speed}{many}; bound: {_bound(one.time)}",
        ]
    )


def how_streamed(residency: Residency) -> str:
    """Text of how much of what streams is compressed; empty if nothing is."""
    num_compressed, num_streamed = len(residency.compressed - residency.resident), len(residency.streamed)
    share = "" if num_compressed == num_streamed else f"{num_compressed} of {num_streamed} groups "
    return f"{share}compressed without loss" if num_compressed else ""


def _memory(
    residency: Residency, page_size: int, kv_in_host: str = "", shown: Sequence[str] | None = None
) -> list[str]:
    """Lines of a rank's memory and its parts; of the parts only those of `shown`, if it is given."""
    num_compressed = len(residency.compressed & residency.resident)
    remarks = {
        "ring": f"{len(residency.ring.slots)} streamed groups pass through it, "
        f"{residency.ring.num_wrapped} of them copied ahead for the next pass",
        "KV cache": f"{residency.num_pages} pages of {page_size} tokens (page 0 is reserved)",
        "resident weights": f"{len(residency.resident)} of {len(residency.resident) + len(residency.streamed)} groups"
        + (f", {num_compressed} of them compressed" if num_compressed else "")
        + (", and the embedding" if residency.embed_resident else ""),
        "gathered context": "the keys and values of the longest sequence in one layer, for the chunks of its prompt",
        "attention partials": "what attention leaves of segments of the context, until they are merged",
        "decompression buffer": "where compressed groups are decompressed to, one after the other",
        "KV staging": "pages of the KV cache on their way to host memory or back",
    }
    budget = "no limit (plain memory)" if residency.memory_bytes is None else show_bytes(residency.memory_bytes)
    lines = [f"device memory a rank      {budget:>12}"]
    for name, nbytes in residency.claims:
        if nbytes and (shown is None or name in shown):
            lines.append(f"  {name:<22}  {show_bytes(nbytes):>12}   {remarks.get(name, '')}".rstrip())
    if residency.memory_bytes is not None and shown is None:
        lines.append(f"  {'unused':<22}  {show_bytes(residency.memory_bytes - residency.claimed_bytes):>12}")
    embed = "" if residency.embed_resident else "   streamed groups; the embedding's rows are gathered from here"
    compressed = how_streamed(residency)
    return [
        *lines,
        f"host memory a rank        {show_bytes(residency.host_bytes):>12}{embed}",
        *([kv_in_host] if kv_in_host else []),
        f"streamed a pass and rank  {show_bytes(residency.streamed_bytes):>12}   {compressed}".rstrip(),
        f"longest context           {residency.max_model_len:>12} tokens",
    ]


def _passes(rates: Rates, predictions: Sequence[Prediction], free_tokens: int) -> list[str]:
    lines = [_rates(rates), f"{'predicted decode pass':<38}{'a pass':>12}{'tokens/s':>12}   bound"]
    for p in predictions:
        lines.append(f"  {p.label:<36}{show_time(p.time.total_s):>12}{p.tokens_s:>12.2f}   {_bound(p.time)}")
    free = f"up to {free_tokens} tokens a pass cost no extra time: the link binds"
    return [*lines, f"  {free if free_tokens > 1 else 'every token costs time: the link does not bind'}"]


def _rates(rates: Rates) -> str:
    link = f"link {rates.link_gb_s:.4g} GB/s {rates.link_note}".rstrip()
    others = f"memory {rates.memory_gb_s:.4g} GB/s, {rates.gemm_tflops:.4g} TFLOP/s a rank"
    return f"rates ({rates.source}): {link}, {others}"


def _bound(time: PassTime) -> str:
    return f"{time.bound} ({show_time(time.bound_s)})"


def _variants(variants: Sequence[tuple[Variant, str]]) -> list[str]:
    titles = f"{'batch 1':>10}{'best batch':>12}   {'at batch':<10}{'longest':>8}   gives up"
    lines = [f"{'other splits, tokens/s':<26}{'streamed':>12}{titles}"]
    for v, lost in variants:
        rates = f"{v.one.tokens_s:>10.2f}{v.best.tokens_s:>12.2f}   {v.best.num_seqs:<10}{v.max_model_len:>8}"
        lines.append(f"  {v.label:<24}{show_bytes(v.streamed_bytes):>12}{rates}   {lost}")
    return lines
