"""Request bodies with a clip and fields, as a multipart form or as JSON, within limits.

Bodies are not parsed by the framework, so that all limits are ours. An endpoint passes the models of its form and its
JSON body, and receives the checked fields and the clip's bytes.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import contextlib
import json
import logging
import re
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from typing import Any, NewType, Protocol, TypeVar, cast, get_args

from fastapi import Request
from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from hyper_model.trace import MAX_CHOICES
from server.admission import COME_AGAIN
from server.api.types import AudioData
from server.errors import MAX_EXACT, PLAIN_NAME, RequestError, unknown_field
from server.request_context import RequestContext
from server.service import Service
from server.storage.protocol import ClipPurpose

logger = logging.getLogger("hyper.server")

# More than one question can need, so that an error can name the excess; the body limit bounds the total.
MAX_FIELDS = 128
MAX_FILES = 2
MAX_FIELD_BYTES = 64 * 1024
MAX_KEYS = 64
MAX_LISTED_CHOICES = 128

REPEATED_FIELDS = frozenset(
    {"choices", "questions", "include", "known_speaker_names", "known_speaker_references", "timestamp_granularities"}
)
"""Fields that a form may have more than once, without the brackets of `plain_name`."""

NESTED_FIELDS: Mapping[str, tuple[str, str]] = {"webhook[url]": ("webhook", "url")}
"""Members of objects in a form, as form libraries spell them."""

# File name of a part without one; a short text in it is a path or an address in place of the clip.
UNNAMED = "part-without-file-name"
MAX_PATH_BYTES = 1024

# Names of the part with the clip.
FILE_NAMES = (b"file", b"file[]", b"file[0]")

REQUIRED_FIELDS = frozenset({"question"})

# The names of UTF-8 in a form's content type. Callers may not choose another codec: one takes quadratic time.
CHARSETS = (b"utf-8", b"utf8")

ASCII_WHITE_SPACE = b" \t\r\n\v\f"
URL_SAFE = bytes.maketrans(b"-_", b"+/")

# A space inside a line of base64; spaces beside a line break are indentation.
INNER_SPACE = re.compile(r"[A-Za-z0-9+/=_-][ \t]+[A-Za-z0-9+/=_-]")

# Charsets of a text part (RFC 7578, section 4.4) and their codecs; browsers read Latin-1 as Windows-1252.
PART_CODECS: Mapping[str, str] = {
    **dict.fromkeys(("", "utf-8", "utf8", "us-ascii", "ascii"), "utf-8"),
    **dict.fromkeys(("iso-8859-1", "latin1", "latin-1", "windows-1252", "cp1252"), "cp1252"),
    **dict.fromkeys(("utf-16", "utf-16le", "utf-16be"), "utf-16"),
}

# Transfer encodings that leave the bytes of a part unchanged.
PLAIN_ENCODINGS = (b"", b"7bit", b"8bit", b"binary")

# Array spellings of form libraries: choices[], choices[0], choices.0.
ARRAY_NAME = re.compile(r"([a-z_]+)(?:\[\]|\[(\d{1,3})\]|\.(\d{1,3}))")

# The field by which HTML forms state their encoding (RFC 7578, section 4.6).
CHARSET_FIELD = "_charset_"

# Beginning of a data URL (RFC 2397), as pages get it from a FileReader.
DATA_URL = re.compile(r"\s*data:([A-Za-z0-9.+/-]{0,80})((?:;[^,;]{0,80}){0,5}),")

KNOWN_MEDIA_TYPES: Mapping[str, str] = {
    "": "is missing",
    "application/x-www-form-urlencoded": "is that of a form without files, which cannot contain a clip",
    "application/octet-stream": "is that of a bare file, which leaves no place for the question",
    "text/plain": "is that of text",
    "text/json": "is not the registered one of JSON, application/json",
    "multipart/mixed": "is not that of a form, multipart/form-data",
    "multipart/related": "is not that of a form, multipart/form-data",
    **{
        f"audio/{kind}": "is that of a bare clip, which leaves no place for the question"
        for kind in "wav x-wav wave mpeg mp3 mp4 m4a x-m4a ogg opus webm flac x-flac aac aiff basic".split()
    },
}

CLIP_PURPOSES: tuple[str, ...] = get_args(ClipPurpose)

FileId = NewType("FileId", str)
"""Id of a stored file, in the place of a clip's bytes."""

