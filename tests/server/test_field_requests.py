"""Requests as proxies, browsers and HTTP libraries send them: addresses, lengths, idle connections and origins."""

from __future__ import annotations

import base64
import gzip
import json
import socket
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from server.app import create_app
from server.serving import uvicorn_config
from server.settings import Settings
from tests.process import post, serve_process
from tests.serving import (
    QUESTION,
    Live,
    assert_error,
    json_question,
    post_json,
    running,
    scripted,
    tone,
)

ORIGIN = "https://app.example.com"


@pytest.mark.parametrize("path", ["/v1/audio/qa/", "/v1/audio/qa//", "//v1/audio/qa", "/v1//audio///qa/"])
def test_slashes_around_an_address_are_answered_and_not_redirected(live: Live, path: str) -> None:
    reply = live.client.post(live.url + path, data={"question": QUESTION}, files={"file": ("c", tone())})
    assert reply.status_code == 200 and not reply.history
    for other in ("/livez/", "/v1/info/", "/metrics/"):
        assert live.client.get(other).status_code == 200
    missing = live.client.get("/v1/audio/")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "not_found"


def test_a_slash_at_the_end_does_not_pass_the_keys(tmp_path: Any) -> None:
    from server import api_keys

    file = tmp_path / "keys.json"
    api_keys.add(file, name="a", scopes=("ask",), expires=None)
    with running(scripted(key_file=file)) as live:
        assert live.client.get("/livez/").status_code == 200
        for path in ("/v1/info/", "/v1/audio/qa/", "/metrics/", "/livez/x/", "//metrics", "//v1//info"):
            assert live.client.get(live.url + path).status_code == 401, path


