"""The request body of `/v1/audio/qa` as the API page shows it; the route reads it by hand, to keep its own limits."""

from __future__ import annotations

from typing import Any

from server.api_types import QaBody, QaOptions


def form_schema() -> dict[str, Any]:
    """Describes the multipart form: the options and the clip as a file."""
    schema = QaOptions.model_json_schema()
    clip = {"type": "string", "format": "binary", "description": "The clip, in any of the formats of /v1/info."}
    schema["properties"] = {"file": clip, **schema["properties"]}
    schema["required"] = ["file", *schema["required"]]
    return schema


def json_schema() -> dict[str, Any]:
    """Describes the JSON body, with the shape of the clip written in place."""
    schema = QaBody.model_json_schema()
    schema["properties"]["audio"] = schema.pop("$defs")["AudioData"]
    return schema


QA_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {"schema": form_schema(), "encoding": {"choices": {"style": "form", "explode": True}}},
        "application/json": {"schema": json_schema()},
    },
}
