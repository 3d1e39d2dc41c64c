"""Several questions about one clip: one reply each, in order, with the clip decoded once."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from server import api_keys as keys
from server.api.qa_list import MAX_PARALLEL
from server.engines.protocol import GenerationRequest, ScriptedEngine, TokenChunk
from server.engines.scripted import scripted_checkpoint
from tests.serving import (
    Live,
    assert_error,
    json_question,
    parse_events,
    post_json,
    running,
    scripted,
    slow_down,
    tone,
    wav,
)

QUESTIONS: list[Any] = ["What is heard?", {"question": "How long is it?", "choices": ["short", "long"]}, "Is it loud?"]


class CountingEngine(ScriptedEngine):
    """Scripted engine that keeps its requests, and the largest number in flight."""

    def __init__(self) -> None:
        super().__init__(scripted_checkpoint().tokenizer)
        self.requests: list[GenerationRequest] = []
        self.most_in_flight = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Keep the request, and answer it."""
        self.requests.append(request)
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
                yield chunk


@pytest.fixture(scope="module")
def counting() -> Iterator[tuple[Live, CountingEngine]]:
    """Service over a counting engine, for up to six questions."""
    engine = CountingEngine()
    with running(scripted(max_questions=6, ping_interval_s=0.5), engine) as service:
        yield service, engine


def ask(service: Live, questions: list[Any], **fields: Any) -> httpx.Response:
    """Post questions as JSON."""
    body = {name: value for name, value in json_question(**fields).items() if name != "question"}
    return post_json(service, body | {"questions": questions})


def test_each_question_has_the_reply_that_it_would_get_alone(counting: tuple[Live, CountingEngine]) -> None:
    service, engine = counting
    engine.requests.clear()
    num_decoded = service.metric("hyper_audio_duration_seconds_count")
    reply = ask(service, QUESTIONS)
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert service.metric("hyper_audio_duration_seconds_count") == num_decoded + 1
    assert len({request.clip_keys for request in engine.requests}) == 1
    assert body["object"] == "audio.qa.list" and len(body["data"]) == 3
    alone = [service.ask(question=QUESTIONS[0]), service.ask(**QUESTIONS[1]), service.ask(question=QUESTIONS[2])]
    for together, single in zip(body["data"], (each.json() for each in alone), strict=True):
        for name in ("answer", "perception", "reasoning", "trace", "audio", "usage", "object", "model"):
            assert together[name] == single[name]
    assert len({each["id"] for each in body["data"]}) == 3
    total = sum(each["usage"]["total_tokens"] for each in body["data"])
    assert body["usage"]["total_tokens"] == total


def test_a_form_takes_texts_and_objects(counting: tuple[Live, CountingEngine]) -> None:
    service, _ = counting
    sent = [item if isinstance(item, str) else json.dumps(item) for item in QUESTIONS]
    for name in ("questions", "questions[]"):
        reply = service.client.post("/v1/audio/qa", data={name: sent}, files={"file": ("a", tone())})
        assert [each["answer"]["choice"] is None for each in reply.json()["data"]] == [True, False, True]


def test_the_events_of_a_stream_carry_the_index_of_their_question(counting: tuple[Live, CountingEngine]) -> None:
    service, _ = counting
    whole = ask(service, QUESTIONS).json()
    events = parse_events(ask(service, QUESTIONS, stream=True).text)
    assert events[-1][0] == "done" and [name for name, _ in events].count("done") == 1
    for index, reply in enumerate(whole["data"]):
        own = [(name, data) for name, data in events[:-1] if data["index"] == index]
        deltas = [data["text"] for name, data in own if name == "answer.delta"]
        assert "".join(deltas) == reply["answer"]["text"]
        assert [name for name, _ in own][-2:] == ["answer.done", "usage"]
        assert own[-2][1] == {"index": index, **reply["answer"]}
        assert own[-1][1] == {"index": index, **reply["usage"]}
        assert events[-1][1]["data"][index]["answer"] == reply["answer"]


def test_one_request_takes_few_places_of_the_engine(counting: tuple[Live, CountingEngine]) -> None:
    service, engine = counting
    engine.most_in_flight = 0
    reply = ask(service, [f"Question {number}?" for number in range(6)])
    assert len(reply.json()["data"]) == 6 and 1 < engine.most_in_flight <= MAX_PARALLEL


