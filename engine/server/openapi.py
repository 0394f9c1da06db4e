"""Describes the routes for /openapi.json: the fields of bodies, from the tables that the validator reads, and the
statuses of answers.
"""

from collections.abc import Mapping
from typing import Any

from penstock.engine.server.fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE

_TEXT_OR_IDS = [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {"type": ["string", "array", "null"]}},
    "required": ["role"],
}
_DETAILS: Mapping[str, dict[str, Any]] = {
    "prompt": {"anyOf": [*_TEXT_OR_IDS, {"type": "array", "items": {"anyOf": _TEXT_OR_IDS}}]},
    "messages": {"type": "array", "items": _MESSAGE, "minItems": 1},
    "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
    "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer"}},
    "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


def _schema(fields: Mapping[str, tuple[str, ...]], required: tuple[str, ...] = ()) -> dict[str, Any]:
    properties = {name: _DETAILS.get(name, {"type": [*types, "null"]}) for name, types in fields.items()}
    return {"type": "object", "properties": properties, "required": list(required)}


def _errors(*statuses: int) -> dict[int, dict[str, Any]]:
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": "an error", "content": content} for status in statuses}


def _posted(schema: dict[str, Any], content: dict[str, Any] | None = None) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    good = {200: {"description": "the answer", "content": content}} if content else {}
    return {"openapi_extra": {"requestBody": body}, "responses": good | _errors(400, 401, 404, 413, 500, 503)}


COMPLETIONS = _posted(_schema(COMPLETION, ("prompt",)), {"application/json": {}} | _EVENTS)
CHAT_COMPLETIONS = _posted(_schema(CHAT, ("messages",)), {"application/json": {}} | _EVENTS)
TOKENIZE_ROUTE = _posted(_schema(TOKENIZE))
DETOKENIZE_ROUTE = _posted(_schema(DETOKENIZE, ("tokens",)))
TOKENIZER_INFO: dict[str, Any] = {"responses": _errors(401, 503)}
MODELS: dict[str, Any] = {"responses": _errors(401)}
MODEL: dict[str, Any] = {"responses": _errors(401, 404)}
VERSION: dict[str, Any] = {"responses": _errors(401)}
STATUS: dict[str, Any] = {"responses": _errors(401)}
HEALTH: dict[str, Any] = {
    "responses": {200: {"description": "it serves", "content": {}}, 503: {"description": "it does not", "content": {}}}
}
