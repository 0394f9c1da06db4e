"""The bound of passes that ran, which is the least time that their bytes and FLOPs allow, and how near they came to it.

    bound of a pass = max(bytes streamed / link, bytes read / read rate, FLOPs / GEMM rate)

Every benchmark takes its bound, the fraction of it, and achieved GB/s and FLOP/s from here. Reduces and launches are no
part of a bound: they are costs, not limits. All figures are those of one rank.
"""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from penstock.engine.runtime.pass_times import Timed
from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import Rates, predict_pass
from penstock.scheduler.units import GB, gb_s

KINDS = ("decode", "mixed", "prefill")  # of passes


@dataclass(frozen=True)
class Bound:
    """The bound of one pass, or of several in a row. `term` (link, memory or compute) is what binds for most of
    `bound_s`."""

    term: str
    bound_s: float
    streamed_bytes: int
    read_bytes: int
    flops: float


def bound_of(work: PassWork, shapes: Sequence[PassShape], rates: Rates) -> Bound:
    """The sum of the passes' bounds; at least one pass."""
    seconds: Counter[str] = Counter()
    for shape in shapes:
        terms = {
            "link": work.streamed_bytes / (rates.link_gb_s * GB),
            "memory": work.read_bytes(shape) / (rates.memory_gb_s * GB),
            "compute": work.flops(shape) / (rates.gemm_tflops * 1e12),
        }
        term = max(terms, key=terms.get)
        seconds[term] += terms[term]
    return Bound(
        term=seconds.most_common(1)[0][0],
        bound_s=seconds.total(),
        streamed_bytes=work.streamed_bytes * len(shapes),
        read_bytes=sum(map(work.read_bytes, shapes)),
        flops=sum(map(work.flops, shapes)),
    )


def against_bound(
    work: PassWork,
    shapes: Sequence[PassShape],
    measured_s: float,
    measured_rates: Rates,
    planned_rates: Rates,
    beside_s: float = 0.0,
) -> dict[str, Any]:
    """A record's fields for passes of these shapes that took `measured_s` together: the bound by the rates measured
    beside them, the prediction by those that the plan had. `beside_s` of the measured seconds are no pass's."""
    bound = bound_of(work, shapes, measured_rates)
    predicted_s = sum(predict_pass(work, shape, planned_rates).total_s for shape in shapes) + beside_s
    return {
        "bound": bound.term,
        "bound_s": bound.bound_s,
        "fraction_of_bound": bound.bound_s / measured_s,
        "predicted_s": predicted_s,
        "predicted_over_measured": predicted_s / measured_s,
        "achieved_link_gb_s": gb_s(bound.streamed_bytes, measured_s),
        "achieved_memory_gb_s": gb_s(bound.read_bytes, measured_s),
        "achieved_tflops": bound.flops / measured_s / 1e12,
    }


def kind_of(shape: PassShape) -> str:
    """The kind of a pass: `decode`, a token for each row; `prefill`, prompts from their first token on; `mixed`,
    prompts beside rows, or parts of prompts, that have a context."""
    if shape.is_decode:
        return "decode"
    return "mixed" if shape.context_tokens else "prefill"


def by_kind(
    work: PassWork, passes: Sequence[Timed], measured_rates: Rates, planned_rates: Rates
) -> list[dict[str, Any]]:
    """A row for each kind of pass there was: the passes' number, tokens and seconds, and the fields of
    `against_bound`."""
    rows = []
    for kind in KINDS:
        own = [one for one in passes if kind_of(one.shape) == kind]
        if own:
            shapes, measured_s = [one.shape for one in own], sum(one.measured_s for one in own)
            counts = {"num_passes": len(own), "num_tokens": sum(shape.num_tokens for shape in shapes)}
            bound = against_bound(work, shapes, measured_s, measured_rates, planned_rates)
            rows.append({"kind": kind} | counts | {"measured_s": measured_s} | bound)
    return rows


def host_fields(passes: Sequence[Timed]) -> dict[str, float]:
    """A record's fields on rank 0's host: its CPU seconds a pass, all threads, waiting excluded, as the median and the
    99th percentile, and the shares that these are of the median pass."""
    pass_s = statistics.median(one.measured_s for one in passes)
    host_s, most_s = (float(numpy.percentile([one.host_s for one in passes], p)) for p in (50, 99))
    return {"host_s": host_s, "host_p99_s": most_s, "host_share": host_s / pass_s, "host_p99_share": most_s / pass_s}