def test_bad_questions_are_refused_by_name(counting: tuple[Live, CountingEngine]) -> None:
    service, _ = counting
    error = assert_error(ask(service, ["What?"] * 7), 400, "invalid_parameter", "questions")
    assert (error["limit"], error["actual"]) == (6, 7)
    error = assert_error(ask(service, ["What?", " "]), 400, "invalid_prompt", "questions")
    assert error["message"].startswith("questions[1]: ")
    one_choice = [{"question": "What?", "choices": ["only"]}]
    assert_error(ask(service, one_choice), 400, "invalid_prompt", "questions")
    assert_error(ask(service, []), 400, "missing_parameter", "question")
    assert_error(ask(service, [1]), 400, "invalid_parameter", "questions")
    assert_error(ask(service, [{"choices": ["a", "b"]}]), 400, "missing_parameter", "questions.question")
    assert_error(ask(service, [{"question": "What?", "choices": 1}]), 400, "invalid_parameter", "questions.choices")
    unknown = [{"question": "What?", "stream": True}]
    assert_error(ask(service, unknown), 400, "unknown_parameter", "questions.0.stream")
    assert_error(ask(service, ["What?"], choices=["a", "b"]), 400, "invalid_parameter", "choices")
    assert_error(post_json(service, json_question(questions=["What?"])), 400, "invalid_parameter", "question")
    assert_error(post_json(service, json_question(questions="What?")), 400, "invalid_parameter", "questions")
    for text in ("{", "{" * 60_000, '{"question": NaN}', "{}"):
        reply = service.client.post("/v1/audio/qa", data={"questions": [text]}, files={"file": ("a", tone())})
        assert reply.status_code == 400 and reply.json()["error"]["param"].startswith("questions")
    assert_error(ask(service, ["What?"], max_tokens=3000, temperature=9), 400, "invalid_parameter", "temperature")


def test_each_question_counts_as_a_request_of_its_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, name="anna", requests_per_minute=5, audio_s_per_day=10)
    with running(scripted(key_file=path)) as service:
        service.client.headers["authorization"] = f"Bearer {key}"
        assert ask(service, QUESTIONS).status_code == 200
        error = assert_error(ask(service, QUESTIONS), 429, "rate_limit_exceeded")
        assert error["limit"] == 5
        assert_error(ask(service, ["What?"] * 6), 429, "rate_limit_exceeded")
        tenant = service.service.quotas.tenants["anna"]
        # The clip is decoded once, and its seconds count once.
        assert tenant.audio is not None and tenant.audio.level == pytest.approx(9.0, abs=0.2)


def test_a_deadline_keeps_the_answers_that_are_complete() -> None:
    with running(scripted(ping_interval_s=0.5)) as service:
        slow_down(service, 0.02)
        reply = ask(service, ["What?"] * 5, timeout_ms=1000)
        assert reply.status_code == 504
        assert reply.json()["partial"]["answers"] == []
        assert reply.json()["partial"]["trace"]["raw"]
        service.wait_until_idle()


def call() -> bytes:
    """Write a stereo clip: a second of tone on the left, then a quieter one on the right."""
    times_S = np.arange(16_000) / 16_000
    tone_S, silence_S = 0.5 * np.sin(2765 * times_S), np.zeros(16_000)
    channels_SC = np.stack([np.concatenate([tone_S, silence_S]), np.concatenate([silence_S, 0.1 * tone_S])], axis=1)
    return wav(channels_SC)


def test_each_channel_is_asked_apart(live: Live) -> None:
    reply = live.ask(call(), channel="each")
    assert reply.status_code == 200, reply.text
    body = reply.json()
    assert body["object"] == "audio.qa.list" and len(body["data"]) == 2
    assert [each["audio"][0]["channel"] for each in body["data"]] == ["left", "right"]
    for channel, each in zip(("left", "right"), body["data"], strict=True):
        alone = live.ask(call(), channel=channel).json()
        assert (each["answer"], each["audio"]) == (alone["answer"], alone["audio"])
    answers = [each["answer"]["text"] for each in body["data"]]
    assert answers == ["1.3 s of loud sound", "1.3 s of quiet sound"]
    assert body["usage"]["total_tokens"] == sum(each["usage"]["total_tokens"] for each in body["data"])


def test_several_questions_are_asked_about_each_channel(live: Live) -> None:
    fields = json_question(audio={"data": base64.b64encode(call()).decode()}, channel="each")
    del fields["question"]
    body = post_json(live, fields | {"questions": ["Who?", "What?"]}).json()
    assert [each["audio"][0]["channel"] for each in body["data"]] == ["left", "left", "right", "right"]


def test_events_of_each_channel_name_it(live: Live) -> None:
    events = live.events(call(), channel="each")
    tagged = [(data["index"], data["channel"]) for name, data in events if name != "done"]
    assert set(tagged) == {(0, "left"), (1, "right")}
    done = next(data for name, data in events if name == "done")
    for index, each in enumerate(done["data"]):
        deltas = [data["text"] for name, data in events if name == "answer.delta" and data["index"] == index]
        assert "".join(deltas) == each["answer"]["text"]


@pytest.mark.parametrize("num_channels", [1, 3])
def test_each_channel_needs_two(live: Live, num_channels: int) -> None:
    data = wav(np.full((16_000, num_channels), 0.1))
    error = assert_error(live.ask(data, channel="each"), 400, "invalid_parameter", "channel")
    assert (error["limit"], error["actual"]) == (2, num_channels) and "two channels" in error["message"]


def test_both_channels_count_against_the_quotas_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, name="anna", audio_s_per_day=9)
    with running(scripted(key_file=path)) as service:
        service.client.headers["authorization"] = f"Bearer {key}"
        # Two channels of 2 s each.
        assert service.ask(call(), channel="each").status_code == 200
        assert service.ask(call(), channel="each").status_code == 200
        assert_error(service.ask(call(), channel="each"), 429, "audio_quota_exceeded")
