"""Both clients against the real service over the scripted engine, and against canned replies of troubled ones."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import hyper
from hyper.protocol import AskOptions, dump
from server import api_keys
from server.api.types import InfoReply, QaOptions, QaReply
from tests.client.replies import Canned, error_reply, replying, stream_of
from tests.paths import CLIPS
from tests.serving import QUESTION, Live, running, scripted, tone

CLIP = CLIPS / "one-voice.mp3"


def ask_sync(url: str, clip: Any = CLIP, question: str = QUESTION, *, client: Any = None, **options: Any) -> QaReply:
    with hyper.Client(url, **(client or {})) as started:
        if options.pop("stream", False):
            return started.ask(clip, question, stream=True, **options).until_done()
        return started.ask(clip, question, **options)


def ask_async(url: str, clip: Any = CLIP, question: str = QUESTION, *, client: Any = None, **options: Any) -> QaReply:
    async def main() -> QaReply:
        async with hyper.AsyncClient(url, **(client or {})) as started:
            if options.pop("stream", False):
                return await (await started.ask(clip, question, stream=True, **options)).until_done()
            return await started.ask(clip, question, **options)

    return asyncio.run(main())


@pytest.fixture(params=[ask_sync, ask_async], ids=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Callable[..., QaReply]:
    return request.param


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_typed(live: Live, ask: Callable[..., QaReply], stream: bool) -> None:
    reply = ask(live.url, stream=stream)
    assert isinstance(reply, QaReply) and reply.answer.text == "9.6 s of loud sound"
    assert reply.perception is not None and reply.perception.environment_text == "loud sound"
    chosen = ask(live.url, choices=["a bell", "a dog"], stream=stream).answer
    assert chosen.scores is not None and chosen.choice_index is not None
    assert sum(chosen.scores) == pytest.approx(1) and chosen.text == ["a bell", "a dog"][chosen.choice_index]


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "file", "bytesio", "pipe"])
def test_a_clip_may_be_a_path_bytes_a_file_or_a_pipe(
    live: Live, ask: Callable[..., QaReply], kind: str, tmp_path: Path
) -> None:
    data = CLIP.read_bytes()
    pipe = tmp_path / "pipe"
    with CLIP.open("rb") as file:
        clips = {"path": CLIP, "text": str(CLIP), "bytes": data, "file": file, "bytesio": io.BytesIO(data)}
        if kind == "pipe":
            os.mkfifo(pipe)
            writer = threading.Thread(target=lambda: pipe.write_bytes(data))
            writer.start()
        assert ask(live.url, clips.get(kind, pipe)).answer.text == "9.6 s of loud sound"


def test_what_is_no_clip_is_refused_before_anything_is_sent(tmp_path: Path, ask: Callable[..., QaReply]) -> None:
    url = "http://127.0.0.1:9"
    with pytest.raises(FileNotFoundError):
        ask(url, tmp_path / "none.wav")
    for clip, message in ((io.StringIO("text"), "clip is"), (7, "clip is"), (None, "needs a clip")):
        with pytest.raises(TypeError, match=message):
            ask(url, clip)
    with pytest.raises(TypeError, match="list of texts"):
        ask(url, choices="ab")
    with pytest.raises(TypeError, match="no option tempo"):
        ask(url, tempo=3)
    with pytest.raises(ValueError, match="UTF-8"):
        ask(url, question="\ud800")


def test_events_are_typed_and_their_deltas_are_the_reply(live: Live) -> None:
    texts: dict[str, str] = {}
    names: list[str] = []
    with hyper.Client(live.url) as client, client.ask(CLIP, QUESTION, stream=True) as events:
        with pytest.raises(hyper.UnexpectedReplyError, match="before its last event"):
            _ = events.reply
        answer = ""
        for event in events:
            names.append(event.name)
            match event:
                case hyper.SectionDelta(section, text):
                    texts[section] = texts.get(section, "") + text
                case hyper.AnswerDelta(text):
                    answer += text
                case _:
                    pass
    assert names[0] == "section.start" and names[-3:] == ["answer.done", "usage", "done"]
    reply = events.reply
    assert reply.reasoning is not None and texts["REASONING"] == reply.reasoning.reasoning
    assert answer == reply.answer.text


def test_a_pause_is_an_event(live: Live) -> None:
    with hyper.Client(live.url) as client:
        events = list(client.ask(tone(2.0, amplitude=0.0), QUESTION, stream=True))
        assert hyper.Pause("REASONING", 64) in events
        assert hyper.Pause("REASONING", 64) not in list(
            client.ask(tone(2.0, amplitude=0.0), QUESTION, stream=True, pause="off")
        )


def test_leaving_a_stream_stops_the_answer(slow: Live) -> None:
    with hyper.Client(slow.url) as client, client.ask(CLIP, QUESTION, stream=True) as events:
        assert isinstance(next(events), hyper.SectionStart)
    slow.wait_until_idle()

    async def main() -> None:
        async with hyper.AsyncClient(slow.url) as client, await client.ask(CLIP, QUESTION, stream=True) as events:
            assert isinstance(await anext(events), hyper.SectionStart)

    asyncio.run(main())
    slow.wait_until_idle()


def test_info_is_that_of_the_service(live: Live) -> None:
    with hyper.Client(live.url + "/") as client:
        info = client.info()
    assert info == InfoReply.model_validate(live.client.get("/v1/info").json())

    async def main() -> InfoReply:
        async with hyper.AsyncClient(live.url) as client:
            return await client.info()

    assert asyncio.run(main()) == info


def test_the_options_are_the_fields_of_the_api() -> None:
    fields = {*AskOptions.__annotations__} - {"priority", "request_id"}
    assert fields | {"question", "questions", "choices", "stream"} == set(QaOptions.model_fields)


def test_a_stored_file_is_asked_about_by_its_id(live: Live) -> None:
    with hyper.Client(live.url) as client:
        stored = client.files.create(CLIP, lifetime_s=3600)
        assert (stored.filename, stored.expires_at - stored.created_at) == (CLIP.name, 3600)
        assert client.files.retrieve(stored.id) == stored
        assert client.files.content(stored.id) == CLIP.read_bytes()
        assert client.files.list(limit=1).data == [stored]
        assert client.ask(file_id=stored.id, question=QUESTION).answer == client.ask(CLIP, QUESTION).answer
        with client.ask(file_id=stored.id, question=QUESTION, stream=True) as events:
            assert events.until_done().answer.text
        assert client.files.delete(stored.id).deleted
        for attempt in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(hyper.UnknownFileError):
                attempt(stored.id)
        with pytest.raises(hyper.NotFoundError):
            client.files.retrieve("../info")
        with pytest.raises(hyper.UnsupportedAudioError):
            client.files.create(b"no sound at all, only text " * 9)

    async def main() -> None:
        async with hyper.AsyncClient(live.url) as client:
            stored = await client.files.create(CLIP.read_bytes(), filename="a.mp3")
            assert await client.files.retrieve(stored.id) == stored and stored.filename == "a.mp3"
            assert await client.files.content(stored.id) == CLIP.read_bytes()
            assert stored.id in [file.id for file in (await client.files.list()).data]
            assert (await client.ask(file_id=stored.id, question=QUESTION)).answer.text
            assert (await client.files.delete(stored.id)).deleted

    asyncio.run(main())


def test_several_questions_have_a_reply_each(live: Live) -> None:
    questions: list[Any] = [QUESTION, {"question": "How long?", "choices": ["short", "long"]}]
    with hyper.Client(live.url) as client:
        found = client.ask(CLIP, questions=questions)
        assert found.data[0].answer == client.ask(CLIP, QUESTION).answer
        assert found.data[1].answer == client.ask(CLIP, "How long?", choices=["short", "long"]).answer

    async def main() -> hyper.QaListReply:
        async with hyper.AsyncClient(live.url) as client:
            return await client.ask(CLIP, questions=questions)

    assert [each.answer for each in asyncio.run(main()).data] == [each.answer for each in found.data]


def stream_questions(url: str, questions: list[Any], *, is_async: bool) -> tuple[list[hyper.ListEvent], Any]:
    """Return the events of several questions, and their replies."""

    async def main() -> tuple[list[hyper.ListEvent], Any]:
        async with (
            hyper.AsyncClient(url) as client,
            await client.ask(CLIP, questions=questions, stream=True) as events,
        ):
            return [each async for each in events], events.reply

    if is_async:
        return asyncio.run(main())
    with hyper.Client(url) as client, client.ask(CLIP, questions=questions, stream=True) as events:
        return list(events), events.reply


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_the_events_of_several_questions_have_the_place_of_their_question(live: Live, is_async: bool) -> None:
    events, replies = stream_questions(live.url, [QUESTION, "How long?"], is_async=is_async)
    assert isinstance(replies, hyper.QaListReply) and events[-1] == hyper.ListDone(replies)
    for index, reply in enumerate(replies.data):
        own = [each.event for each in events if isinstance(each, hyper.QuestionEvent) and each.index == index]
        assert hyper.AnswerDone(reply.answer) in own and hyper.UsageReport(reply.usage) in own
        texts = [each.text for each in own if isinstance(each, hyper.AnswerDelta)]
        assert "".join(texts) == reply.answer.text
    with hyper.Client(live.url) as client:
        assert client.ask(CLIP, questions=["Who?"], stream=True).until_done().data[0].answer.text


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_stream_of_several_questions_needs_places_and_an_end(is_async: bool) -> None:
    delta = {"text": "a"}
    for event in (
        ("answer.delta", delta),
        ("answer.delta", [delta]),
        ("done", {}),
        ("answer.delta", {"index": 0, **delta}),
    ):
        with replying(stream_of(("news", {}), event)) as sent, pytest.raises(hyper.UnexpectedReplyError):
            stream_questions(sent.url, ["Who?"], is_async=is_async)
    error = ("error", json.loads(error_reply(503, "overloaded").body or b""))
    with replying(stream_of(error)) as sent, pytest.raises(hyper.OverloadedError):
        stream_questions(sent.url, ["Who?"], is_async=is_async)


@pytest.mark.parametrize(
    "arguments",
    [
        {"question": "Who?"},
        {"clip": CLIP},
        {"clip": CLIP, "file_id": "file-1", "question": "Who?"},
        {"clip": CLIP, "question": "Who?", "questions": ["Who?"]},
        {"clip": CLIP, "questions": "Who?"},
    ],
)
def test_a_call_without_one_clip_and_one_kind_of_question_is_refused(arguments: dict[str, Any]) -> None:
    with hyper.Client("http://127.0.0.1:9") as client, pytest.raises(TypeError):
        client.ask(**arguments)


def test_options_and_headers_arrive(live: Live, ask: Callable[..., QaReply]) -> None:
    reply = ask(live.url, reasoning="answer", max_tokens=500, temperature=0.5, seed=3, timeout_ms=20_000, pause=1)
    assert reply.perception is None and reply.pause.budget == 1
    with replying(Canned(b"{}")) as sent, pytest.raises(hyper.UnexpectedReplyError):
        ask(sent.url, priority="batch", request_id="mine", client={"api_key": "hyp_x"})
    (headers,) = sent.headers
    assert headers["x-hyper-clip"] == hashlib.sha256(CLIP.read_bytes()).hexdigest()
    assert (headers["x-hyper-priority"], headers["x-request-id"]) == ("batch", "mine")
    assert headers["authorization"] == "Bearer hyp_x"
    assert b'name="priority"' not in sent.bodies[0] and CLIP.read_bytes() in sent.bodies[0]


def test_an_unknown_priority_is_refused_by_the_service(live: Live, ask: Callable[..., QaReply]) -> None:
    with pytest.raises(hyper.InvalidParameterError) as caught:
        ask(live.url, priority="first")
    assert caught.value.param == "x-hyper-priority"


def test_the_service_s_refusals_are_exceptions(live: Live, ask: Callable[..., QaReply]) -> None:
    with pytest.raises(hyper.UnsupportedAudioError) as caught:
        ask(live.url, b"no audio", stream=True)
    error = caught.value
    assert (error.status, error.code, error.param, error.retryable) == (415, "unsupported_audio", "file", False)
    assert error.hint is not None and error.hint in str(error) and error.request_id.startswith("req_")
    with pytest.raises(hyper.InvalidAudioError) as caught_empty:
        ask(live.url, b"")
    assert caught_empty.value.code == "empty_audio" and isinstance(caught_empty.value, hyper.AudioError)
    with pytest.raises(hyper.AudioTooLongError) as caught_long:
        ask(live.url, tone(31.0))
    assert caught_long.value.limit == 30
    with pytest.raises(hyper.InvalidPromptError):
        ask(live.url, choices=["only one"])


def test_a_deadline_carries_the_trace_so_far_and_is_not_retried(slow: Live, ask: Callable[..., QaReply]) -> None:
    before = slow.metric("hyper_rejected_total", code="504")
    with pytest.raises(hyper.DeadlineExceededError) as caught:
        ask(slow.url, timeout_ms=700)
    assert caught.value.partial is not None and "<PLANNING>" in caught.value.partial["trace"]["raw"]
    assert slow.metric("hyper_rejected_total", code="504") == before + 1
    # In a stream the error is an event.
    with pytest.raises(hyper.DeadlineExceededError) as caught:
        ask(slow.url, timeout_ms=700, stream=True)
    assert caught.value.status is None


def test_a_key_comes_from_the_argument_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[..., QaReply]
) -> None:
    path = tmp_path / "keys.json"
    secret = api_keys.add(path, name="anna", scopes=("ask",), expires=None, requests_per_minute=600)
    with running(scripted(key_file=path)) as service:
        with pytest.raises(hyper.InvalidApiKeyError):
            ask(service.url)
        assert ask(service.url, client={"api_key": secret}).answer.text
        monkeypatch.setenv("HYPER_API_KEY", secret)
        monkeypatch.setenv("HYPER_URL", service.url)
        assert ask(None).answer.text
        assert secret not in repr(hyper.Client()._options)


@pytest.mark.parametrize(
    "reply",
    [
        error_reply(503, "overloaded", retryable=True, retry_after="0"),
        error_reply(500, "internal_error", retryable=True),
        Canned(None),
    ],
    ids=["retry-after", "backoff", "lost"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_retryable_failure_is_retried(ask: Callable[..., QaReply], live: Live, reply: Canned, stream: bool) -> None:
    plain = live.ask(CLIP.read_bytes())
    answer = stream_of(("done", plain.json())) if stream else Canned(plain.content)
    with replying(reply, answer) as sent:
        assert ask(sent.url, stream=stream).answer.text == "9.6 s of loud sound"
    # The whole clip is sent again.
    assert len(sent.bodies) == 2 and all(CLIP.read_bytes() in body for body in sent.bodies)


@pytest.mark.parametrize(
    "reply",
    [
        error_reply(503, "overloaded", retryable=True, retry_after="31"),
        error_reply(503, "overloaded", retryable=True, x_should_retry="false"),
        error_reply(503, "overloaded", retryable=False),
        error_reply(504, "deadline_exceeded", retryable=True),
        Canned(b"<html>bad gateway</html>", 502),
    ],
    ids=["too late", "told not to", "not retryable", "deadline", "proxy"],
)
def test_other_failures_are_not_retried(ask: Callable[..., QaReply], reply: Canned) -> None:
    with replying(reply) as sent, pytest.raises(hyper.Error):
        ask(sent.url)


def test_retries_end(ask: Callable[..., QaReply]) -> None:
    busy = error_reply(503, "overloaded", retryable=True, retry_after="0")
    with replying(busy, busy, busy) as sent, pytest.raises(hyper.OverloadedError) as caught:
        ask(sent.url)
    assert caught.value.retry_after_s == 0
    with replying(busy) as sent, pytest.raises(hyper.OverloadedError):
        ask(sent.url, client={"max_retries": 0})


def test_a_service_of_another_kind_is_reported(ask: Callable[..., QaReply]) -> None:
    for body in (b"", b"[]", b"{}", b"<html>", b"\xff\xfe", b"[" * 100_000):
        with replying(Canned(body)) as sent, pytest.raises(hyper.UnexpectedReplyError, match="hyper serve"):
            ask(sent.url)
    for reply in (stream_of(), stream_of(("section.start", {"section": "ENV"})), Canned(b"{}")):
        with replying(reply) as sent, pytest.raises(hyper.UnexpectedReplyError):
            ask(sent.url, stream=True)
    with replying(stream_of(("section.delta", {"section": "ENV"}))) as sent, pytest.raises(hyper.UnexpectedReplyError):
        ask(sent.url, stream=True)


def test_newer_services_are_understood(live: Live, ask: Callable[..., QaReply]) -> None:
    reply = live.ask(CLIP.read_bytes()).json()
    newer = {**reply, "echoes": [{"index": 0}], "usage": {**reply["usage"], "joules": 3}}
    events = (("echo.done", {"index": 0}), ("answer.delta", {"text": "a\u2028b\x85c"}), ("done", newer))
    for stream, answer in ((False, stream_of(("done", newer))), (True, stream_of(*events))):
        canned = answer if stream else Canned(httpx.Response(200, json=newer).content)
        with replying(canned) as sent:
            found = ask(sent.url, stream=stream)
        assert found.model_extra == {"echoes": [{"index": 0}]} and found.usage.model_extra == {"joules": 3}
        assert dump(found) == newer
    with replying(stream_of(*events)) as sent, hyper.Client(sent.url) as client:
        assert hyper.AnswerDelta("a\u2028b\x85c") in list(client.ask(CLIP, QUESTION, stream=True))


def test_a_silent_service_ends_the_wait(slow: Live, ask: Callable[..., QaReply]) -> None:
    with pytest.raises(hyper.ReplyTimeoutError, match="timeout_s"):
        ask(slow.url, client={"timeout_s": 0.2})
    slow.wait_until_idle()


def test_no_service_is_a_connection_error(ask: Callable[..., QaReply]) -> None:
    with pytest.raises(hyper.ConnectionFailedError, match="hyper serve"):
        ask("http://127.0.0.1:9", client={"max_retries": 0})


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://x", "http://", "http://[", "http://x:70000", "http://x\0y"])
def test_an_invalid_address_is_named(ask: Callable[..., QaReply], url: str) -> None:
    with pytest.raises(ValueError, match="not a valid address"):
        ask(url)


@pytest.mark.parametrize("proxy", ["socks5://user:word@127.0.0.1:9", "http://user:word@127.0.0.1:9", "nonsense://x"])
@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTP_PROXY"])
def test_proxies_are_bypassed_for_this_machine_and_named_elsewhere(
    live: Live, ask: Callable[..., QaReply], monkeypatch: pytest.MonkeyPatch, proxy: str, variable: str
) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "NO_PROXY", "all_proxy", "http_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, proxy)
    assert ask(live.url).answer.text
    with pytest.raises(hyper.ConnectionFailedError, match="proxy") as caught:
        ask("http://service.example", client={"max_retries": 0})
    assert proxy.rpartition("@")[2] in str(caught.value) and "word" not in str(caught.value)


def test_the_client_loads_neither_the_service_nor_an_engine() -> None:
    code = (
        "import sys, hyper; light = sorted(set(sys.modules) & {'httpx', 'pydantic'}); hyper.AsyncClient;"
        "heavy = {'fastapi', 'starlette', 'uvicorn', 'numpy', 'av', 'torch', 'transformers', 'vllm'};"
        "print(light, sorted(heavy & set(sys.modules)), hasattr(hyper, 'Clients'), 'Client' in dir(hyper))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] [] False True"