def test_two_lengths_are_refused_and_the_connection_is_closed(live: Live) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    smuggled = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    head = (
        b"POST /v1/audio/qa HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head + smuggled)
        received = b""
        while part := connection.recv(65_536):
            received += part
    assert received.startswith(b"HTTP/1.1 400") and b"invalid_http" in received
    assert b"connection: close" in received.lower() and received.count(b"HTTP/1.1 ") == 1


def config_of(**settings: Any) -> Any:
    made = Settings(engine="scripted", **settings)
    return uvicorn_config(create_app(made), made)


def test_idle_connections_outlive_those_of_common_proxies() -> None:
    # nginx, Apache and AWS keep idle connections for 60 s, Traefik for 90 s, Caddy for 120 s, Azure for 240 s.
    assert config_of().timeout_keep_alive > 240
    assert config_of(keep_alive_s=620).timeout_keep_alive == 620
    with pytest.raises(ValidationError):
        Settings(keep_alive_s=0)


def test_an_idle_connection_is_closed_after_the_setting() -> None:
    with serve_process({"HYPER_ENGINE": "scripted", "HYPER_KEEP_ALIVE_S": "1"}) as (_, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
            while connection.recv(65_536):
                pass
        assert post(url).status_code == 200


def test_forwarded_headers_are_taken_from_named_proxies_alone() -> None:
    assert config_of().proxy_headers is False
    trusted = config_of(forwarded_allow_ips="10.0.0.7, 192.168.0.0/16")
    assert trusted.proxy_headers is True and trusted.forwarded_allow_ips == "10.0.0.7, 192.168.0.0/16"
    for text in ("*", "proxy.local", "10.0.0.7;10.0.0.8"):
        with pytest.raises(ValidationError):
            Settings(forwarded_allow_ips=text)


def preflight(live: Live, origin: str) -> httpx.Response:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    return live.client.options("/v1/audio/qa", headers=headers)


def test_pages_of_other_origins_are_refused_unless_they_are_listed(live: Live) -> None:
    assert "access-control-allow-origin" not in preflight(live, ORIGIN).headers
    with running(scripted(cors_origins=f"{ORIGIN}, http://localhost:3000/")) as open_live:
        for origin in (ORIGIN, "http://localhost:3000"):
            reply = preflight(open_live, origin)
            assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
            reply = open_live.client.post(
                "/v1/audio/qa",
                data={"question": QUESTION},
                files={"file": ("c", tone())},
                headers={"origin": origin},
            )
            assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == origin
            assert "x-request-id" in reply.headers["access-control-expose-headers"]
        # An error must be readable for the page, too.
        wrong = open_live.client.post("/v1/audio/qa", headers={"origin": ORIGIN})
        assert wrong.status_code == 415 and wrong.headers["access-control-allow-origin"] == ORIGIN
        assert "access-control-allow-origin" not in preflight(open_live, "https://evil.example").headers
    for text in ("app.example.com", "https://app.example.com/path", "ftp://x"):
        with pytest.raises(ValidationError):
            Settings(cors_origins=text)


# --- JSON as the serializers of many languages write it ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["choices", "questions", "stream", "pause", "channel", "seed", "temperature", "track"])
def test_a_null_field_is_an_unset_one(live: Live, name: str) -> None:
    assert post_json(live, json_question(**{name: None})).status_code == 200
    audio = {**json_question()["audio"], "file_id": None}
    assert post_json(live, json_question(audio=audio)).status_code == 200
    assert_error(post_json(live, json_question(question=None)), 400, "missing_parameter", "question")
    assert_error(post_json(live, json_question(quesiton=None)), 400, "unknown_parameter", "quesiton")


def test_a_whole_number_is_an_integer_however_it_is_written(live: Live) -> None:
    for written in ('"max_tokens": 256.0', '"seed": 1e3', '"track": 1.0', '"pause": 0.0', '"temperature": 1'):
        body = json.dumps(json_question(x=0)).replace('"x": 0', written)
        assert post_json(live, body.encode()).status_code == 200, written
    for written, param in (('"seed": 1.5', "seed"), ('"max_tokens": 1e300', "max_tokens"), ('"track": 1e999', "track")):
        body = json.dumps(json_question(x=0)).replace('"x": 0', written)
        assert_error(post_json(live, body.encode()), 400, "invalid_parameter", param)


def test_a_name_twice_in_one_object_is_refused_by_name(live: Live) -> None:
    clip = json.dumps(json_question()["audio"])
    for body, param in (
        (f'{{"question": "a", "question": "b", "audio": {clip}}}', "question"),
        (f'{{"question": "a", "audio": {clip}, "audio": {clip}}}', "audio"),
        ('{"question": "a", "audio": {"data": "", "data": ""}}', "data"),
        (f'{{"question": "a", "choices": [], "choi\\u0063es": ["a"], "audio": {clip}}}', "choices"),
    ):
        assert_error(post_json(live, body.encode()), 400, "invalid_json", param)


def test_broken_json_is_named_by_its_place_or_its_encoding(live: Live) -> None:
    good = json.dumps(json_question())
    for body in (
        b"\xef\xbb\xbf" + good.encode(),
        good.encode("utf-16"),
        good.encode("utf-32"),
        b"\n\t " + good.encode(),
    ):
        assert post_json(live, body).status_code == 200
    for body, words in (
        (b'{"question": "a",}', "line 1, column 18"),
        (b"{\n  'question': 'a'}", "line 2, column 3"),
        (good.encode() * 2, "line 1, column"),
        (b'{"question": "a" /* clip */}', "line 1, column 18"),
        (json.dumps({"question": "\u00e9"}, ensure_ascii=False).encode("latin-1"), "UTF-8"),
    ):
        assert words in assert_error(post_json(live, body), 400, "invalid_json")["message"], body


def test_the_place_of_the_clip_in_json_is_named(live: Live) -> None:
    clip = json_question()["audio"]["data"]
    for sent in ("file", "input_audio", "clip", "recording"):
        error = assert_error(post_json(live, {"question": QUESTION, sent: clip}), 400, "unknown_parameter", sent)
        assert error["hint"] == "Did you mean `audio`?"
    error = assert_error(post_json(live, json_question(file_id="x")), 400, "unknown_parameter", "file_id")
    assert error["hint"] == "Did you mean `audio.file_id`?"
    for audio in (clip, [{"data": clip}], 1):
        error = assert_error(post_json(live, json_question(audio=audio)), 400, "invalid_parameter", "audio")
        assert error["message"] == "`audio` must be a JSON object."


def test_base64_that_lost_its_plus_signs_is_refused_and_not_decoded_without_them(live: Live) -> None:
    clip = json_question()["audio"]["data"]
    assert "+" in clip
    error = assert_error(
        post_json(live, json_question(audio={"data": clip.replace("+", " ")})), 400, "invalid_parameter", "audio.data"
    )
    assert "spaces" in error["message"] and "`+`" in error["hint"]
    for text in (clip.replace("+", "%2B"), clip[:40] + "\\n" + clip[40:], f"b'{clip}'", f'"{clip}"', clip[:-3] + clip):
        assert_error(post_json(live, json_question(audio={"data": text})), 400, "invalid_parameter", "audio.data")


# --- Forms: charsets, transfer encodings, lists in one field, and clips as text ------------------------------------


def part(name: str, *headers: str) -> bytes:
    return "\r\n".join(["--x", f"Content-Disposition: form-data; {name}", *headers, "", ""]).encode()


def form(live: Live, *parts: tuple[bytes, bytes]) -> httpx.Response:
    body = b"".join(head + content + b"\r\n" for head, content in parts) + b"--x--\r\n"
    return live.client.post("/v1/audio/qa", content=body, headers={"content-type": "multipart/form-data; boundary=x"})


FILE = (part('name="file"; filename="a.wav"'), tone())
CHOICES = ("\u00e9t\u00e9", "hiver")


@pytest.mark.parametrize(
    ("charset", "codec"),
    [
        ("UTF-8", "utf-8"),
        ('"utf-8"', "utf-8-sig"),
        ("ISO-8859-1", "latin-1"),
        ("windows-1252", "cp1252"),
        ("UTF-16", "utf-16"),
        ("utf-16le", "utf-16-le"),
    ],
)
def test_a_text_part_is_read_in_its_own_charset(live: Live, charset: str, codec: str) -> None:
    head = part('name="choices"', f"Content-Type: text/plain; charset={charset}")
    texts = [(head, text.encode(codec)) for text in CHOICES]
    reply = form(live, (part('name="question"'), QUESTION.encode()), FILE, *texts)
    assert reply.status_code == 200, reply.text
    assert reply.json()["answer"]["choice"] in CHOICES


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ((), CHOICES[0].encode("latin-1")),
        ((), "зима".encode("cp1251")),
        (("Content-Type: text/plain; charset=utf-8",), "冬".encode("shift-jis")),
        (("Content-Type: text/plain; charset=shift_jis",), "冬".encode("shift-jis")),
        (("Content-Type: text/plain; charset=hex",), b"61"),
        (("Content-Type: text/plain; charset=utf-16",), b"odd"),
    ],
)
def test_text_in_another_charset_is_refused_by_name_and_not_guessed(
    live: Live, headers: Sequence[str], content: bytes
) -> None:
    error = assert_error(
        form(live, (part('name="question"', *headers), content), FILE), 400, "invalid_parameter", "question"
    )
    assert "UTF-8" in error["hint"]


