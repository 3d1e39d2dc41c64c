"""Fuzz the HTTP API with requests generated from its OpenAPI document, and probe every address without a key.

Replies are checked against the document. They must also reveal nothing internal and echo no input. This module depends
on the service's HTTP API alone.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import httpx
import numpy as np
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode, Response
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok

from loadtests.client import QA_PATH
from loadtests.clips import SAMPLE_RATE_HZ, wav

PUBLIC_PATHS = ("/livez", "/readyz", "/", "/docs")

FORM = "multipart/form-data"
NEGATIVE = "negative_data_rejection"
CHECKED = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    NEGATIVE,
    "unsupported_method",
    "allow_header_conformance",
)
INSIDE = re.compile(r"/tmp|/usr|/home|/root|/proc|0x[0-9a-f]{6}|Traceback|ffmpeg|libsnd|\.py\b")
"""Internal details forbidden in replies: paths, addresses, source files, decoders."""

MIN_ECHO_CHARS = 8
LATE_MS = 10_000
"""Requests with a shorter timeout may get a deadline error."""

TIMEOUT_S = 60.0
MAX_KEPT = 50
MAX_SHOWN = 80


@dataclass
class Findings:
    """Results of a number of requests.

    Attributes:
        statuses: Number of replies by status; 0 stands for no reply.
        num_ours: Failures of the service: 5xx and broken connections.
        wrong: The first few wrong replies, each with its request.
    """

    statuses: Counter[int] = field(default_factory=Counter[int])
    num_ours: int = 0
    num_wrong: int = 0
    wrong: list[str] = field(default_factory=list[str])

    @property
    def num(self) -> int:
        """Return the number of requests."""
        return sum(self.statuses.values())

    def as_json(self) -> dict[str, Any]:
        """Return all findings as plain data."""
        statuses = {str(status): num for status, num in sorted(self.statuses.items())}
        return {"statuses": statuses, "num_ours": self.num_ours, "num_wrong": self.num_wrong, "wrong": self.wrong}

    def blame(self, reason: str) -> None:
        """Record a wrong reply."""
        self.num_wrong += 1
        if len(self.wrong) < MAX_KEPT:
            self.wrong.append(reason)


def schema_of(document: dict[str, Any]) -> Any:
    """Return schemathesis' schema of an OpenAPI document, with clips for its binary fields."""
    load_all_checks()
    document = copy.deepcopy(document)
    for operations in document["paths"].values():
        for operation in operations.values():
            content = operation.get("requestBody", {}).get("content", {})
            if FORM in content:
                keep_first_alternative(content[FORM]["schema"])
    clips = clip_bytes()
    schemathesis.openapi.format("binary", clips)
    schemathesis.openapi.format("byte", clips.map(lambda data: base64.b64encode(data).decode()))
    return schemathesis.openapi.from_dict(document)


def keep_first_alternative(schema: dict[str, Any]) -> None:
    """Reduce a form's alternatives to the first, in place: schemathesis cannot check a file against several."""
    alternatives = schema.pop("anyOf", None)
    if alternatives:
        schema["required"] = alternatives[0]["required"]
        for name in {name for each in alternatives[1:] for name in each["required"]} - set(schema["required"]):
            del schema["properties"][name]