Options = TypeVar("Options", bound=BaseModel)


class HasClip(Protocol):
    """A JSON body with a clip."""

    @property
    def audio(self) -> AudioData:
        """Return the clip."""
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
    refuse_query(request, form)
    options, clip = await read_options(request, service, form=form, body=body)
    if isinstance(clip, bytes):
        return options, clip
    return options, await load_clip(service, RequestContext.of(request.scope), clip)


async def load_clip(service: Service, context: RequestContext, file_id: FileId) -> bytes:
    """Return the bytes of a clip that the caller has stored.

    Raises:
        RequestError: 404, if the caller has no such file; 400, if it is no clip; 413.
    """
    stored = await service.files.get(context.tenant_name, file_id)
    if stored.purpose not in CLIP_PURPOSES:
        message = f"The file has the purpose `{stored.purpose}`; a clip has {' or '.join(CLIP_PURPOSES)}."
        raise RequestError("invalid_parameter", message, param="file_id")
    limit = service.settings.max_audio_bytes
    if stored.num_bytes > limit:
        # The setting was lowered after the upload.
        message = f"The file has {stored.num_bytes} bytes; the limit is {limit}."
        raise RequestError("audio_too_large", message, param="file_id", limit=limit, actual=stored.num_bytes)
    return await service.files.read(context.tenant_name, file_id)


async def read_options(
    request: Request, service: Service, *, form: type[Options], body: type[Options]
) -> tuple[Options, bytes | FileId]:
    """Read the fields, and the clip's bytes or the id of its file; see `read_clip_request`."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return await read_form(request, form)
    if media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json")):
        return await service.in_pool(read_json, await request.body(), body)
    raise RequestError(
        "unsupported_media_type",
        f"The content type {KNOWN_MEDIA_TYPES.get(media_type, 'is not one that this endpoint accepts')}.",
        actual=media_type if media_type in KNOWN_MEDIA_TYPES else None,
        hint="Send multipart/form-data with the clip as `file`, or application/json with the clip as base64.",
    )


def refuse_query(request: Request, form: type[BaseModel]) -> None:
    """Refuse options in the address: a caller who puts them there means them.

    Raises:
        RequestError: The address has a query parameter; the error names the first.
    """
    name = next(iter(request.query_params), None)
    if name is None:
        return
    if plain_name(name) in form.model_fields:
        message = f"`{plain_name(name)}` is a query parameter; this endpoint reads options from the body alone."
        hint = f"Send `{plain_name(name)}` as a form field or in the JSON body."
        raise RequestError("unknown_parameter", message, param=plain_name(name), hint=hint)
    raise unknown_field([name], list(form.model_fields))


async def read_clip_form(request: Request, form: type[Options]) -> tuple[Options, bytes]:
    """Read the fields and the clip's bytes from a multipart form alone.

    Raises:
        RequestError: 400, 413 or 415.
        ValidationError: A field has the wrong type or range.
    """
    require_form(request)
    options, clip = await read_form(request, form)
    assert isinstance(clip, bytes), "a form without the field `file_id` cannot name a stored file"
    return options, clip


def require_form(request: Request) -> None:
    """Refuse a body that is not a multipart form.

    Raises:
        RequestError: 415.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise RequestError("unsupported_media_type", "Send multipart/form-data with the file as `file`.")


async def read_form(request: Request, kind: type[Options]) -> tuple[Options, bytes | FileId]:
    """Read a multipart body: one `file` or `file_id`, lists, and every other field at most once."""
    async with open_form(request, kind) as (options, file):
        file_id: str | None = getattr(options, "file_id", None)
        if file_id is not None:
            if file is not None:
                message = "A question is about one clip: send `file` or `file_id`, not both."
                raise RequestError("invalid_parameter", message, param="file_id")
            return options, FileId(file_id)
        file = require_file(file)
        data = await file.read()
        if file.filename == UNNAMED and len(data) <= MAX_PATH_BYTES:
            message = "`file` must be sent as a file: curl -F file=@clip.wav."
            raise RequestError("invalid_parameter", message, param="file")
        return options, data


