"""Request bodies with a clip and fields, as a multipart form or as JSON, within limits.

Bodies are not parsed by the framework, so that all limits are ours. An endpoint passes the models of its form and its
JSON body, and receives the checked fields and the clip's bytes.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import logging
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, cast

from fastapi import Request
from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from hyper_model.trace import MAX_CHOICES
from server.admission import COME_AGAIN
from server.errors import RequestError
from server.service import Service

logger = logging.getLogger("hyper.server")

# More than one question can need, so that an error can name the excess; the body limit bounds the total.
MAX_FIELDS = 128
MAX_FILES = 2
MAX_FIELD_BYTES = 64 * 1024
MAX_KEYS = 64
MAX_LISTED_CHOICES = 128

REPEATED_FIELDS = frozenset({"choices"})
"""Form fields permitted more than once."""

# The names of UTF-8 in a form's content type. Callers may not choose another codec: one takes quadratic time.
CHARSETS = (b"utf-8", b"utf8")

ASCII_WHITE_SPACE = b" \t\r\n\v\f"

Options = TypeVar("Options", bound=BaseModel)


class HasClip(Protocol):
    """A JSON body with a clip."""

    @property
    def audio(self) -> Any:
        """Return the clip; its `data` is base64."""
        ...


async def read_clip_request(
    request: Request, service: Service, *, form: type[Options], body: type[Options]
) -> tuple[Options, bytes]:
    """Read the fields and the clip's bytes from a multipart form or from JSON.

    Args:
        form: The fields of the form beside `file`.
        body: The JSON body: the same fields and `audio`.

    Raises:
        RequestError: 400, 413 or 415.
        ValidationError: A field has the wrong type or range.
    """
    match request.headers.get("content-type", "").partition(";")[0].strip().lower():
        case "multipart/form-data":
            return await read_form(request, form)
        case "application/json":
            return await service.in_pool(read_json, await request.body(), body)
        case _:
            message = "Send multipart/form-data with the clip as `file`, or application/json with it as base64."
            raise RequestError("unsupported_media_type", message)


async def read_form(request: Request, kind: type[Options]) -> tuple[Options, bytes]:
    """Read a multipart body: one `file`, any number of `choices`, and every other field at most once."""
    async with contextlib.aclosing(request.stream()) as stream:
        parser = multipart_parser(request, stream)
        # The parser does not report a body truncated inside a clip, and leaves its file open.
        spooled = cast("list[Any]", parser._files_to_close_on_error)  # pyright: ignore[reportPrivateUsage]
        form = await parse_form(parser, spooled)
    try:
        if len(spooled) > sum(isinstance(value, UploadFile) for _, value in form.multi_items()):
            raise RequestError(
                "invalid_multipart", "The multipart body ends inside a file.", hint="Send the whole body."
            )
        fields, files = sort_parts(form)
        options = validate(kind, fields, strict=False)
        if not files:
            raise RequestError(
                "missing_parameter",
                "`file` is required.",
                hint="Send the clip as a file: curl -F file=@clip.wav.",
                param="file",
            )
        return options, await files[0].read()
    finally:
        for file in spooled:
            file.close()


def multipart_parser(request: Request, stream: Any) -> MultiPartParser:
    """Return Starlette's parser with our limits.

    Raises:
        RequestError: If the form is not in UTF-8.
    """
    # Starlette's own function, so that both get the same parameters.
    _, parameters = parse_options_header(request.headers.get("content-type"))
    if parameters.get(b"charset", b"utf-8").lower() not in CHARSETS:
        raise RequestError("invalid_multipart", "The multipart body must be in UTF-8.", hint="Leave `charset` out.")
    return MultiPartParser(
        request.headers, stream, max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    )


async def parse_form(parser: MultiPartParser, spooled: list[Any]) -> FormData:
    """Parse a form; a clip of more than 1 MiB goes to a temporary file."""
    try:
        return await parser.parse()
    except (MultiPartException, UnicodeError):
        hint = f"Send at most {MAX_FIELDS} fields of {MAX_FIELD_BYTES} bytes each, and a boundary in the content type."
        raise RequestError("invalid_multipart", "The multipart body cannot be parsed.", hint=hint) from None
    except OSError as error:
        # The system's message contains internal paths.
        logger.error("a clip cannot be stored", exc_info=error)
        for file in spooled:
            with contextlib.suppress(OSError):
                file.close()
        raise RequestError("storage_full", "The service has no disk space for the clip.", hint=COME_AGAIN) from None


def sort_parts(form: FormData) -> tuple[dict[str, Any], list[UploadFile]]:
    """Return a form's fields and its file, each at most once."""
    fields: dict[str, Any] = {}
    files: list[UploadFile] = []
    for name, value in form.multi_items():
        if name == "file" and isinstance(value, UploadFile):
            files.append(value)
        elif isinstance(value, UploadFile):
            raise RequestError(
                "unknown_parameter",
                "A part other than `file` has a file name; only `file` may be a file.",
                param="file",
            )
        elif name in REPEATED_FIELDS:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            repeated = ", ".join(f"`{each}`" for each in sorted(REPEATED_FIELDS))
            raise RequestError("invalid_parameter", f"A field appears twice; only {repeated} may repeat.")
        else:
            fields[name] = value
    if len(files) > 1:
        raise RequestError(
            "invalid_parameter", "A question needs exactly one clip.", param="file", limit=1, actual=len(files)
        )
    if "file" in fields:
        raise RequestError("invalid_parameter", "`file` must be sent as a file: curl -F file=@clip.wav.", param="file")
    return fields, files