def generate(
    url: str,
    key: str | None,
    num: int,
    seed_value: int,
    say: Callable[[int], None],
    *,
    is_withheld: bool = False,
    draws_every_endpoint: bool = False,
    document: dict[str, Any] | None = None,
) -> Findings:
    """Send requests generated from the service's OpenAPI document, both valid and invalid ones.

    First come the boundary cases of each schema, then drawn ones, reproducible by the seed.

    Args:
        key: An API key, if the service requires one.
        say: Called now and then with the number of requests so far.
        is_withheld: Use the key only for reading the document; other requests go without it, and all except probes must
            get 401.
        draws_every_endpoint: Draw requests for every endpoint, instead of questions alone.
        document: Replacement for the service's own document.
    """
    document = document or describe(url, bearer(key))
    headers = {} if is_withheld else bearer(key)
    schema = schema_of(document)
    known = json.dumps(document)
    checks: Any = [CHECKS.get_one(name) for name in CHECKED]
    findings = Findings()

    def send(case: Case) -> None:
        try:
            # Each request has its own connection; the server may close an idle one while a long case is generated.
            reply = case.call(base_url=url, headers=headers, timeout=TIMEOUT_S)
        except requests.RequestException as fault:
            findings.statuses[0] += 1
            findings.num_ours += 1
            findings.blame(f"{case.method} {case.path}: no reply ({type(fault).__name__}) to {brief(case.body)}")
            return
        findings.statuses[reply.status_code] += 1
        for reason in judge(case, reply, checks, known, is_withheld=is_withheld):
            findings.num_ours += reason == OURS
            sent = f"{case.media_type} {dict(case.headers)} {brief(case.body)}"
            findings.blame(f"{case.method} {case.path}: {reply.status_code}: {reason}: {sent}")
        if findings.num % 100 == 0:
            say(findings.num)

    operations = [result.ok() for result in schema.get_all_operations() if isinstance(result, Ok)]
    for operation in operations:
        bounds = schema.iter_coverage_cases(
            operation=operation,
            generation_modes=list(GenerationMode),
            generation_config=schema.config.generation,
        )
        for case in islice(bounds, max(1, num // (4 * len(operations)))):
            send(case)
    (question,) = (candidate for candidate in operations if candidate.path == QA_PATH)
    drawn = [each for each in operations if each is not question] if draws_every_endpoint else []
    # Questions last: they take what is left, since an endpoint without parameters has few different requests.
    for number, operation in enumerate([*drawn, question]):
        share = -(-max(0, num - findings.num) // (len(drawn) + 1 - number))
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                draw(operation.as_strategy(generation_mode=mode), (share + 1) // 2, seed_value, send)
            except Unsatisfiable:
                # An endpoint without parameters has no invalid request.
                continue
    return findings


OURS = "a failure of the service"


def judge(case: Case, reply: Response, checks: Any, known: str, *, is_withheld: bool) -> Iterator[str]:
    """Yield the faults of a reply."""
    text = reply.content.decode("utf-8", "replace")
    if reply.status_code >= 500 and not is_asked_for(case, reply.status_code, text):
        yield OURS
    if is_withheld and case.path not in PUBLIC_PATHS and reply.status_code not in (400, 401, 405):
        yield "answered without a key"
    try:
        excluded: Any = [CHECKS.get_one(NEGATIVE)] if leaves_out(case.body) and case.media_type == FORM else None
        case.validate_response(reply, checks=checks, excluded_checks=excluded)
    except FailureGroup as failures:
        for failure in failures.exceptions:
            yield f"{type(failure).__name__}: {' '.join(str(failure).split()):.300}"
    request_id = reply.headers.get("x-request-id", [""])[0]
    visible = text.replace(request_id, "") if request_id else text
    if case.path != "/metrics" and (inside := INSIDE.search(visible)):
        yield f"tells of the inside: {inside[0]}"
    if reply.status_code >= 400:
        for word in words_of([case.body, dict(case.query or {}), dict(case.headers or {})]):
            if len(word) >= MIN_ECHO_CHARS and word in visible and word not in known:
                yield f"repeats what was sent: {word:.40}"


def brief(value: Any) -> Any:
    """Shorten every long text inside a value for display."""
    if isinstance(value, Mapping):
        return {name: brief(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [brief(inner) for inner in value][:MAX_SHOWN]
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def is_asked_for(case: Case, status: int, text: str) -> bool:
    """Return True if a 5xx follows from the request's own short timeout."""
    body: Any = case.body
    if not isinstance(body, Mapping) or status not in (503, 504):
        return False
    try:
        timeout_ms = float(body.get("timeout_ms") or LATE_MS)
        code = json.loads(text)["error"]["code"]
    except (ValueError, TypeError, LookupError):
        return False
    return timeout_ms < LATE_MS and code in ("deadline_exceeded", "overloaded")


def leaves_out(body: Any) -> bool:
    """Return True if a field vanishes in a form: an empty list sends no field, and an empty text leaves it open."""
    return isinstance(body, Mapping) and any(value in ([], "") for value in body.values())


def words_of(value: Any) -> Iterator[str]:
    """Yield every text inside a value, but no names of fields: an error names an unknown field."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from words_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from words_of(inner)


def draw(strategy: st.SearchStrategy[Case], num: int, seed_value: int, send: Callable[[Case], None]) -> None:
    """Send `num` drawn requests. Hypothesis does not shrink them, since each reply is judged alone."""
    if not num:
        return

    @seed(seed_value)
    @settings(
        max_examples=num,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        verbosity=Verbosity.quiet,
    )
    @given(strategy)
    def each(case: Case) -> None:
        send(case)

    each()


def clip_bytes() -> st.SearchStrategy[bytes]:
    """Draw clips, most of them valid; otherwise no request would pass the decoder."""
    times_S = np.arange(SAMPLE_RATE_HZ // 5) / SAMPLE_RATE_HZ
    good = wav((0.3 * np.sin(2765 * times_S)).astype(np.float32))
    return st.one_of(st.just(good), st.just(good), st.just(good), st.binary(max_size=80), st.just(good[:400]))


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "QUERY")
DISGUISED_HEADERS = ({}, {"host": "127.0.0.1/livez?"}, {"x-forwarded-for": "127.0.0.1"})
UNDESCRIBED_PATHS = ("/docs", "/openapi.json")
STRAY_PATHS = (
    *(
        "/docs/oauth2-redirect",
        "/nothing",
        "/livez/../v1/info",
        "/readyz/x",
        "/LIVEZ",
        "/livez;/v1/info",
        "/static/x",
    ),
    *("/redoc", "/health", "/v1/models", "/v1/chat/completions", "/invocations", "/pause", "/tokenize", "/version"),
)
"""Addresses outside the API; some exist in vLLM's own server."""

REFUSED = frozenset({400, 401})


def probe_without_key(url: str, key: str, say: Callable[[int], None]) -> Findings:
    """Request every address with every method and path variant, without a key and with wrong keys.

    Each reply must be 401, or 400 for an unreadable request.

    Args:
        key: A valid key, for reading the document and deriving wrong keys.
        say: Called now and then with the number of requests so far.
    """
    findings = Findings()
    routes = {*describe(url, bearer(key))["paths"], *UNDESCRIBED_PATHS} - set(PUBLIC_PATHS)
    paths = sorted({path for route in routes for path in disguises(route)} | set(STRAY_PATHS))
    attempts = [(method, path, headers) for path in paths for method in METHODS for headers in DISGUISED_HEADERS]
    attempts += [("GET", route, headers) for headers in wrong_headers(key) for route in sorted(routes)]
    with httpx.Client(timeout=TIMEOUT_S) as client:
        for method, path, headers in attempts:
            request = client.build_request(method, url, headers=headers)
            request.url = request.url.copy_with(raw_path=path.encode())
            status = client.send(request).status_code
            findings.statuses[status] += 1
            if status not in REFUSED:
                findings.num_ours += 1
                findings.blame(f"{method} {path} {headers}: {status}")
            if findings.num % 500 == 0:
                say(findings.num)
    return findings


def disguises(path: str) -> set[str]:
    """Return variants of a path, each confused with the original by some server in the past."""
    return {
        path,
        f"{path}/",
        f"/{path}",
        f"{path}?x=/livez",
        f"{path}%20",
        f"{path}%00",
        path.replace("/", "/./"),
        f"/livez/..{path}",
        path.upper(),
        f"{path}%2f..%2flivez",
    }


def wrong_headers(key: str, *others: str) -> list[dict[str, str]]:
    """Return headers without a valid key; `others` are revoked keys."""
    values = [
        "",
        "Bearer",
        f"Basic {key}",
        key,
        f"Bearer {key}x",
        f"Bearer {key[:-1]}",
        f"Bearer {key.upper()}",
        *(f"Bearer {other}" for other in others),
        f"Bearer {key} {key}",
        f"Token {key}",
        "Bearer " + hashlib.sha256(key.encode()).hexdigest(),
        "Bearer null",
    ]
    return [
        {},
        {"x-api-key": key},
        {"cookie": f"authorization=Bearer {key}"},
        *({"authorization": value} for value in values),
    ]


def bearer(key: str | None) -> dict[str, str]:
    """Return the header with a key."""
    return {} if key is None else {"authorization": f"Bearer {key}"}


def describe(url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """Return the service's OpenAPI document."""
    reply = requests.get(f"{url}/openapi.json", headers=headers, timeout=TIMEOUT_S)
    reply.raise_for_status()
    return reply.json()
