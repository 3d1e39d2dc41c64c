"""OpenAPI document: the request bodies, read by the routes themselves, and every possible reply.

It describes the running service: its limits are in the schemas, and authentication if it is required.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.routing import BaseRoute

from hyper_model.trace import MAX_CHOICE_CHARS, MAX_CHOICES, MAX_QUESTION_CHARS
from server.api.forms import NESTED_FIELDS
from server.api.types import ErrorReply, LateReply
from server.errors import ERRORS
from server.middleware import CLIENT_REQUEST_ID, PRIORITY_HEADER, PUBLIC_PATHS
from server.settings import Settings

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

Responses = dict[int | str, dict[str, Any]]


def responses_of(codes: Iterable[str]) -> Responses:
    """Return the descriptions of replies with these codes of the error table, by status."""
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


ANYWHERE = responses_of(
    (
        *("invalid_http", "invalid_parameter", "invalid_request", "invalid_api_key", "forbidden"),
        *("head_timeout", "body_too_large", "headers_too_large", "internal_error"),
    )
)
"""Possible replies of the layers before every route."""


def event_stream_responses(events: Sequence[str], description: str) -> Responses:
    """Describe the replies of an endpoint that answers about a clip, whole or as a stream of named events."""
    # A disconnected client reads no reply, and a matched route is never missing.
    return {200: event_stream(events, description)} | responses_of(
        code for code in ERRORS if code not in ("client_closed_request", "not_found", "method_not_allowed")
    )


def event_stream(events: Sequence[str], description: str) -> dict[str, Any]:
    """Describe a reply that may be a stream of named events."""
    properties: dict[str, Any] = {"data": {"type": "string", "contentMediaType": "application/json"}}
    if events:
        properties = {"event": {"type": "string", "enum": list(events)}, **properties}
    event = {
        "type": "object",
        "description": "One server-sent event; `data` is a JSON object. Comments keep the connection alive.",
        "required": list(properties),
        "properties": properties,
    }
    return {
        "description": description,
        "headers": REQUEST_ID,
        "content": {"text/event-stream": {"schema": event}},
    }


Limits = Mapping[str, Mapping[str, Any]]
"""Constraints of the fields' schemas beyond their types, by field; see `limits_of`."""

RequestBody = Callable[[Limits], dict[str, Any]]
"""Function for the description of a request body, with this service's limits."""

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

BODY_ATTRIBUTE = "openapi_body"


def takes_body(describe: RequestBody) -> Callable[[Endpoint], Endpoint]:
    """Mark an endpoint with a description of the body it reads itself; use it below the route's decorator."""

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, BODY_ATTRIBUTE, describe)
        return endpoint

    return mark


def document(app: FastAPI, settings: Settings, *, max_pauses: int, asks_for_keys: bool) -> dict[str, Any]:
    """Return the API's description, built once."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        remove_unused(found)
        add_bodies(found["paths"], app.routes, limits_of(settings, max_pauses))
        if asks_for_keys:
            scheme = {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer hyp_...`"}
            found["components"]["securitySchemes"] = {SECURITY_SCHEME: scheme}
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    if path in PUBLIC_PATHS:
                        # Without authentication no key can be missing or wrong.
                        del operation["responses"]["401"]
                    else:
                        operation["security"] = [{SECURITY_SCHEME: []}]
        app.openapi_schema = found
    return app.openapi_schema


def remove_unused(found: dict[str, Any]) -> None:
    """Remove FastAPI's own reply to invalid parameters; here they get 400."""
    unused = found["components"]["schemas"].pop("HTTPValidationError", None)
    found["components"]["schemas"].pop("ValidationError", None)
    for operations in found["paths"].values():
        for operation in operations.values():
            if unused and "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]


def add_bodies(paths: dict[str, Any], routes: Iterable[BaseRoute], limits: Limits) -> None:
    """Add the bodies and headers of the endpoints marked by `takes_body`."""
    for route in routes:
        describe: RequestBody | None = getattr(getattr(route, "endpoint", None), BODY_ATTRIBUTE, None)
        if describe is not None and isinstance(route, APIRoute):
            for method in route.methods:
                operation = paths[route.path][method.lower()]
                operation["requestBody"] = describe(limits)
                operation["parameters"] = HEADERS


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
TEXT: dict[str, Any] = {"type": "string", "minLength": 1, "pattern": WORDS}


