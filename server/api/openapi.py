"""The API as its page shows it: request bodies, which the route reads by hand, and every reply that there may be.

What it says is true of the running service: its limits stand in the schemas, and keys where it asks for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from hyper_model.trace import MAX_CHOICE_CHARS, MAX_CHOICES, MAX_QUESTION_CHARS
from server.api.types import ErrorReply, LateReply, QaBody, QaOptions
from server.errors import ERRORS
from server.middleware import CLIENT_REQUEST_ID, PRIORITY_HEADER, PUBLIC_PATHS
from server.settings import Settings

QA_PATH = "/v1/audio/qa"
SECURITY_SCHEME = "API key"

REQUEST_ID = {
    "x-request-id": {
        "description": "Id of the request in the service's log; the client's own id if it sent one.",
        "required": True,
        "schema": {"type": "string"},
    }
}
RETRY_AFTER = {
    "retry-after": {
        "description": "Seconds until the client should retry.",
        "required": True,
        "schema": {"type": "integer", "minimum": 1},
    }
}

EVENTS = "section.start section.delta section.end pause answer.delta answer.done usage done error".split()

Responses = dict[int | str, dict[str, Any]]


def responses_of(codes: Iterable[str]) -> Responses:
    """Describes the replies that end with these codes of the error table, by status."""
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(ERRORS[code].status, []).append(code)
    found: Responses = {}
    for status, named in sorted(by_status.items()):
        model: type[BaseModel] = LateReply if status == ERRORS["deadline_exceeded"].status else ErrorReply
        is_retried = all(ERRORS[code].retry_after_s is not None for code in named)
        found[status] = {
            "model": model,
            "description": ", ".join(f"`{code}`" for code in named),
            "headers": REQUEST_ID | (RETRY_AFTER if is_retried else {}),
        }
    return found


# What the layers before every route may answer, whatever it is.
EVERYWHERE = responses_of(
    (
        *("invalid_http", "invalid_parameter", "invalid_request", "invalid_api_key", "forbidden"),
        *("head_timeout", "body_too_large", "headers_too_large", "internal_error"),
    )
)
EVENT = {
    "type": "object",
    "description": "One server-sent event; `data` is a JSON object. Comments keep the connection alive.",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "enum": EVENTS},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
# A client that closed the connection reads no reply, and a route that was found is not missing.
QA_RESPONSES: Responses = {
    200: {
        "description": "The answer; with `stream=true`, its events. The event `done` contains the whole answer.",
        "headers": REQUEST_ID,
        "content": {"text/event-stream": {"schema": EVENT}},
    }
} | responses_of(code for code in ERRORS if code not in ("client_closed_request", "not_found", "method_not_allowed"))
METRICS_RESPONSES: Responses = {
    200: {
        "description": "Prometheus text format.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}


def document(app: FastAPI, settings: Settings, *, max_pauses: int, asks_for_keys: bool) -> dict[str, Any]:
    """Returns the API's description, made once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        question = found["paths"][QA_PATH]["post"]
        question["requestBody"] = request_body(limits_of(settings, max_pauses))
        question["parameters"] = HEADERS
        if asks_for_keys:
            scheme = {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer hyp_...`"}
            found["components"]["securitySchemes"] = {SECURITY_SCHEME: scheme}
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    if path in PUBLIC_PATHS:
                        # As no key is asked for, none is missing and none is wrong.
                        del operation["responses"]["401"]
                    else:
                        operation["security"] = [{SECURITY_SCHEME: []}]
        app.openapi_schema = found
    return app.openapi_schema


HEADERS = [
    {
        "name": PRIORITY_HEADER,
        "in": "header",
        "description": "`batch` lets the request wait behind interactive ones.",
        "schema": {"type": "string", "enum": ["interactive", "batch", ""]},
    },
    {
        "name": "x-request-id",
        "in": "header",
        "description": f"Id of the request, accepted if it matches {CLIENT_REQUEST_ID.pattern}.",
        "schema": {"type": "string"},
    },
]

WORDS = r"\S"


def limits_of(settings: Settings, max_pauses: int) -> Mapping[str, dict[str, Any]]:
    """Returns what the schemas of fields say beside their types: what the service refuses, with a code of its own."""
    return {
        "question": {"minLength": 1, "maxLength": MAX_QUESTION_CHARS, "pattern": WORDS},
        "choices": {
            "items": {"type": "string", "minLength": 1, "maxLength": MAX_CHOICE_CHARS, "pattern": WORDS},
            "maxItems": MAX_CHOICES,
            "uniqueItems": True,
        },
        "pause": {
            "anyOf": [
                {"type": "string", "enum": ["auto", "off"]},
                {"type": "integer", "minimum": 0, "maximum": max_pauses},
            ]
        },
        "long_audio": {"enum": ["error"]},
        "max_tokens": whole_number(settings.max_tokens),
        "timeout_ms": whole_number(settings.max_timeout_ms),
    }


def whole_number(maximum: int) -> dict[str, Any]:
    """Describes a number that may be left to the service."""
    return {"anyOf": [{"type": "integer", "minimum": 1, "maximum": maximum}, {"type": "null"}]}


def request_body(limits: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Describes both forms of a question."""
    form, body = form_schema(), json_schema()
    for schema in (form, body):
        for name, said in limits.items():
            schema["properties"][name] |= said
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": form, "encoding": {"choices": {"style": "form", "explode": True}}},
            "application/json": {"schema": body},
        },
    }


def form_schema() -> dict[str, Any]:
    """Describes the multipart form: the options and the clip as a file."""
    schema = QaOptions.model_json_schema()
    clip = {"type": "string", "format": "binary", "description": "Audio file in a format of /v1/info."}
    schema["properties"] = {"file": clip, **schema["properties"]}
    schema["required"] = ["file", *schema["required"]]
    return schema


def json_schema() -> dict[str, Any]:
    """Describes the JSON body, with the shape of the clip written in place."""
    schema = QaBody.model_json_schema()
    schema["properties"]["audio"] = schema.pop("$defs")["AudioData"]
    schema["properties"]["audio"]["properties"]["data"]["format"] = "byte"
    return schema
