"""GET /status: the server as it lives, in JSON."""

from typing import Any

from penstock.engine.server.service import Service


def describe(service: Service) -> dict[str, Any]:
    """The phase of the server, and numbers of its engine once there is one."""
    engine = service.engine
    told: dict[str, Any] = {"phase": service.phase, "progress": service.progress(), "models": service.names}
    if engine.llm is None:
        return told
    scheduler = engine.llm.loop.scheduler
    return told | {
        "num_running": scheduler.num_running,
        "num_waiting": engine.num_rowless,
        "predicted_wait_s": service.admission.predicted_wait_s(),
    }
