"""Validation of requests: bad clips, fields and bodies are refused by name, quickly, and without an echo."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import soundfile

from hyper_model.answering import CLOSING_TOKENS
from hyper_model.audio import SAMPLE_RATE_HZ, Waveform
from hyper_model.checkpoint import Checkpoint
from hyper_model.trace import MAX_CHOICE_CHARS
from server.api import forms
from server.api.questions import Asked, plan
from server.api.types import QaBody
from server.engines.protocol import ScriptedEngine
from server.engines.scripted import scripted_checkpoint
from server.errors import RequestError
from server.service import Service
from server.telemetry.metrics import Metrics
from tests.serving import QUESTION, Live, assert_error, json_question, mp3, post_json, running, scripted, tone, wav

BAD_CLIPS: dict[str, tuple[Callable[[], bytes], int, set[str]]] = {
    "text": (lambda: b"this is not audio at all, it is a sentence\n" * 10, 415, {"unsupported_audio"}),
    "zip": (lambda: b"PK\x03\x04" + bytes(200), 415, {"unsupported_audio"}),
    "empty": (lambda: b"", 400, {"audio_empty", "empty_audio", "invalid_audio"}),
    "10 ms": (lambda: tone(0.01), 400, {"audio_too_short"}),
    "40 s": (lambda: tone(40.0), 422, {"audio_too_long"}),
    "playlist": (lambda: b"#EXTM3U\n#EXT-X-VERSION:3\nhttp://127.0.0.1:1/x.ts\n", 415, {"unsupported_audio"}),
    "playlist in RIFF": (
        lambda: b"RIFF\x40\x00\x00\x00WAVE#EXTM3U\nhttp://127.0.0.1:1/x.ts\n",
        400,
        {"damaged_audio"},
    ),
    "truncated MP3": (lambda: mp3()[:200], 400, {"damaged_audio"}),
    "liar WAV": (
        lambda: tone()[:40] + struct.pack("<I", 2**31) + tone()[44:100],
        400,
        {"damaged_audio", "audio_too_short"},
    ),
}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("name", BAD_CLIPS)
def test_a_bad_clip_is_refused_quickly_and_the_next_is_answered(live: Live, name: str, is_stream: bool) -> None:
    """Streaming makes no difference: an error before the first event has a status."""
    make, status, codes = BAD_CLIPS[name]
    files = {"file": ("clip.wav", make())}
    fields = {"question": QUESTION, "stream": str(is_stream).lower()}
    reply = live.client.post("/v1/audio/qa", data=fields, files=files)
    code = reply.json()["error"]["code"]
    assert code in codes
    assert_error(reply, status, code, "file")
    assert live.ask().status_code == 200


def test_a_long_clip_is_refused_with_the_window_and_the_ways_to_use_it(live: Live) -> None:
    error = assert_error(live.ask(tone(40.0)), 422, "audio_too_long", "file")
    assert (error["limit"], error["actual"]) == (30.0, 40.0)
    assert "30 s" in error["message"] and "`window`" in error["hint"] and "`long_audio=chunk`" in error["hint"]
    assert live.ask(tone(30.0)).status_code == 200


BAD_FIELDS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "blank question": ({"question": "  "}, "invalid_prompt", "question"),
    "long question": ({"question": "x" * 2001}, "invalid_prompt", "question"),
    "question with NUL": ({"question": "a\0b"}, "invalid_prompt", "question"),
    "one choice": ({"choices": ["only"]}, "invalid_prompt", "choices"),
    "a hundred choices": ({"choices": [f"choice {number}" for number in range(100)]}, "invalid_prompt", "choices"),
    "equal choices": ({"choices": ["same", " same "]}, "invalid_prompt", "choices"),
    "unknown field": ({"quesiton": "typo"}, "unknown_parameter", "quesiton"),
    "seed below zero": ({"seed": -1}, "invalid_parameter", "seed"),
    "seed of 5000 digits": ({"seed": "9" * 5000}, "invalid_parameter", "seed"),
    "hot": ({"temperature": 2.5}, "invalid_parameter", "temperature"),
    "temperature NaN": ({"temperature": "nan"}, "invalid_parameter", "temperature"),
    "temperature infinite": ({"temperature": "1e999"}, "invalid_parameter", "temperature"),
    "no tokens": ({"max_tokens": 0}, "invalid_parameter", "max_tokens"),
    "too many tokens": ({"max_tokens": 5000}, "invalid_parameter", "max_tokens"),
    "endless": ({"timeout_ms": 10**9}, "invalid_parameter", "timeout_ms"),
    "pauses beyond the checkpoint's": ({"pause": 4}, "invalid_parameter", "pause"),
    "pause of another name": ({"pause": "often"}, "invalid_parameter", "pause"),
    "long audio of another name": ({"long_audio": "cut"}, "invalid_parameter", "long_audio"),
    "start without a window": ({"start_s": 1.0}, "invalid_parameter", "start_s"),
    "start before the beginning": ({"long_audio": "window", "start_s": -1}, "invalid_parameter", "start_s"),
    "start behind the end": ({"long_audio": "window", "start_s": 1.0}, "invalid_parameter", "start_s"),
    "stream of another name": ({"stream": "maybe"}, "invalid_parameter", "stream"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_a_bad_field_is_named_and_not_repeated(live: Live, name: str) -> None:
    fields, code, param = BAD_FIELDS[name]
    reply = live.ask(**fields)
    assert_error(reply, 400, code, param)
    # The request's id is random, and may contain any digits.
    said = reply.text.replace(reply.headers["x-request-id"], "")
    assert "xxxx" not in said and "9999" not in said
    assert live.ask().status_code == 200


def test_a_form_needs_a_question_and_one_file(live: Live) -> None:
    def post(*parts: tuple[str, Any]) -> Any:
        return live.client.post("/v1/audio/qa", files=list(parts))

    question = ("question", (None, QUESTION))
    clip = ("file", ("clip", tone()))
    assert_error(post(clip), 400, "missing_parameter", "question")
    assert_error(post(question), 400, "missing_parameter", "file")
    assert_error(post(question, ("file", (None, "clip.wav"))), 400, "invalid_parameter", "file")
    assert_error(post(question, clip, clip), 400, "invalid_parameter", "file")
    assert_error(post(question, clip, ("image", ("b", tone()))), 400, "unknown_parameter", "file")
    assert_error(post(question, question, clip), 400, "invalid_parameter", "question")
    assert_error(post(*[("file", ("a", b""))] * 50), 400, "invalid_multipart")


def test_options_in_the_address_are_refused_by_name(live: Live) -> None:
    for query, name, words in (
        ("choices=a&choices=b", "choices", "query parameter"),
        ("stream=true", "stream", "form field"),
        ("choices%5B%5D=a", "choices", "query parameter"),
        ("modle=x", "modle", "unknown field"),
        ("x%0d%0ay=1", None, "invalid name"),
    ):
        reply = live.client.post(f"/v1/audio/qa?{query}", data={"question": QUESTION}, files={"file": ("c", tone())})
        error = assert_error(reply, 400, "unknown_parameter", name)
        assert words in error["message"] + str(error["hint"])
    assert live.client.get("/livez?probe=1").status_code == 200


def test_an_unknown_field_is_named_with_the_nearest_known_one(live: Live) -> None:
    for sent, nearest in {
        "quesiton": "question",
        "Question": "question",
        "prompt": "question",
        "options": "choices",
        "max-tokens": "max_tokens",
        "max_new_tokens": "max_tokens",
        "timeout": "timeout_ms",
        "audio": "file",
        "temprature": "temperature",
    }.items():
        fields: dict[str, Any] = {sent: "x"}
        error = assert_error(live.ask(**fields), 400, "unknown_parameter", sent)
        assert f"`{sent}`" in error["message"] and error["hint"] == f"Did you mean `{nearest}`?", error
    error = assert_error(live.ask(model="x"), 400, "unknown_parameter", "model")
    assert "question, choices" in error["hint"]
    clip = base64.b64encode(tone()).decode()
    for fields, path, nearest in (
        ({"audio": {"data": clip, "format": "wav"}}, "audio.format", None),
        ({"audio": {"data": clip, "base64": "x"}}, "audio.base64", "audio.data"),
        ({"audio": {"data": clip}, "Choices": []}, "Choices", "choices"),
    ):
        reply = live.client.post("/v1/audio/qa", json={"question": QUESTION, **fields})
        error = assert_error(reply, 400, "unknown_parameter", path)
        assert nearest is None or error["hint"] == f"Did you mean `{nearest}`?", error


def test_forms_as_libraries_of_many_languages_write_them(live: Live) -> None:
    """The part's file name, spellings of lists, empty options, and the encoding's own field vary."""

    def head(disposition: str, *more: str) -> bytes:
        return "\r\n".join(["--x", f"Content-Disposition: form-data; {disposition}", *more, "", ""]).encode()

    def form(*parts: tuple[bytes, bytes]) -> Any:
        body = b"".join(start + content + b"\r\n" for start, content in parts) + b"--x--\r\n"
        return live.client.post(
            "/v1/audio/qa", content=body, headers={"content-type": 'Multipart/Form-Data; boundary="x"'}
        )

    question = (head('name="question"'), QUESTION.encode())
    long = tone(5.0)
    for disposition, *more in (
        ('name="file"',),
        ('name="file"', "Content-Type: application/octet-stream"),
        ('name="file"; filename=""', "Content-Type: audio/wav"),
        ('name="file"; filename="C:\\\\clips\\\\a.wav"',),
        ("name=file; filename=a.wav",),
        ('name="file"; filename*=UTF-8\'\'%C3%A9.wav; filename="e.wav"',),
        ('name="file[]"; filename="a.wav"',),
    ):
        assert form(question, (head(disposition, *more), long)).status_code == 200, disposition
    file = (head('name="file"; filename="a"'), tone())
    for names in (
        ("choices[]", "choices[]"),
        ("choices[0]", "choices[1]"),
        ("choices.0", "choices.1"),
        ("choices",) * 2,
    ):
        parts = [(head(f'name="{name}"'), text) for name, text in zip(names, (b"a bell", b"a dog"), strict=True)]
        reply = form(question, file, *parts)
        assert reply.status_code == 200 and reply.json()["answer"]["choice"] in ("a bell", "a dog"), names
    # Lists may arrive in any order, each with its index.
    parts = [(head('name="choices[1]"'), b"second"), (head('name="choices[0]"'), b"first")]
    reply = form(question, file, *parts).json()
    assert reply["answer"]["choice"] == ("first", "second")[reply["answer"]["choice_index"]]
    extra = [(head('name="_charset_"'), b"UTF-8"), (head('name="seed"'), b""), (head('name="stream"'), b"False")]
    assert form(question, file, *extra).status_code == 200
    assert_error(form(question, (head('name="clip"; filename="a.wav"'), tone())), 400, "unknown_parameter", "file")


def test_base64_is_taken_as_encoders_write_it(live: Live) -> None:
    data = tone(0.3)
    plain = base64.b64encode(data).decode()
    for text in (
        plain,
        "data:audio/wav;base64," + plain,
        "data:;base64," + plain,
        "DATA:audio/x-wav;codecs=1;BASE64,".lower() + plain,
        base64.urlsafe_b64encode(data).decode(),
        plain.rstrip("="),
        "\r\n".join(plain[start : start + 76] for start in range(0, len(plain), 76)),
    ):
        reply = live.client.post("/v1/audio/qa", json={"question": QUESTION, "audio": {"data": text}})
        assert reply.status_code == 200, text[:40]
    for text, words in (
        ("data:audio/wav," + "x", "without `;base64`"),
        ("http://127.0.0.1:9/a.wav", "fetches no address"),
    ):
        reply = live.client.post("/v1/audio/qa", json={"question": QUESTION, "audio": {"data": text}})
        error = assert_error(reply, 400, "invalid_parameter", "audio.data")
        assert words in error["message"] + error["hint"]


def test_the_reply_names_tracks_channels_and_warnings_of_the_clip(live: Live) -> None:
    left, right = (np.frombuffer(tone(2.0)[44:], "<i2"), np.zeros(32_000, "<i2"))
    file = io.BytesIO()
    soundfile.write(file, np.stack([left, -left], axis=1), 16_000, format="WAV", subtype="PCM_16")
    audio = live.ask(file.getvalue()).json()["audio"][0]
    assert [warning["code"] for warning in audio["warnings"]] == ["channels_out_of_phase"]
    assert audio["warnings"][0]["seconds"] > 1 and not audio["truncated"]
    file = io.BytesIO()
    soundfile.write(file, np.stack([left, right], axis=1), 16_000, format="WAV", subtype="PCM_16")
    assert "loud" in live.ask(file.getvalue(), channel="left").json()["answer"]["text"]
    assert live.ask(file.getvalue(), channel="right").json()["audio"][0]["quality"]["silence_ratio"] == 1.0
    cut = live.ask(tone(4.0)[: 44 + 64_000]).json()["audio"][0]
    assert (cut["used_s"], cut["truncated"], cut["missing_s"]) == (2.0, True, 2.0)
    assert [warning["code"] for warning in cut["warnings"]] == ["audio_missing"]
    assert_error(live.ask(track=2), 400, "no_such_track", "file")
    assert live.ask(track=1).json()["audio"][0]["track"] == 1
    assert_error(live.ask(channel="each"), 400, "invalid_parameter", "channel")
    assert_error(live.ask(track=0), 400, "invalid_parameter", "track")


def test_a_hostile_form_is_a_bad_request(live: Live) -> None:
    for content_type, body in (
        ("multipart/form-data", b"--x"),
        ("multipart/form-data; boundary=x", b"no boundary at all"),
        ("multipart/form-data; boundary=x", b"--x\r\ncontent-disposition: form-data\r\n\r\n1\r\n--x--"),
    ):
        reply = live.client.post("/v1/audio/qa", content=body, headers={"content-type": content_type})
        assert_error(reply, 400, "invalid_multipart")
    for charset in (
        "undefined",
        "punycode",
        "idna",
        "utf-16",
        "latin-1",
        "hex",
        "no-such",
        "",
        "utf-8; charset=punycode",
    ):
        content_type = f"multipart/form-data; boundary=x; charset={charset}"
        body = b'--x\r\ncontent-disposition: form-data; name="question"\r\n\r\n' + b"a" * 60_000 + b"\r\n--x--"
        reply = live.client.post("/v1/audio/qa", content=body, headers={"content-type": content_type})
        assert_error(reply, 400, "invalid_multipart")
    fields = [(f"field{number}", (None, "1")) for number in range(1000)]
    assert_error(live.client.post("/v1/audio/qa", files=fields), 400, "invalid_multipart")
    big = live.client.post("/v1/audio/qa", files={"question": (None, "x" * 2_000_000)})
    assert_error(big, 400, "invalid_multipart")


def test_other_content_types_are_refused(live: Live) -> None:
    assert_error(live.client.post("/v1/audio/qa", data={"question": QUESTION}), 415, "unsupported_media_type")
    assert_error(live.client.post("/v1/audio/qa", content=tone()), 415, "unsupported_media_type")


GOOD_AUDIO = b'"audio":{"data":"' + base64.b64encode(tone(0.2)) + b'"}'


def with_audio(fields: bytes) -> bytes:
    """Return a body of these fields and a good clip."""
    return b"{" + fields + b", " + GOOD_AUDIO + b"}"


BAD_JSON: dict[str, tuple[bytes, str, str | None]] = {
    "empty": (b"", "invalid_json", None),
    "cut": (b'{"question": "a"', "invalid_json", None),
    "a list": (b"[]", "invalid_request", None),
    "a number": (b"1", "invalid_request", None),
    "not UTF-8": (b'{"question": "\xff"}', "invalid_json", None),
    "NaN": (with_audio(b'"question": NaN'), "invalid_json", None),
    "infinity": (with_audio(b'"question": "a", "temperature": -Infinity'), "invalid_json", None),
    "1e999": (with_audio(b'"question": "a", "temperature": 1e999'), "invalid_parameter", "temperature"),
    "1e999 as a count": (with_audio(b'"question": "a", "max_tokens": 1e999'), "invalid_parameter", "max_tokens"),
    "5000 digits": (with_audio(b'"question": "a", "seed": ' + b"9" * 5000), "invalid_json", None),
    "lone surrogate": (with_audio(b'"question": "\\ud800"'), "invalid_prompt", "question"),
    "lone surrogate in a choice": (
        with_audio(b'"question": "a", "choices": ["\\udfff", "b"]'),
        "invalid_prompt",
        "choices",
    ),
    "lone surrogate as a name": (with_audio(b'"\\ud800": 1, "question": "a"'), "unknown_parameter", None),
    "deep": (b'{"question": ' + b"[" * 100_000, "invalid_json", None),
    "deep but closed": (b'{"question": ' + b"[" * 900 + b"]" * 900 + b"}", "invalid_parameter", "question"),
    "no question": (b"{" + GOOD_AUDIO + b"}", "missing_parameter", "question"),
    "no audio": (b'{"question": "a"}', "missing_parameter", "audio"),
    "audio by name": (b'{"question": "a", "audio": {"url": "http://127.0.0.1:1"}}', "unknown_parameter", "audio.url"),
    "audio and more": (b'{"question": "a", "audio": {"data": "", "path": "/x"}}', "unknown_parameter", "audio.path"),
    "not base64": (b'{"question": "a", "audio": {"data": "****"}}', "invalid_parameter", "audio.data"),
    "base64 with surrogate": (b'{"question": "a", "audio": {"data": "\\ud800"}}', "invalid_parameter", "audio.data"),
    "no bytes": (b'{"question": "a", "audio": {"data": ""}}', "", "file"),
    "a string for a count": (with_audio(b'"question": "a", "max_tokens": "9"'), "invalid_parameter", "max_tokens"),
    "a truth for a count": (with_audio(b'"question": "a", "max_tokens": true'), "invalid_parameter", "max_tokens"),
    "a string for choices": (with_audio(b'"question": "a", "choices": "bc"'), "invalid_parameter", "choices"),
    "unknown": (with_audio(b'"question": "a", "top_k": 1'), "unknown_parameter", "top_k"),
    "one choice of many is no string": (
        with_audio(b'"question": "a", "choices": [' + b"1, " * 100 + b'"b"]'),
        "invalid_parameter",
        "choices",
    ),
    "half a million choices": (
        with_audio(b'"question": "a", "choices": [1' + b",1" * 500_000 + b"]"),
        "invalid_prompt",
        "choices",
    ),
    "100,000 unknown names": (
        b"{" + b",".join(b'"k%d":1' % number for number in range(100_000)) + b"}",
        "unknown_parameter",
        None,
    ),
    "100,000 unknown names beside the clip": (
        b'{"question": "a", "audio": {' + b",".join(b'"k%d":1' % number for number in range(100_000)) + b"}}",
        "unknown_parameter",
        "audio",
    ),
    "400 digits": (with_audio(b'"question": "a", "max_tokens": ' + b"9" * 400), "invalid_parameter", "max_tokens"),
    "400 digits of pauses": (with_audio(b'"question": "a", "pause": ' + b"9" * 400), "invalid_parameter", "pause"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_a_bad_request(live: Live, name: str) -> None:
    body, code, param = BAD_JSON[name]
    reply = post_json(live, body)
    assert_error(reply, 400, code or reply.json()["error"]["code"], param)
    assert len(reply.content) < 1000 and "9" * 20 not in reply.text
    assert post_json(live, json_question()).status_code == 200


def test_a_million_bad_items_are_refused_in_a_moment() -> None:
    """No error object is built for each item: 0.2 s is a hundredth of the time otherwise."""
    body = b'{"question": "a", "choices": [1' + b",1" * 500_000 + b"]}"
    fields = forms.parse_json(body)
    with pytest.raises(RequestError, match="choices"):
        forms.validate(QaBody, fields, strict=True)


def test_the_clip_may_be_written_in_lines(live: Live) -> None:
    lines = base64.encodebytes(tone()).decode()
    for data in (lines, lines.replace("\n", "\r\n"), f"  {lines}\t"):
        reply = post_json(live, json_question(audio={"data": data}))
        assert reply.status_code == 200, reply.text
    assert_error(
        post_json(live, json_question(audio={"data": "UklGRg==\u00a0"})), 400, "invalid_parameter", "audio.data"
    )


def test_a_field_of_two_kinds_is_told_both(live: Live) -> None:
    for pause in (1.5, "often", True):
        message = assert_error(post_json(live, json_question(pause=pause)), 400, "invalid_parameter", "pause")[
            "message"
        ]
        assert "'auto' or 'off'" in message and "integer" in message, message
    message = assert_error(live.ask(pause="-1"), 400, "invalid_parameter", "pause")["message"]
    assert "'auto' or 'off'" in message and "greater than or equal to 0" in message


def test_an_unknown_charset_is_refused_but_utf_8_by_its_names_is_not(live: Live) -> None:
    parts = b'--x\r\ncontent-disposition: form-data; name="question"\r\n\r\nWer h\xc3\xb6rt?\r\n--x--'
    for charset in ("utf-8", "UTF-8", "utf8", '"utf-8"'):
        headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        assert_error(live.client.post("/v1/audio/qa", content=parts, headers=headers), 400, "missing_parameter", "file")


def test_choices_answered_by_their_words_have_room_to_be_scored() -> None:
    """A choice is scored as written, escaped and closed, plus the one token always written by the engine."""
    given = scripted_checkpoint()
    trace = given.manifest.trace.model_copy(update={"answer_style": "text"})
    manifest = given.manifest.model_copy(update={"trace": trace})
    tokenizer = given.tokenizer
    checkpoint = Checkpoint(given.path, manifest, tokenizer, given.manifest_sha256)
    service = Service(scripted(default_max_tokens=10**6), checkpoint, ScriptedEngine(tokenizer), Metrics())
    choices = ["<THINK>" * (MAX_CHOICE_CHARS // len("<THINK>")), "plain"]
    waveform = Waveform(np.zeros(SAMPLE_RATE_HZ, dtype=np.float32))
    question, budget = plan(service.answerer, Asked("a", tuple(choices)), [1] * 10, waveform, 60.0)
    longest = max(map(len, tokenizer.choice_ids(choices, by_letter=False)))
    assert longest > max(map(len, map(tokenizer.encode_text, choices)))
    assert budget is not None and question.gate is not None and question.gate.max_pauses == budget.max_pauses
    pauses = budget.max_pauses * manifest.pause.latent_tokens
    used = 10 + round(manifest.audio.tokens_per_s) + pauses + question.max_tokens + CLOSING_TOKENS + longest + 1
    assert used == manifest.max_model_len
    service.pool.shutdown()


def test_no_value_anywhere_is_a_server_error(live: Live) -> None:
    """Try every kind of JSON value in every field: wrong types, nesting, extremes."""
    values = [None, True, -1, 0, 1.5, 10**400, "", "x" * 70_000, "\0", [], [[]], {}, {"a": []}, [1, 2], "\U0001f600"]
    for field in ("question", "choices", "stream", "pause", "reasoning", "long_audio", "max_tokens", "seed", "audio"):
        for value in values:
            assert post_json(live, json_question(**{field: value})).status_code < 500, (field, value)


def test_unknown_addresses_and_methods_get_error_objects(live: Live) -> None:
    assert_error(live.client.get("/v1/nothing"), 404, "not_found")
    assert_error(live.client.get("/v1/audio/qa"), 405, "method_not_allowed")
    assert_error(live.client.delete("/livez"), 405, "method_not_allowed")


def test_a_refused_method_is_told_those_that_there_are(live: Live) -> None:
    for path, methods in (("/v1/audio/qa", {"POST"}), ("/v1/info", {"GET"}), ("/livez", {"GET", "HEAD"})):
        assert set(live.client.delete(path).headers["allow"].split(", ")) == methods


def test_probes_answer_head(live: Live) -> None:
    for path in ("/livez", "/readyz"):
        reply = live.client.head(path)
        assert (reply.status_code, reply.content) == (200, b"")
        assert live.client.get(path).status_code == 200
        assert set(live.client.get("/openapi.json").json()["paths"][path]) == {"get"}


def test_silence_is_left_out_and_the_reply_names_the_parts(live: Live) -> None:
    sound_S = 0.3 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000)
    reply = live.ask(wav(np.concatenate([np.zeros(80_000), sound_S, np.zeros(48_000)]))).json()
    (audio,) = reply["audio"]
    assert reply["answer"]["text"] == "2.6 s of loud sound"
    assert (audio["duration_s"], audio["used_s"], audio["truncated"]) == (10.0, 2.6, False)
    assert audio["parts"] == [{"start_s": 4.7, "end_s": 7.3}]
    assert [(each["code"], each["seconds"]) for each in audio["warnings"]] == [("silence_trimmed", 7.4)]
    short = live.ask(tone(0.2)).json()
    (audio,) = short["audio"]
    assert (audio["duration_s"], audio["used_s"], audio["padded_s"]) == (0.2, 0.2, 1.8)
    assert [each["code"] for each in audio["warnings"]] == ["quiet_added", "too_short_for_words"]
    silent = live.ask(wav(np.zeros(160_000))).json()
    assert silent["audio"][0]["used_s"] == 10.0 and silent["audio"][0]["warnings"] == []
    assert [each["code"] for each in silent["warnings"]] == ["silent_audio"]


def test_trimming_can_be_turned_off() -> None:
    with running(scripted(trim_silence=False)) as service:
        reply = service.ask(wav(np.concatenate([np.zeros(80_000), np.full(8_000, 0.1)]))).json()
    (audio,) = reply["audio"]
    assert (audio["used_s"], audio["padded_s"], audio["warnings"]) == (5.5, 0.0, [])
    assert reply["answer"]["text"].startswith("5.5 s")
