"""The routes that show how the server does: /metrics for Prometheus, and a page at / for people."""

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from penstock.engine.server.metrics import CONTENT_TYPE
from penstock.engine.server.service import Service

PAGE = Path(__file__).with_name("page.html")
# Nothing is loaded from anywhere, and only this server is asked; nobody may frame the page.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_routes(app: FastAPI, service: Service) -> None:
    """Adds them to an application."""
    page = PAGE.read_text(encoding="utf-8")

    @app.api_route("/metrics", methods=["GET", "HEAD"], include_in_schema=False)
    async def tell_metrics() -> Response:
        engine = service.engine
        return Response(service.metrics.text(engine.facts, engine.state, engine.times), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return HTMLResponse(page, headers=HEADERS)
