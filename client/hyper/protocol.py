"""Both clients' common part: requests, replies, errors and retries. No input or output.

Replies are parsed with unknown members kept, so that this release reads the replies of newer services.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, Unpack, cast

import httpx
from pydantic import BaseModel, ValidationError

from hyper.clips import LoadedClip
from hyper.errors import ConnectionFailedError, Error, ReplyTimeoutError, ServiceError, UnexpectedReplyError, class_of
from hyper_model.proxies import proxy_hint, unusable_proxy
from server.api.types import ErrorReply

QA_PATH = "/v1/audio/qa"
INFO_PATH = "/v1/info"
FILES_PATH = "/v1/files"
JOBS_PATH = "/v1/jobs"
SECRETS_PATH = "/v1/webhooks/secrets"
DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 10.0
MAX_PORT = 65535
TIMEOUT_MARGIN_S = 10.0
"""Time after a request's own deadline for the service's reply to arrive."""

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 8.0
HEADERS = {"priority": "x-hyper-priority", "request_id": "x-request-id"}
NEVER_RETRIED = frozenset({"deadline_exceeded"})
"""Retryable in principle, but a retry would use the engine for the same time again."""

IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,255}")

Reply = TypeVar("Reply", bound=BaseModel)


class AskOptions(TypedDict, total=False):
    """Optional fields and headers of a question; absent ones are left to the service.

    The fields are those of `POST /v1/audio/qa`. `priority` and `request_id` become headers: a batch request waits
    behind interactive ones, and the id identifies the request in the service's log.
    """

    pause: Literal["auto", "off"] | int
    reasoning: Literal["full", "answer"]
    long_audio: Literal["error", "window", "chunk"]
    start_s: float
    track: int
    channel: Literal["mix", "left", "right"]
    max_tokens: int
    temperature: float
    seed: int
    timeout_ms: int
    priority: Literal["interactive", "batch"]
    request_id: str


@dataclass(frozen=True)
class Options:
    """Configuration of a client.

    Attributes:
        url: Address of the service, without a path of the API.
        api_key: None for a service without keys.
        timeout_s: Maximum silence of the service; None for no limit.
        max_retries: Retries per request.
        max_retry_after_s: Longest Retry-After that the client obeys. A longer one raises the error at once.
    """

    url: str
    api_key: str | None = field(repr=False)
    timeout_s: float | None
    max_retries: int
    max_retry_after_s: float

    @classmethod
    def resolve(
        cls,
        base_url: str | None,
        api_key: str | None,
        timeout_s: float | None,
        max_retries: int,
        max_retry_after_s: float,
    ) -> Options:
        """Fill in the environment: HYPER_URL and HYPER_API_KEY.

        Raises:
            ValueError: The address is not an http or https URL, or the key is not ASCII.
        """
        # Files of secrets and settings often end in a line break.
        address = (base_url if base_url is not None else os.environ.get("HYPER_URL") or DEFAULT_URL).strip()
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise ValueError(f"{address!r} is not a valid address: {error}.") from None
        if url.scheme not in ("http", "https") or not url.host or "%" in url.host or (url.port or 0) > MAX_PORT:
            needs = f"http:// or https://, a host, and a port up to {MAX_PORT}"
            raise ValueError(f"{address!r} is not a valid address: it needs {needs}.")
        key = (api_key if api_key is not None else os.environ.get("HYPER_API_KEY") or "").strip() or None
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError("the API key has characters outside ASCII.")
        # OpenAI's clients have the version in the base address.
        return cls(str(url).rstrip("/").removesuffix("/v1"), key, timeout_s, max_retries, max_retry_after_s)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}

    def timeout(self, timeout_ms: int | None = None) -> httpx.Timeout:
        """Return httpx's timeouts; a request with a longer deadline is given that time."""
        silence_s = self.timeout_s
        if silence_s is not None and timeout_ms is not None:
            silence_s = max(silence_s, timeout_ms / 1000 + TIMEOUT_MARGIN_S)
        return httpx.Timeout(silence_s, connect=CONNECT_TIMEOUT_S)


