"""GET /status: the server as it lives, in JSON. The page at / shows it once a second.

Numbers are those that the engine told last, and bytes those of one rank. Nothing of a request is in it.
"""

import time
from typing import Any

from penstock.engine.runtime.pass_times import PassTimes
from penstock.engine.server.engine_state import EngineFacts, EngineState
from penstock.engine.server.metrics import link_use, pass_kind, stall_s
from penstock.engine.server.service import Service
from penstock.engine.version import VERSION


def describe(service: Service) -> dict[str, Any]:
    """The phase of the server, and all numbers of its engine while there is one."""
    told: dict[str, Any] = {
        "phase": service.phase,
        "version": VERSION,
        "models": service.names,
        "uptime_s": time.monotonic() - service.started_s,
        "progress": service.progress(),
    }
    engine = service.engine
    if not engine.is_ready:
        return told
    facts, state = engine.facts, engine.state
    return told | {
        **facts.shown,
        "passes": describe_passes(engine.times),
        "rows": {"running": state.num_running, "most": facts.max_num_seqs},
        "queue": {
            "waiting": engine.num_rowless,
            "gave_way": max(state.num_waiting - engine.num_rowless, 0),
            "for": state.why_waiting,
            "predicted_wait_s": service.admission.predicted_wait_s(),
        },
        "pages": describe_pages(facts, state),
        "prefix_cache": {
            "asked_tokens": state.num_asked_tokens,
            "hit_tokens": state.num_hit_tokens,
            "is_on": facts.caches_prefixes,
        },
        "preemptions": {"num": state.num_preemptions, "recomputed_tokens": state.num_recomputed_tokens},
        "tokens_s": engine.times.tokens_s(),
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


def describe_pages(facts: EngineFacts, state: EngineState) -> dict[str, Any]:
    """The KV pages: of those that nobody holds some keep what they had, to be found again."""
    total, available, free = facts.num_pages, state.num_available_pages, state.num_free_pages
    return {"total": total, "held": total - available, "cached": max(available - free, 0), "free": free}