def test_a_clip_under_another_name_is_an_unknown_field_and_no_bad_text(live: Live) -> None:
    question = (part('name="question"'), QUESTION.encode())
    assert_error(form(live, question, (part('name="audio"'), tone(0.2))), 400, "unknown_parameter", "audio")


def test_transfer_encodings_of_parts_are_refused_and_not_taken_for_words(live: Live) -> None:
    for encoding, content in (("base64", b"V2hvPw=="), ("quoted-printable", b"Wer h=C3=B6rt?"), ("x-uuencode", b"x")):
        question = part('name="question"', f"Content-Transfer-Encoding: {encoding}")
        error = assert_error(form(live, (question, content), FILE), 400, "invalid_multipart")
        assert "Content-Transfer-Encoding" in error["message"]
    for encoding in ("binary", "8bit", "7BIT"):
        question = part('name="question"', f"Content-Transfer-Encoding: {encoding}")
        assert form(live, (question, QUESTION.encode()), FILE).status_code == 200


def test_a_list_in_one_field_is_taken_if_it_is_json(live: Live) -> None:
    question = (part('name="question"'), QUESTION.encode())
    for head in (
        part('name="choices"'),
        part('name="choices"', "Content-Type: application/json"),
        part('name="choices[]"'),
    ):
        reply = form(live, question, FILE, (head, b' ["a, b", "c"]'))
        assert reply.status_code == 200 and reply.json()["answer"]["choice"] in ("a, b", "c")
    for sent in ("choices%5B%5D", "choices%5B0%5D"):
        reply = form(live, question, FILE, *[(part(f'name="{sent}"'), text) for text in (b"a", b"b")])
        assert reply.status_code == 200, sent
    assert form(live, question, FILE, (part('name="choices"'), b"")).json()["answer"]["choice"] is None
    for text in (b"a,b", b"[object Object]", b"[1, 2]", b'["a"', b"undefined"):
        error = assert_error(
            form(live, question, FILE, (part('name="choices"'), text)), 400, "invalid_prompt", "choices"
        )
        assert "Repeat the form field" in error["hint"]
    listed = (part('name="questions"'), b'["Who speaks?", {"question": "Which?", "choices": ["a", "b"]}]')
    assert len(form(live, FILE, listed).json()["data"]) == 2


