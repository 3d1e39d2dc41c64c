"""Lines of a batch: the check of a file, the request of a line, and the lines of the result files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from server.errors import RequestError

MAX_LINES = 50_000
MAX_ID_CHARS = 512
MEMBERS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Line:
    """One request of a batch.

    Attributes:
        custom_id: The caller's name for it.
        body: The JSON body.
    """

    custom_id: str
    body: dict[str, Any]


class BrokenLineError(Exception):
    """Error for a line that is no request of its batch.

    Attributes:
        custom_id: The caller's name for the line, if it has one.
        message: The fault.
    """

    def __init__(self, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.custom_id = custom_id


def split_lines(data: bytes) -> list[bytes]:
    """Split a file into lines and check it as a whole; the lines themselves are checked later, one by one.

    Raises:
        RequestError: 400, if the file has no line, too many, or two with one `custom_id`.
    """
    param = "input_file_id"
    lines = data.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n", MAX_LINES)
    if not lines[0].strip() and len(lines) == 1:
        hint = "Write one request per line: custom_id, method, url and body."
        raise RequestError("invalid_parameter", "The batch file has no line.", param=param, hint=hint)
    if len(lines) > MAX_LINES:
        actual = MAX_LINES + 1 + lines[-1].count(b"\n")
        message = f"The batch file has {actual} lines; the limit is {MAX_LINES}."
        raise RequestError(
            "invalid_parameter", message, param=param, limit=MAX_LINES, actual=actual, hint="Split the batch."
        )
    first: dict[str, int] = {}
    for number, text in enumerate(lines, 1):
        custom_id = custom_id_of(parse_line(text))
        if custom_id is None:
            continue
        if custom_id in first:
            message = f"Lines {first[custom_id]} and {number} have the same `custom_id`."
            hint = "Give each line its own `custom_id`."
            raise RequestError("invalid_parameter", message, param=param, hint=hint)
        first[custom_id] = number
    return lines


def parse_line(text: bytes) -> Any:
    """Return the JSON value of a line; None for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def custom_id_of(value: Any) -> str | None:
    """Return the `custom_id` of a line, if it is a text within its limit."""
    found: Any = cast("dict[str, Any]", value).get("custom_id") if isinstance(value, dict) else None
    return found if isinstance(found, str) and 0 < len(found) <= MAX_ID_CHARS else None


def read_line(text: bytes, endpoint: str) -> Line:
    """Return the request of a line.

    Raises:
        BrokenLineError: If it is none for this endpoint.
    """
    value = parse_line(text)
    if not isinstance(value, dict):
        raise BrokenLineError("The line is not a JSON object.")
    line = cast("dict[str, Any]", value)
    custom_id = custom_id_of(line)
    if custom_id is None:
        raise BrokenLineError(f"`custom_id` must be a text of 1 to {MAX_ID_CHARS} characters.")
    if line.get("method") != "POST":
        raise BrokenLineError("`method` must be POST.", custom_id)
    if line.get("url") != endpoint:
        raise BrokenLineError(f"`url` must be the endpoint of the batch, {endpoint}.", custom_id)
    if unknown := [name for name in line if name not in MEMBERS]:
        message = f"The line has {len(unknown)} unknown fields; its fields are {', '.join(MEMBERS)}."
        raise BrokenLineError(message, custom_id)
    body = line.get("body")
    if not isinstance(body, dict):
        raise BrokenLineError("`body` must be a JSON object.", custom_id)
    if cast("dict[str, Any]", body).get("stream"):
        raise BrokenLineError("`stream` must be false in a batch.", custom_id)
    return Line(custom_id, cast("dict[str, Any]", body))


def result_line(request_id: str, custom_id: str, status: int, body: Any) -> str:
    """Write the line of a request with a reply or an error of the endpoint."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return written(request_id, custom_id, response, None)


def broken_line(request_id: str, index: int, error: BrokenLineError) -> str:
    """Write the line of a broken request, with its number."""
    message = f"Line {index + 1}: {error.message}"
    found = {"code": "invalid_request", "message": message, "line": index + 1}
    return written(request_id, error.custom_id, None, found)


def failed_line(request_id: str, index: int, custom_id: str | None, error: dict[str, Any]) -> str:
    """Write the line of a request that the service could not do."""
    found = {"code": error["code"], "message": f"Line {index + 1}: {error['message']}", "line": index + 1}
    return written(request_id, custom_id, None, found)


def written(request_id: str, custom_id: str | None, response: Any, error: Any) -> str:
    """Write a line of a result file."""
    fields = {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": response, "error": error}
    return json.dumps(fields)


def joined(lines: Sequence[str]) -> bytes:
    """Return the content of a result file."""
    return "".join(f"{line}\n" for line in lines).encode()