@contextlib.asynccontextmanager
async def open_form(request: Request, kind: type[Options]) -> AsyncGenerator[tuple[Options, UploadFile | None]]:
    """Parse a multipart body, and yield its checked fields and its open file."""
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
        check_names(kind, fields, is_form=True)
        if parser.fault is not None:
            raise parser.fault
        options = validate(kind, fields, strict=False)
        yield options, files[0] if files else None
    finally:
        for file in spooled:
            file.close()


def require_file(file: UploadFile | None) -> UploadFile:
    """Return the file of a form.

    Raises:
        RequestError: 400, if it has none.
    """
    if file is None:
        hint = "Send the clip as a file part: curl -F file=@clip.wav."
        raise RequestError("missing_parameter", "`file` is required.", param="file", hint=hint)
    return file


class ClipParser(MultiPartParser):
    """Parser of Starlette that takes the part `file` as a file also without a file name, and reads charsets of parts.

    RFC 7578 only recommends the name, and some libraries leave it out for bytes in memory. As a text field, a clip
    would exceed the limit of fields. Starlette reads text that is not UTF-8 as Latin-1, whatever it is.

    Attributes:
        fault: Error for the first text field that cannot be decoded.
    """

    fault: RequestError | None = None

    def on_headers_finished(self) -> None:
        """Read the head of a part.

        Raises:
            RequestError: The part has a transfer encoding, whose text would be taken for its content.
        """
        part = self._current_part
        encoding = dict(part.item_headers).get(b"content-transfer-encoding", b"").strip().lower()
        if encoding not in PLAIN_ENCODINGS:
            message = "A part of the form has a Content-Transfer-Encoding, which forms do not have (RFC 7578)."
            raise RequestError("invalid_multipart", message, hint="Send the bytes of each part unchanged.")
        _, parameters = parse_options_header(part.content_disposition)
        if parameters.get(b"name") in FILE_NAMES and b"filename" not in parameters and part.content_disposition:
            part.content_disposition += f'; filename="{UNNAMED}"'.encode()
        super().on_headers_finished()

    def on_part_end(self) -> None:
        """Decode a text field in the charset of its part."""
        part = self._current_part
        if part.file is not None:
            super().on_part_end()
            return
        try:
            self.items.append((part.field_name, decode_part(dict(part.item_headers), bytes(part.data))))
        except UnicodeError:
            self.items.append((part.field_name, "\ufffd"))
            name = plain_name(part.field_name)
            shown = name if PLAIN_NAME.fullmatch(name) else None
            message = f"{f'`{shown}`' if shown else 'A field'} is not text in UTF-8, or in the charset of its part."
            hint = "Encode text fields in UTF-8."
            self.fault = self.fault or RequestError("invalid_parameter", message, param=shown, hint=hint)


def decode_part(headers: Mapping[bytes, bytes], data: bytes) -> str:
    """Decode a text field.

    Raises:
        UnicodeError: The text is in another charset than the part states, or in one that is not in `PART_CODECS`.
    """
    _, parameters = parse_options_header(headers.get(b"content-type"))
    charset = parameters.get(b"charset", b"").decode("latin-1").strip().lower()
    if charset not in PART_CODECS:
        raise UnicodeError
    codec = PART_CODECS[charset]
    if codec == "utf-16" and charset != "utf-16" and data[:2] not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        codec = charset
    return data.decode(codec).removeprefix("\ufeff")