QuestionItem: TypeAlias = "str | Mapping[str, Any]"
"""One of several questions: a text, or a mapping with `question` and `choices`."""


@dataclass(frozen=True)
class Question:
    """One question or several, ready to send as often as needed.

    Attributes:
        clip: The clip; None if the fields name a stored file.
    """

    clip: LoadedClip | None
    fields: Mapping[str, Any]
    headers: Mapping[str, str]
    timeout_ms: int | None
    path: str = QA_PATH

    @classmethod
    def build(
        cls,
        clip: LoadedClip | None,
        question: str | None,
        choices: Sequence[str] = (),
        *,
        file_id: str | None = None,
        questions: Sequence[QuestionItem] = (),
        stream: bool = False,
        caller: str = "ask()",
        **options: Unpack[AskOptions],
    ) -> Question:
        """Write the form fields and headers; error messages name the caller.

        Raises:
            TypeError: A list is one text, an option is unknown, or a clip or question is absent or given twice.
            ValueError: A text is not valid Unicode.
        """
        if (clip is None) == (file_id is None):
            raise TypeError(f"{caller} needs a clip or a file_id, not both")
        if (question is None) == (not questions):
            raise TypeError(f"{caller} needs a question or questions, not both")
        if isinstance(questions, str):
            raise TypeError("questions is a list, not one text")
        if isinstance(choices, str):
            raise TypeError("choices is a list of texts, not one text")
        if unknown := options.keys() - AskOptions.__annotations__.keys():
            raise TypeError(f"{caller} has no option {', '.join(sorted(unknown))}")
        sent = [item if isinstance(item, str) else json.dumps(dict(item)) for item in questions]
        for text in (question or "", *choices, *sent):
            _require_unicode(text)
        given = {name: value for name, value in options.items() if value is not None}
        headers = {HEADERS[name]: str(given.pop(name)) for name in HEADERS if name in given}
        fields: dict[str, Any] = {"choices": list(choices), "questions": sent, "stream": str(stream).lower(), **given}
        fields |= {} if question is None else {"question": question}
        fields |= {} if file_id is None else {"file_id": file_id}
        # Requests about one clip reach the replica whose cache has it.
        key = file_id if clip is None else clip.sha256
        return cls(clip, fields, {"x-hyper-clip": str(key), **headers}, options.get("timeout_ms"))

    def as_job(self, webhook_url: str | None, keep_s: float | None, idempotency_key: str | None) -> Question:
        """Return the same request as a job; without a key it has a new one, so that a retry stores no second job.

        Raises:
            ValueError: The key has characters outside visible ASCII.
        """
        key = str(uuid.uuid4()) if idempotency_key is None else idempotency_key
        if not IDEMPOTENCY_KEY.fullmatch(key):
            raise ValueError(f"{key!a} is not an idempotency_key: it needs 1 to 255 visible ASCII characters.")
        fields = dict(self.fields)
        fields |= {} if webhook_url is None else {"webhook[url]": webhook_url}
        fields |= {} if keep_s is None else {"keep_s": keep_s}
        headers = {**self.headers, "idempotency-key": key}
        return Question(self.clip, fields, headers, self.timeout_ms, JOBS_PATH)

    @contextlib.contextmanager
    def parts(self) -> Generator[dict[str, Any]]:
        """Open the clip, and yield the multipart body as arguments of httpx; a form without files needs one, too."""
        with contextlib.ExitStack() as stack:
            if self.clip is not None:
                file = stack.enter_context(self.clip.open())
                yield {"data": self.fields, "files": {"file": ("clip", file)}}
            else:
                yield {"files": [(name, (None, text)) for name, text in self._texts()]}

    def _texts(self) -> Iterator[tuple[str, str]]:
        for name, value in self.fields.items():
            for each in cast("list[Any]", value) if isinstance(value, list) else [value]:
                yield name, str(each)


def query(**fields: str | int | None) -> dict[str, str]:
    """Return the query parameters that are given."""
    return {name: str(value) for name, value in fields.items() if value is not None}