def test_a_clip_as_text_is_refused_with_the_name_of_its_encoding(live: Live) -> None:
    plain = base64.b64encode(tone())
    for text, name in {
        plain: "base64",
        base64.encodebytes(tone()): "base64",
        base64.urlsafe_b64encode(tone()): "base64",
        b"b'" + plain + b"'": "base64",
        b"data:audio/wav;base64," + plain: "data URL",
        tone().hex().encode(): "hexadecimal",
        tone().hex(" ").encode(): "hexadecimal",
    }.items():
        error = assert_error(live.ask(text), 415, "unsupported_audio", "file")
        assert name in error["message"], text[:30]
    twice = base64.b64encode(plain).decode()
    assert (
        "base64"
        in assert_error(post_json(live, json_question(audio={"data": twice})), 415, "unsupported_audio", "file")[
            "message"
        ]
    )


def test_a_form_without_a_boundary_is_told_of_it(live: Live) -> None:
    for content_type in ("multipart/form-data", "multipart/form-data; charset=utf-8", "multipart/form-data; boundary="):
        reply = live.client.post("/v1/audio/qa", content=b"--x", headers={"content-type": content_type})
        assert "boundary" in assert_error(reply, 400, "invalid_multipart")["message"], content_type


@pytest.mark.parametrize("text", ["\ufeff", "\u200b\u2060", "\t\u00a0\u2028", "\u202e"])
def test_a_question_of_invisible_characters_is_empty(live: Live, text: str) -> None:
    assert_error(live.ask(question=text), 400, "invalid_prompt", "question")
    assert live.ask(question=f"{text}who?").status_code == 200


# --- HTTP as proxies and old clients send it -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/audio/qa", "/v1/audio/transcriptions", "/v1/chat/completions", "/v1/files"])
@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "x"])
def test_a_compressed_body_is_refused_by_name(live: Live, path: str, encoding: str) -> None:
    body = gzip.compress(json.dumps(json_question()).encode())
    headers = {"content-type": "application/json", "content-encoding": encoding}
    error = assert_error(live.client.post(path, content=body, headers=headers), 415, "unsupported_media_type")
    assert "Content-Encoding" in error["message"]
    headers = {"content-encoding": "identity"}
    assert live.client.post("/v1/audio/qa", json=json_question(), headers=headers).status_code == 200


def exchange(live: Live, *pieces: bytes) -> bytes:
    """Send bytes over one connection, and return everything received until its end."""
    host, port = live.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        for piece in pieces:
            connection.sendall(piece)
        while data := connection.recv(65_536):
            received += data
    return received


def request(target: str, *headers: str) -> bytes:
    body = json.dumps(json_question()).encode()
    lines = [f"POST {target} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def test_a_whole_address_as_the_target_is_its_path(live: Live) -> None:
    for target in ("http://localhost/v1/audio/qa", "HTTP://localhost:8000/v1/audio/qa/"):
        received = exchange(live, request(target, "Connection: close"))
        assert received.startswith(b"HTTP/1.1 200") and b'"answer"' in received, target
    assert exchange(live, request("http://localhost", "Connection: close")).startswith(b"HTTP/1.1 405")
    assert exchange(live, request("ftp://localhost/v1/audio/qa", "Connection: close")).startswith(b"HTTP/1.1 404")


def test_line_breaks_between_requests_are_skipped(live: Live) -> None:
    ask = request("/v1/audio/qa")
    last = request("/v1/audio/qa", "Connection: close")
    for pieces in ((b"\r\n" + last,), (b"\r\n", b"\n", last), (ask + b"\r\n", last), (ask, b"\r\n", b"\r\n" + last)):
        received = exchange(live, *pieces)
        assert received.count(b"HTTP/1.1 200") == sum(piece.count(b"POST") for piece in pieces), pieces
        assert b"HTTP/1.1 400" not in received
    # Requests that are sent at once are cut at their own ends alone.
    assert exchange(live, ask[:40], ask[40:] + ask + last[:60], last[60:]).count(b"HTTP/1.1 200") == 3