def multipart_parser(request: Request, stream: Any) -> ClipParser:
    """Return Starlette's parser with our limits.

    Raises:
        RequestError: If the form is not in UTF-8, or its content type has no boundary.
    """
    # Starlette's own function, so that both get the same parameters.
    _, parameters = parse_options_header(request.headers.get("content-type"))
    if parameters.get(b"charset", b"utf-8").lower() not in CHARSETS:
        raise RequestError("invalid_multipart", "The multipart body must be in UTF-8.", hint="Leave `charset` out.")
    if not parameters.get(b"boundary"):
        hint = "Leave the header to the HTTP library, which knows the boundary of the body."
        raise RequestError("invalid_multipart", "The content type multipart/form-data has no boundary.", hint=hint)
    return ClipParser(
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
    listed: dict[str, list[tuple[int, str]]] = {}
    for sent_name, value in form.multi_items():
        name, index = plain_name(sent_name), index_of(sent_name)
        if isinstance(value, UploadFile):
            if name != "file":
                raise unknown_file(sent_name)
            files.append(value)
        elif value == "" and name not in REQUIRED_FIELDS | REPEATED_FIELDS:
            # Forms send an empty field for an option that was left open.
            continue
        elif sent_name == CHARSET_FIELD and value.strip().lower().encode() in CHARSETS:
            continue
        elif name in NESTED_FIELDS:
            outer, inner = NESTED_FIELDS[name]
            fields.setdefault(outer, {})[inner] = value
        elif name in REPEATED_FIELDS:
            listed.setdefault(name, []).append((len(listed.get(name, ())) if index is None else index, value))
        elif name in fields or index is not None:
            repeated = ", ".join(f"`{each}`" for each in sorted(REPEATED_FIELDS))
            shown = name if PLAIN_NAME.fullmatch(name) else "A field"
            message = f"`{shown}` appears twice or as a list; only {repeated} may repeat."
            raise RequestError("invalid_parameter", message, param=name if PLAIN_NAME.fullmatch(name) else None)
        else:
            fields[name] = value
    for name, values in listed.items():
        texts = [value for _, value in sorted(values, key=lambda pair: pair[0])]
        if texts != [""]:
            # An empty list leaves an empty field behind.
            fields[name] = listed_in(texts[0]) if len(texts) == 1 else texts
    if len(files) > 1:
        raise RequestError(
            "invalid_parameter", "A question needs exactly one clip.", param="file", limit=1, actual=len(files)
        )
    return fields, files


def listed_in(text: str) -> list[str]:
    """Return the items of a list in one field: a JSON array of texts or objects; any other text is one item."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            items: list[Any] = json.loads(text)
            if all(isinstance(item, (str, dict)) for item in items):
                return [item if isinstance(item, str) else json.dumps(item) for item in items]
    return [text]


def plain_name(name: str) -> str:
    """Return a field's name without the brackets or the index that form libraries add to lists."""
    name = name.replace("%5B", "[").replace("%5D", "]")
    match = ARRAY_NAME.fullmatch(name)
    return match[1] if match else name


def index_of(name: str) -> int | None:
    """Return the index that a form library wrote into a field's name; None if there is none, or for `name[]`."""
    match = ARRAY_NAME.fullmatch(name.replace("%5B", "[").replace("%5D", "]"))
    digits = (match[2] or match[3]) if match else None
    return None if digits is None else int(digits)


def unknown_file(name: str) -> RequestError:
    """Return the error for a file part of another name."""
    shown = f"`{name}`" if PLAIN_NAME.fullmatch(name) else "A part of another name"
    message = f"{shown} has a file name; only `file` may be a file."
    hint = "Send the clip as `file`, and every option as a field without a file name."
    return RequestError("unknown_parameter", message, param="file", hint=hint)


def read_json(body: bytes, kind: type[Options]) -> tuple[Options, bytes | FileId]:
    """Read a JSON body: the fields, including the clip as base64 or the id of its file."""
    options = validate(kind, parse_json(body), strict=True)
    audio = cast("HasClip", options).audio
    if len(audio.model_fields_set) != 1:
        code = "invalid_parameter" if audio.model_fields_set else "missing_parameter"
        message = "`audio` needs exactly one of `data` and `file_id`."
        raise RequestError(code, message, param="audio", limit=1, actual=len(audio.model_fields_set))
    if "data" in audio.model_fields_set:
        return options, decode_base64(audio.data)
    return options, FileId(audio.file_id or audio.audio_id)


def parse_json(body: bytes) -> Any:
    """Parse a JSON body by the standard: no NaN, no infinity, no deep nesting, no name twice in one object."""

    def refuse(_: str) -> None:
        raise ValueError

    try:
        return json.loads(body, parse_constant=refuse, object_pairs_hook=unique_members)
    except json.JSONDecodeError as error:
        # The position alone: the text may be private.
        message = f"The body is not valid JSON at line {error.lineno}, column {error.colno}."
        raise RequestError("invalid_json", message) from None
    except UnicodeDecodeError:
        raise RequestError("invalid_json", "The body is not in UTF-8.", hint="Encode JSON in UTF-8.") from None
    except (ValueError, RecursionError):
        raise RequestError("invalid_json", "The body is not valid JSON.") from None


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        RequestError: A name appears twice; readers would take either value.
    """
    members = dict(pairs)
    if len(members) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        shown = name if PLAIN_NAME.fullmatch(name) else None
        message = f"{f'`{shown}`' if shown else 'A name'} appears twice in one JSON object."
        raise RequestError("invalid_json", message, param=shown)
    return members


def decode_base64(text: str, *, param: str = "audio.data") -> bytes:
    """Decode a clip inside a JSON body.

    Line breaks, a data URL's prefix, the URL-safe alphabet and missing padding are accepted, since encoders write them.

    Args:
        param: The field, for the error.
    """
    if (prefix := DATA_URL.match(text)) is not None:
        if "base64" not in [part.strip().lower() for part in prefix[2].split(";")]:
            message = f"`{param}` is a data URL without `;base64`."
            raise RequestError("invalid_parameter", message, param=param, hint="Encode the clip as base64.")
        text = text[prefix.end() :]
    if INNER_SPACE.search(text):
        hint = "A space often stands for a `+` that was decoded as part of an address; send the text in a JSON body."
        raise RequestError("invalid_parameter", f"`{param}` is base64 with spaces in it.", param=param, hint=hint)
    try:
        raw = text.encode("ascii").translate(URL_SAFE, ASCII_WHITE_SPACE)
        return base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except (binascii.Error, ValueError):
        hint = "Send the file's bytes in base64 (RFC 4648), or a data: URL of them."
        if text.lstrip()[:8].lower().startswith(("http:", "https:", "file:")):
            hint = "Send the clip itself; the service fetches no address."
        raise RequestError("invalid_parameter", f"`{param}` is not valid base64.", param=param, hint=hint) from None


def validate(kind: type[Options], fields: Any, *, strict: bool) -> Options:
    """Check the fields' types and ranges; a form's values are strings, JSON's must have the right type."""
    if not isinstance(fields, Mapping):
        raise RequestError("invalid_request", "The body must be a JSON object.")
    check_sizes(cast("Mapping[str, Any]", fields))
    check_names(kind, cast("Mapping[str, Any]", fields), is_form=not strict)
    return kind.model_validate(plain_values(cast("Mapping[str, Any]", fields)) if strict else fields, strict=strict)


def plain_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a JSON object without its nulls, and whole numbers as integers.

    Many libraries write null for a field that is not set. JSON has one kind of number: 256.0 is 256.
    """
    plain: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
            plain[name] = int(value)
        elif name == "audio" and isinstance(value, Mapping):
            plain[name] = plain_values(cast("Mapping[str, Any]", value))
        elif value is not None:
            plain[name] = value
    return plain


def check_names(kind: type[BaseModel], fields: Mapping[str, Any], *, is_form: bool) -> None:
    """Refuse an unknown field by its name, and suggest the nearest known one."""
    names = [field.alias or name for name, field in kind.model_fields.items()]
    members = [f"audio.{each}" for each in AudioData.model_fields]
    known = ["file", *names] if is_form else [*names, *(members if "audio" in names else ())]
    for name in fields:
        if name not in names:
            raise unknown_field([name], known)
    audio = fields.get("audio")
    if not is_form and isinstance(audio, Mapping):
        for name in cast("Mapping[str, Any]", audio):
            if name not in AudioData.model_fields:
                raise unknown_field(["audio", name], members)


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