def _require_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        # A shell passes bytes of another encoding on as surrogates.
        raise ValueError(f"{text!a} is not UTF-8 text; write it in UTF-8.") from None


def require_usable_proxy(url: str) -> None:
    """Check the environment's proxy for an address.

    Raises:
        ConnectionFailedError: The proxy cannot be used.
    """
    if problem := unusable_proxy(url):
        raise ConnectionFailedError(problem)


def connection_error(error: httpx.HTTPError, url: str) -> ConnectionFailedError:
    """Translate a failure of the connection; names the proxy, if there is one."""
    reason = str(error) or type(error).__name__
    if isinstance(error, (httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout)):
        return ReplyTimeoutError(f"{url} sent nothing in time ({type(error).__name__}). Raise timeout_s.")
    hint = proxy_hint(url).strip() or "Is `hyper serve` running?"
    return ConnectionFailedError(f"no reply from {url}: {reason}. {hint}")


def read_reply(response: httpx.Response, kind: type[Reply], url: str) -> Reply:
    """Parse the body of a success.

    Raises:
        UnexpectedReplyError: The body has another form.
    """
    try:
        return parse(kind, parse_json(response.text))
    except (UnexpectedReplyError, UnicodeDecodeError) as error:
        raise not_ours(url) from error


def not_ours(url: str) -> UnexpectedReplyError:
    """Say that another service answers at the address."""
    return UnexpectedReplyError(f"the reply from {url} is not one of `hyper serve`. Check the address.")


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        UnexpectedReplyError: The text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnexpectedReplyError("the reply is not JSON.") from error


def parse(kind: type[Reply], data: Any) -> Reply:
    """Validate a value against a type of the API, with unknown members kept.

    Raises:
        UnexpectedReplyError: The value has another form.
    """
    try:
        return kind.model_validate(data, extra="allow")
    except ValidationError as error:
        raise UnexpectedReplyError(f"the reply is not a {kind.__name__}.") from error


def dump(value: Any) -> Any:
    """Return a parsed reply as JSON values, unknown members included, which `model_dump` leaves out."""
    if isinstance(value, BaseModel):
        return {name: dump(member) for name, member in value}
    if isinstance(value, list):
        return [dump(member) for member in cast("list[Any]", value)]
    return value


def service_error(data: Any, *, status: int | None = None, retry_after_s: float | None = None) -> ServiceError:
    """Build the exception of an error object.

    Raises:
        UnexpectedReplyError: The value is not an error object.
    """
    error = parse(ErrorReply, data).error
    partial = data.get("partial")
    return class_of(error, status)(error, status=status, retry_after_s=retry_after_s, partial=partial)


def error_of(response: httpx.Response, url: str) -> Error:
    """Build the exception of a reply that is not a success; its body must have been read."""
    header = response.headers.get("retry-after", "")
    retry_after_s = float(header) if header.isascii() and header.isdigit() else None
    try:
        return service_error(parse_json(response.text), status=response.status_code, retry_after_s=retry_after_s)
    except (UnexpectedReplyError, UnicodeDecodeError):
        return UnexpectedReplyError(
            f"the reply from {url} has status {response.status_code} and no error object. A proxy may have sent it."
        )


def retry_delay_s(options: Options, num_tries: int, error: Exception, response: httpx.Response | None) -> float | None:
    """Return the seconds until the next try; None if there is none.

    Args:
        num_tries: Tries so far.
        error: The failure of the last try.
        response: The reply of the last try; None without one.
    """
    if num_tries > options.max_retries:
        return None
    backoff_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (num_tries - 1)) * random.uniform(0.75, 1.25)
    if response is None:
        is_lost = isinstance(error, ConnectionFailedError) and not isinstance(error, ReplyTimeoutError)
        return backoff_s if is_lost else None
    if response.headers.get("x-should-retry", "").lower() == "false":
        return None
    if not isinstance(error, ServiceError) or not error.retryable or error.code in NEVER_RETRIED:
        return None
    if error.retry_after_s is None:
        return backoff_s
    return error.retry_after_s if error.retry_after_s <= options.max_retry_after_s else None