def limits_of(settings: Settings, max_pauses: int) -> Limits:
    """Return the schema constraints beyond the fields' types; each has its own error code."""
    return {
        "question": {"minLength": 1, "maxLength": MAX_QUESTION_CHARS, "pattern": WORDS},
        "questions": {"minItems": 1, "maxItems": settings.max_questions},
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
        "max_tokens": whole_number(settings.max_tokens),
        "timeout_ms": whole_number(settings.max_timeout_ms),
        "expires_after[seconds]": whole_number(settings.files_max_lifetime_s),
    }


def whole_number(maximum: int) -> dict[str, Any]:
    """Return the schema of an optional number."""
    return {"anyOf": [{"type": "integer", "minimum": 1, "maximum": maximum}, {"type": "null"}]}


def form_and_json(form: type[BaseModel], body: type[BaseModel]) -> RequestBody:
    """Return the description of a body: a multipart form with the clip as `file`, or JSON with it as `audio`.

    Args:
        form: The fields of the form beside the file.
        body: The JSON body.
    """

    def describe(limits: Limits) -> dict[str, Any]:
        schemas = (limited(form_schema(form), limits), limited(json_schema(body), limits))
        form_content: dict[str, Any] = {"schema": schemas[0]}
        if lists := [name for name in ("choices", "questions") if name in schemas[0]["properties"]]:
            form_content["encoding"] = {name: {"style": "form", "explode": True} for name in lists}
        content = {"multipart/form-data": form_content, "application/json": {"schema": schemas[1]}}
        return {"required": True, "content": content}

    return describe


def limited(schema: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Add the limits of fields to their schemas, in place."""
    for name, limit in limits.items():
        if name in schema["properties"]:
            schema["properties"][name] |= limit
    return schema


def form_only(form: type[BaseModel]) -> RequestBody:
    """Describe a body that is a multipart form with the clip as `file`."""

    def describe(limits: Limits) -> dict[str, Any]:
        return {"required": True, "content": {"multipart/form-data": {"schema": limited(form_schema(form), limits)}}}

    return describe


def json_only(body: type[BaseModel]) -> RequestBody:
    """Describe a body that is JSON alone."""

    def describe(limits: Limits) -> dict[str, Any]:
        return {"required": True, "content": {"application/json": {"schema": inlined(body.model_json_schema())}}}

    return describe


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema of pydantic with each `$ref` replaced by its definition, which must not be recursive."""
    definitions: dict[str, Any] = schema.get("$defs", {})

    def resolve(value: Any) -> Any:
        match value:
            case {"$ref": str(reference), **more}:
                return {**resolve(definitions[reference.rpartition("/")[2]]), **more}
            case dict():
                entries = cast("dict[str, Any]", value)
                return {key: resolve(each) for key, each in entries.items() if key not in ("$defs", "discriminator")}
            case list():
                return [resolve(each) for each in cast("list[Any]", value)]
            case _:
                return value

    return resolve(schema)


def form_schema(form: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of the multipart form: the fields and the clip as a file."""
    schema = inlined(form.model_json_schema())
    for name, (outer, inner) in NESTED_FIELDS.items():
        if outer in schema["properties"]:
            value = schema["properties"].pop(outer)
            members = next(each for each in value.get("anyOf", [value]) if "properties" in each)["properties"]
            schema["properties"][name] = members[inner]
    clip: dict[str, Any] = {"type": "string", "format": "binary", "description": "Audio file in a format of /v1/info."}
    schema["properties"] = {"file": clip, **schema["properties"]}
    if "questions" in schema["properties"]:
        schema.pop("$defs", None)
        # A JSON object inside a field is text, too.
        schema["properties"]["questions"]["items"] = TEXT
        schema["properties"]["file_id"] |= {"anyOf": [{"type": "string", "minLength": 1}]}
        clips, texts = ("file", "file_id"), ("question", "questions")
        schema["anyOf"] = [{"required": [clip, text]} for clip in clips for text in texts]
    else:
        schema["required"] = ["file", *schema.get("required", ())]
    return schema


def json_schema(body: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of the JSON body, with the clip's schema inlined."""
    schema = inlined(body.model_json_schema())
    audio = schema["properties"]["audio"]
    audio["properties"]["data"]["format"] = "byte"
    audio |= {"minProperties": 1, "maxProperties": 1}
    if "questions" in schema["properties"]:
        questions = schema["properties"]["questions"]
        questions["items"] = {"anyOf": [TEXT, questions["items"]]}
        schema["anyOf"] = [{"required": [name]} for name in ("question", "questions")]
    return schema
