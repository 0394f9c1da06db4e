"""Reads off a loaded engine what its process tells the front (engine_state.py). Bytes are those of one rank, and
nothing of a request or of this machine's paths is in it."""

from typing import Any

from penstock.engine.llm import LLM
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.server.engine_state import EngineFacts, EngineState
from penstock.scheduler.batching.scheduler import Scheduler
from penstock.scheduler.cost.pass_work import PassShape
from penstock.scheduler.cost.time_model import predict_pass


def facts_of(llm: LLM) -> EngineFacts:
    """The facts of an engine."""
    scheduler, engine, plan = llm.loop.scheduler, llm.engine, llm.engine.plan
    return EngineFacts(
        max_model_len=scheduler.max_model_len,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        num_pages=scheduler.pool.num_usable,
        vocab_size=plan.spec.vocab_size,
        caches_prefixes=scheduler.cache.is_on,
        resident_bytes=engine.work.resident_bytes,
        streamed_bytes=engine.work.streamed_bytes,
        shown={
            "model": _model(plan, scheduler),
            "ranks": {"num": plan.tp_size, "device": engine.device.type},
            "plan": _plan(plan, llm.config.page_size),
            "rates": {"link_gb_s": engine.rates.link_gb_s, "source": engine.rates.source},
        },
    )


def state_of(llm: LLM, pass_s: float) -> EngineState:
    """The state of an engine; `pass_s` is row_pass_s."""
    scheduler, counts = llm.loop.scheduler, llm.loop.scheduler.counts
    return EngineState(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        why_waiting=counts.why_waiting if scheduler.num_waiting else None,
        num_available_pages=scheduler.num_free_pages,
        num_free_pages=scheduler.pool.num_free,
        num_preemptions=counts.num_preemptions,
        num_recomputed_tokens=counts.num_recomputed_tokens,
        num_asked_tokens=counts.num_asked_tokens,
        num_hit_tokens=counts.num_hit_tokens,
        num_free_tokens=counts.num_free_tokens,
        num_free_tokens_used=counts.num_free_tokens_used,
        pass_s=pass_s,
    )


def row_pass_s(llm: LLM, num_rows: int) -> float:
    """The seconds that a pass of so many rows, a token each, is predicted to take."""
    return predict_pass(llm.engine.work, PassShape(num_rows, num_rows, 0), llm.engine.rates).total_s


def _model(plan: EnginePlan, scheduler: Scheduler) -> dict[str, Any]:
    return {
        "layers": plan.spec.num_layers,
        "dtype": plan.dtype,
        "weight_bytes": plan.layout.nbytes,
        "max_model_len": scheduler.max_model_len,
    }


def _plan(plan: EnginePlan, page_size: int) -> dict[str, Any]:
    """Says what stays on a rank's device and what streams, and the sizes of a pass."""
    residency = plan.residency
    return {
        "resident_bytes": residency.resident_bytes,
        "streamed_bytes": residency.streamed_bytes,
        "streamed_groups": len(residency.streamed),
        "groups": len(plan.layout.groups),
        "compressed_groups": len(residency.compressed),
        "ring_bytes": residency.ring.ring_bytes,
        "kv_pages": residency.num_pages - 1,
        "page_size": page_size,
        "max_num_batched_tokens": plan.max_num_batched_tokens,
    }
