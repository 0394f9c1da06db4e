"""GET /status: the server as it lives, in JSON. The page at / shows it once a second.

Numbers are read from the engine's thread without a lock, each once: two of them may be a pass apart. Bytes are those of
one rank. Nothing of a request is in it.
"""

import time
from typing import Any

from penstock.engine.llm import LLM
from penstock.engine.planning.engine_plan import EnginePlan
from penstock.engine.runtime.pass_times import PassTimes
from penstock.engine.server.metrics import link_use, pass_kind, stall_s
from penstock.engine.server.service import Service
from penstock.engine.version import VERSION
from penstock.scheduler.batching.scheduler import Scheduler


def describe(service: Service) -> dict[str, Any]:
    """The phase of the server, and all numbers of its engine once there is one."""
    told: dict[str, Any] = {
        "phase": service.phase,
        "version": VERSION,
        "models": service.names,
        "uptime_s": time.monotonic() - service.started_s,
        "progress": service.progress(),
    }
    llm = service.engine.llm
    if llm is None or llm.engine is None:
        return told
    scheduler, times, plan = llm.loop.scheduler, llm.engine.times, llm.engine.plan
    return told | {
        "model": describe_model(llm, scheduler),
        "ranks": {"num": plan.tp_size, "device": llm.engine.device.type},
        "plan": describe_plan(plan, llm.config.page_size),
        "rates": {"link_gb_s": llm.engine.rates.link_gb_s, "source": llm.engine.rates.source},
        "passes": describe_passes(times),
        "rows": {"running": scheduler.num_running, "most": scheduler.max_num_seqs},
        "queue": {
            "waiting": service.engine.num_rowless,
            "gave_way": max(scheduler.num_waiting - service.engine.num_rowless, 0),
            "for": scheduler.counts.why_waiting if scheduler.num_waiting else None,
            "predicted_wait_s": service.admission.predicted_wait_s(),
        },
        "pages": describe_pages(scheduler),
        "prefix_cache": describe_prefix_cache(scheduler),
        "preemptions": {
            "num": scheduler.counts.num_preemptions,
            "recomputed_tokens": scheduler.counts.num_recomputed_tokens,
        },
        "tokens_s": times.tokens_s(),
    }


def describe_model(llm: LLM, scheduler: Scheduler) -> dict[str, Any]:
    """The model, without its path."""
    plan = llm.engine.plan
    return {
        "layers": plan.spec.num_layers,
        "dtype": plan.dtype,
        "weight_bytes": plan.layout.nbytes,
        "max_model_len": scheduler.max_model_len,
    }


def describe_plan(plan: EnginePlan, page_size: int) -> dict[str, Any]:
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


def describe_passes(times: PassTimes) -> dict[str, Any]:
    """The passes so far, and the last one beside its prediction."""
    last = times.last
    told = {"num": times.num_passes, "measured_s": times.measured_s, "predicted_s": times.predicted_s, "last": None}
    if last is None:
        return told
    return told | {
        "last": {
            "kind": pass_kind(last),
            "tokens": last.shape.num_tokens,
            "rows": last.shape.num_rows,
            "measured_s": last.measured_s,
            "predicted_s": last.predicted.total_s,
            "bound": last.predicted.bound,
            "link_use": link_use(last),
            "stall_s": stall_s(last),
        }
    }


def describe_pages(scheduler: Scheduler) -> dict[str, Any]:
    """The KV pages: of those that nobody holds some keep what they had, to be found again."""
    total, free = scheduler.pool.num_usable, scheduler.pool.num_free
    available = scheduler.num_free_pages
    return {"total": total, "held": total - available, "cached": max(available - free, 0), "free": free}


def describe_prefix_cache(scheduler: Scheduler) -> dict[str, Any]:
    """The tokens of prompts, and those of them that were found."""
    counts = scheduler.counts
    return {
        "asked_tokens": counts.num_asked_tokens,
        "hit_tokens": counts.num_hit_tokens,
        "is_on": scheduler.cache.is_on,
    }
