"""Predicts the passes of a plan: what a rank does in one, how long it takes, and how many sequences decode at once.

Torch-free.
"""

from collections.abc import Callable

from penstock.engine.planning.engine_plan import EnginePlan
from penstock.scheduler.cost.pass_work import PassShape, PassWork
from penstock.scheduler.cost.time_model import PassTime, Rates, launch_s, predict_pass
from penstock.scheduler.passes.pass_plan import Compute, Decompress
from penstock.scheduler.residency.decide import Residency
from penstock.scheduler.residency.demand import Demand


def pass_work(plan: EnginePlan, residency: Residency | None = None) -> PassWork:
    """Says what a rank does in a pass, by the plan's residency, or by a given one of the same demand. Those are
    compared with each other, without what they wait for: that takes a pass plan of each."""
    waited_bytes = plan.waited_bytes if residency is None else 0
    residency = residency or plan.residency
    embed_bytes = (
        plan.layout.embed.stored_bytes if residency.embed_resident else 0
    )  # no group: few of its rows are read
    decompressed_bytes = plan.demand.decompressed_bytes(residency.compressed)
    resident_bytes = residency.resident_bytes - embed_bytes
    num_decompressed = len(residency.compressed)
    sizes = (num_decompressed, decompressed_bytes, waited_bytes)
    return PassWork(residency.streamed_bytes, resident_bytes, plan.steps, *sizes)


def step_seconds(plan: EnginePlan, shape: PassShape) -> tuple[Callable[[Compute | Decompress], float], Rates, float]:
    """Says what predict_timeline takes for a pass of this shape: the seconds of a step, the rates, those of a
    launch."""
    return plan.step_seconds(shape), plan.rates, launch_s(shape, plan.rates, streams=bool(plan.residency.streamed))


def decode_time(work: PassWork, num_seqs: int, context_tokens: int, rates: Rates) -> PassTime:
    """One decode pass of `num_seqs` rows, each attending to `context_tokens`."""
    return predict_pass(work, PassShape(num_seqs, num_seqs, num_seqs * context_tokens), rates)


def most_seqs(demand: Demand, residency: Residency, context_tokens: int) -> int:
    """Sequences of that many tokens that decode at once, as the KV cache and max_num_seqs allow; tokens/s rise with
    each, since a pass over one more takes longer by less than its share."""
    return min(demand.max_num_seqs, (residency.num_pages - 1) // demand.pages(context_tokens))
