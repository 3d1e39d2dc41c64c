"""Two thousand generated requests and typical wrong ones: never a server error, and no echo of the input."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.serving import QUESTION, Live, running, scripted, tone

CLIP = base64.b64encode(tone(0.1)).decode()
MARK = "zqxjkv"
"""Text absent from all our own replies."""

FIELDS = (
    "question choices stream pause reasoning long_audio max_tokens temperature seed timeout_ms audio file model n stop "
    "logit_bias logprobs tools chat_template cache_salt mm_processor_kwargs audio_url response_format user __proto__"
).split()

# The same examples every time; shrinking would only delay the report of a failure.
GENERATED = settings(
    max_examples=1000,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

words = st.one_of(
    st.text(max_size=40),
    st.text(st.characters(), max_size=20).map(lambda text: MARK + text),
    st.sampled_from(
        [
            "",
            " ",
            "\0",
            "\ud800",
            "auto",
            "off",
            "full",
            "answer",
            "error",
            "true",
            "nan",
            "Infinity",
            "-1",
            "1e999",
            "9" * 400,
            "0x10",
            "٣",
            "<FINAL_ANSWER>",
            "<|im_end|>",
            "<|AUDIO|>" * 20,
            "../../etc/passwd",
            "file:///etc/passwd",
            "http://169.254.169.254/",
            "{{7*7}}",
            "%s%n",
            "\u202e" + MARK,
            MARK * 500,
        ]
    ),
)
numbers = st.one_of(
    st.integers(-5, 5),
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 1e308]),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, words),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(words.filter(lambda text: MARK not in text), inner, max_size=4)
    ),
    max_leaves=5,
)
# An error names an unknown field, so no name holds the mark.
names = st.one_of(st.sampled_from(FIELDS), words.filter(lambda text: MARK not in text))
clips = st.one_of(
    st.just(CLIP),
    st.just({"data": CLIP}),
    st.fixed_dictionaries({"data": words}),
    st.sampled_from([CLIP[:40], CLIP + "="]),
)


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    with running(scripted(default_max_tokens=8, max_audio_s=5.0)) as live:
        yield live


def check(reply: httpx.Response, sent: object) -> None:
    """Check that the error blames the request, has our form, and does not repeat the input."""
    if reply.status_code == 200:
        return
    error = reply.json()["error"]
    is_late = (reply.status_code, error["code"]) in ((504, "deadline_exceeded"), (503, "overloaded"))
    assert reply.status_code < 500 or is_late, (reply.status_code, reply.text, sent)
    assert set(error) == {
        *("type", "code", "message", "param", "request_id", "retryable"),
        *("limit", "actual", "hint"),
    }
    assert MARK not in reply.text and len(reply.content) < 2500, reply.text
    assert error["request_id"] == reply.headers["x-request-id"]


def to_json(value: object) -> bytes:
    """Write invalid JSON: NaN, infinities and lone surrogates unescaped."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@GENERATED
@given(fields=st.dictionaries(names, values, max_size=3), clip=clips, question=st.one_of(st.just(QUESTION), values))
def test_any_json_is_the_senders_fault_or_an_answer(
    service: Live, fields: dict[str, Any], clip: Any, question: Any
) -> None:
    body = {"audio": clip, "question": question, **fields}
    headers = {"content-type": "application/json"}
    check(service.client.post("/v1/audio/qa", content=to_json(body), headers=headers), body)


@GENERATED
@given(
    fields=st.lists(st.tuples(names, st.one_of(words, numbers.map(str))), max_size=4),
    has_clip=st.booleans(),
    question=st.one_of(st.just(QUESTION), words),
    noise=st.binary(max_size=6),
    cut=st.integers(0, 40),
)
def test_any_form_is_the_senders_fault_or_an_answer(
    service: Live, fields: list[tuple[str, str]], has_clip: bool, question: str, noise: bytes, cut: int
) -> None:
    parts = [("question", question), *fields]
    body = b"".join(
        b'--x\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n'
        % (name.encode("utf-8", "surrogatepass"), value.encode("utf-8", "surrogatepass"))
        for name, value in parts
    )
    if has_clip:
        head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="%s"\r\n\r\n' % noise.replace(b"\n", b"")
        body += head + tone(0.1) + b"\r\n"
    body += b"--x--\r\n"
    if cut > 30:
        body = body[: -(cut - 30)]
    headers = {"content-type": "multipart/form-data; boundary=x"}
    check(service.client.post("/v1/audio/qa", content=body, headers=headers), parts)


HEADERS: dict[str, dict[str, str]] = {
    "an unknown type": {"content-type": "application/x-www-form-urlencoded"},
    "xml": {"content-type": "application/xml"},
    "a type of nothing": {"content-type": ""},
    "a type of noise": {"content-type": "multipart/form-data;;;;boundary"},
    "a boundary of 5000 characters": {"content-type": "multipart/form-data; boundary=" + "x" * 5000},
    "an empty boundary": {"content-type": "multipart/form-data; boundary="},
    "json in utf-16": {"content-type": "application/json; charset=utf-16"},
    "a coding": {"content-type": "application/json", "content-encoding": "gzip"},
    "an upgrade": {"content-type": "application/json", "upgrade": "websocket", "connection": "upgrade"},
    "another method": {"content-type": "application/json", "x-http-method-override": "DELETE"},
    "a long request id": {"content-type": "application/json", "x-request-id": MARK * 50},
    "an odd class": {"content-type": "application/json", "x-hyper-priority": MARK},
    "a range": {"content-type": "application/json", "range": "bytes=0-99999999999"},
    "an expectation": {"content-type": "application/json", "expect": "200-ok"},
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("body", [b"", b"{}", b"--x--", b"\xff\xfe"])
def test_odd_headers_are_the_senders_fault(service: Live, name: str, body: bytes) -> None:
    reply = service.client.post("/v1/audio/qa", content=body, headers=HEADERS[name])
    assert reply.status_code in (400, 415), reply.text
    check(reply, name)


def test_every_address_and_method_has_an_error_of_our_form(service: Live) -> None:
    paths = [
        "/",
        "/v1",
        "/v1/audio/qa/",
        "/v1/audio/qa%00",
        "/v1/%2e%2e/info",
        "/openapi.json/x",
        "/%ff%fe",
        "/docs/../x",
    ]
    for path in (*paths, "/v1/audio/qa", "/v1/info", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json"):
        for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "QUERY"):
            request = service.client.build_request(method, service.url, content=b"x" if method == "PUT" else None)
            request.url = request.url.copy_with(raw_path=path.encode())
            reply = service.client.send(request)
            assert reply.status_code < 500, (method, path, reply.status_code)
            if reply.status_code >= 400 and method != "HEAD":
                check(reply, (method, path))
