"""The routes: OpenAI's, and those that tell how the server is."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from penstock.engine.server import openapi, pages
from penstock.engine.server.access import OPEN, HostGuard, KeyGuard, is_loopback, read_body
from penstock.engine.server.encoding import need_tokenizer, text_of, token_ids_of, tokenizer_facts
from penstock.engine.server.errors import ApiError, failed, model_not_found
from penstock.engine.server.notes import record_of_refused, rejection
from penstock.engine.server.service import Service
from penstock.engine.server.status import describe
from penstock.engine.server.validation import read_chat, read_completion, read_detokenize, read_tokenize
from penstock.engine.version import VERSION
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware

LOGGER = logging.getLogger("penstock.server")
Handler = Callable[..., Awaitable[Response]]


def make_app(service: Service) -> Any:
    """The ASGI application of a service."""
    app = FastAPI(title="Penstock", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    tell, tell_fault = _add_error_handlers(app, service)
    generation = _add_generation(app, service)
    _add_texts(app, service)
    _add_models(app, service)
    _add_health(app, service)
    pages.add_routes(app, service)
    app = Direct(app, generation, tell, tell_fault, service.note)

    def note(scope: dict[str, Any], error: ApiError) -> None:
        service.metrics.request_rejected(rejection(error))
        if app.answers(scope):
            app.note(scope, error)

    if service.options.api_key is None:
        return HostGuard(app, note) if is_loopback(service.options.host) else app
    open_routes = (*OPEN, "/metrics") if service.options.metrics_without_key else OPEN
    return KeyGuard(app, note, service.options.api_key, open_routes)


def respond_with(error: ApiError) -> JSONResponse:
    """The response that tells an error."""
    return JSONResponse(error.body, error.status, error.headers)


class Direct:
    """An ASGI application in front of another, some of whose routes it answers to POST itself: a request for a text,
    and each chunk of its answer, need not go through all layers of FastAPI. Errors are told as there, and logged."""

    def __init__(
        self,
        app: Any,
        routes: dict[str, Handler],
        tell: Handler,
        tell_fault: Handler,
        log: Callable[[dict[str, Any]], None],
    ):
        self._app, self._routes, self._tell, self._log = app, routes, tell, log
        self._direct = ServerErrorMiddleware(self._answer, handler=tell_fault)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        await (self._direct if self.answers(scope) else self._app)(scope, receive, send)

    def answers(self, scope: dict[str, Any]) -> bool:
        """Tells whether it answers a request itself."""
        return scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._routes

    def note(self, scope: dict[str, Any], error: ApiError) -> None:
        """Logs one of these requests that was refused."""
        self._log(record_of_refused(scope["path"].removeprefix("/v1/"), error))

    async def _answer(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        try:
            response = await self._routes[scope["path"]](request)
        except ApiError as error:
            self.note(scope, error)
            response = await self._tell(request, error)
        await response(scope, receive, send)


def _add_error_handlers(app: FastAPI, service: Service) -> tuple[Handler, Handler]:
    """Adds the handlers of errors; returns those of the API's errors and of all that is not foreseen."""

    @app.exception_handler(ApiError)
    async def tell(_: Request, error: ApiError) -> Response:
        service.metrics.request_rejected(rejection(error))
        if error.place is not None:
            LOGGER.warning("%s: %s", error.message, error.place)
        return respond_with(error)

    @app.exception_handler(HTTPException)
    async def tell_route(_: Request, error: HTTPException) -> Response:
        known = {404: "there is no such route", 405: "the route does not take this method"}
        headers = tuple((error.headers or {}).items())
        return respond_with(ApiError(error.status_code, known.get(error.status_code, "failed"), more_headers=headers))

    @app.exception_handler(Exception)
    async def tell_fault(_: Request, error: Exception) -> Response:
        return respond_with(failed("internal error; the server's log has more"))

    return tell, tell_fault


def _add_generation(app: FastAPI, service: Service) -> dict[str, Handler]:
    """Adds the routes that generate texts; returns them by path."""

    @app.post("/v1/completions", **openapi.COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await service.respond(read_completion(await read_body(request), service.defaults))

    @app.post("/v1/chat/completions", **openapi.CHAT_COMPLETIONS)
    async def chat_completions(request: Request) -> Response:
        return await service.respond(read_chat(await read_body(request), service.defaults))

    return {"/v1/completions": completions, "/v1/chat/completions": chat_completions}


def _add_texts(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", **openapi.TOKENIZE_ROUTE)
    async def tokenize(request: Request) -> Response:
        asked = read_tokenize(await read_body(request))
        service.check_open()
        service.check_model(asked.model)
        model = service.model
        tokens = await service.in_worker(token_ids_of, model, asked)
        texts = [need_tokenizer(model).backend.id_to_token(token) for token in tokens] if asked.with_texts else None
        most = model.limits.max_model_len
        return JSONResponse({"count": len(tokens), "max_model_len": most, "tokens": tokens, "token_strs": texts})

    @app.post("/detokenize", **openapi.DETOKENIZE_ROUTE)
    async def detokenize(request: Request) -> Response:
        name, tokens = read_detokenize(await read_body(request))
        service.check_open()
        service.check_model(name)
        return JSONResponse({"prompt": await service.in_worker(text_of, service.model, tokens)})

    @app.get("/tokenizer_info", **openapi.TOKENIZER_INFO)
    async def tokenizer_info() -> Response:
        service.check_open()
        return JSONResponse(await service.in_worker(tokenizer_facts, service.model))


def _add_models(app: FastAPI, service: Service) -> None:
    def card(name: str) -> dict[str, Any]:
        facts = service.engine.facts
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "penstock",
            "root": service.names[0],
            "parent": None,
            "max_model_len": None if facts is None else facts.max_model_len,
        }

    @app.get("/v1/models", **openapi.MODELS)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [card(name) for name in service.names]})

    @app.get("/v1/models/{model_id:path}", **openapi.MODEL)
    async def model(model_id: str) -> Response:
        if model_id not in service.names:
            raise model_not_found(model_id, service.names)
        return JSONResponse(card(model_id))


def _add_health(app: FastAPI, service: Service) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", **openapi.HEALTH)
    async def health() -> Response:
        return Response(status_code=200 if service.phase == "ready" else 503)

    @app.get("/version", **openapi.VERSION)
    async def version() -> Response:
        return JSONResponse({"version": VERSION})

    @app.get("/status", **openapi.STATUS)
    async def status() -> Response:
        return JSONResponse(describe(service))