def read_json(body: bytes, kind: type[Options]) -> tuple[Options, bytes]:
    """Read a JSON body: the fields, including the clip as base64."""
    options = validate(kind, parse_json(body), strict=True)
    return options, decode_base64(cast("HasClip", options).audio.data)


def parse_json(body: bytes) -> Any:
    """Parse a JSON body by the standard: no NaN, no infinity, no deep nesting."""

    def refuse(_: str) -> None:
        raise ValueError

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise RequestError("invalid_json", "The body is not valid JSON.") from None


def decode_base64(text: str) -> bytes:
    """Decode a clip inside a JSON body; line breaks are removed, because many encoders write them."""
    try:
        return base64.b64decode(text.encode("ascii").translate(None, ASCII_WHITE_SPACE), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("invalid_parameter", "`audio.data` is not valid base64.", param="audio.data") from None


def validate(kind: type[Options], fields: Any, *, strict: bool) -> Options:
    """Check the fields' types and ranges; a form's values are strings, JSON's must have the right type."""
    if not isinstance(fields, Mapping):
        raise RequestError("invalid_request", "The body must be a JSON object.")
    check_sizes(cast("Mapping[str, Any]", fields))
    return kind.model_validate(fields, strict=strict)


def check_sizes(fields: Mapping[str, Any]) -> None:
    """Refuse too many fields and choices early: pydantic would build an error for each."""
    for param, value in ((None, fields), ("audio", fields.get("audio"))):
        if isinstance(value, Mapping) and len(cast("Mapping[str, Any]", value)) > MAX_KEYS:
            num_keys = len(cast("Mapping[str, Any]", value))
            message = "The request has too many fields."
            raise RequestError("unknown_parameter", message, param=param, limit=MAX_KEYS, actual=num_keys)
    choices = fields.get("choices")
    if isinstance(choices, list) and len(cast("list[Any]", choices)) > MAX_LISTED_CHOICES:
        num_choices = len(cast("list[Any]", choices))
        message = f"`choices` has too many items; the limit is {MAX_CHOICES}."
        raise RequestError("invalid_prompt", message, param="choices", limit=MAX_CHOICES, actual=num_choices)
