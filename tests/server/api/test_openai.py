"""The official `openai` client, unchanged, against the real service."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

from hyper_model.audio import SAMPLE_RATE_HZ
from server.api.transcriptions import Segment, srt, vtt
from tests.paths import CLIPS
from tests.serving import Live, wav

CLIP = CLIPS / "one-voice.mp3"
FORMATS = ["json", "text", "verbose_json", "srt", "vtt", "diarized_json"]


@pytest.fixture(scope="session")
def client(live: Live) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def messages(question: str = "What is said?", **more: Any) -> list[Any]:
    data = base64.b64encode(CLIP.read_bytes()).decode()
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}
    return [{"role": "user", "content": [audio, {"type": "text", "text": question}]}]


def test_a_chat_completion_holds_answer_trace_and_the_typed_reply(client: OpenAI) -> None:
    completion = client.chat.completions.create(model="hyper", messages=messages())
    message: Any = completion.choices[0].message
    hyper: Any = completion.model_extra["hyper"] if completion.model_extra else {}
    assert completion.choices[0].finish_reason == "stop"
    assert message.content == hyper["answer"]["text"]
    assert message.reasoning == message.reasoning_content and "SUMMARY: " in message.reasoning
    assert completion.usage and completion.usage.prompt_tokens_details
    assert completion.usage.total_tokens == hyper["usage"]["total_tokens"]
    assert completion.usage.prompt_tokens_details.audio_tokens == hyper["usage"]["audio_tokens"]


def test_a_streamed_completion_says_the_same(client: OpenAI) -> None:
    whole: Any = client.chat.completions.create(model="hyper", messages=messages())
    stream = client.chat.completions.create(
        model="hyper", messages=messages(), stream=True, stream_options={"include_usage": True}
    )
    chunks: list[Any] = list(stream)
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == whole.choices[0].message.reasoning
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_log_probabilities_cover_the_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="hyper", messages=messages(), logprobs=True, top_logprobs=0)
    found = whole.choices[0].logprobs
    assert found and found.content and found.refusal is None
    text = b"".join(bytes(token.bytes or ()) for token in found.content).decode()
    assert text == whole.choices[0].message.content
    # The script is certain of each token.
    assert {(token.logprob, len(token.top_logprobs)) for token in found.content} == {(0.0, 0)}
    assert all(token.token == bytes(token.bytes or ()).decode(errors="replace") for token in found.content)

    stream = client.chat.completions.create(model="hyper", messages=messages(), logprobs=True, stream=True)
    chunks = [chunk.choices[0] for chunk in stream]
    for chunk in chunks:
        assert (chunk.logprobs is not None) == bool(chunk.delta.content)
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content or ()]
    assert streamed == found.content


@pytest.mark.parametrize("fields", [{}, {"logprobs": False}, {"top_logprobs": 0}])
def test_log_probabilities_come_on_request_alone(client: OpenAI, fields: dict[str, Any]) -> None:
    completion = client.chat.completions.create(model="hyper", messages=messages(), extra_body=fields)
    assert completion.choices[0].logprobs is None


def test_the_log_probability_of_a_choice_is_that_of_its_score(client: OpenAI) -> None:
    completion: Any = client.chat.completions.create(
        model="hyper", messages=messages(), logprobs=True, extra_body={"hyper": {"choices": ["one", "zwölf"]}}
    )
    answer = completion.hyper["answer"]
    (token,) = completion.choices[0].logprobs.content
    assert token.token == bytes(token.bytes).decode() == answer["choice"]
    assert math.exp(token.logprob) == pytest.approx(answer["confidence"], abs=1e-3)


def test_the_answer_about_a_recording_has_no_log_probabilities(client: OpenAI) -> None:
    data = base64.b64encode(wav(np.zeros(40 * SAMPLE_RATE_HZ))).decode()
    turns = messages()
    turns[0]["content"][0]["input_audio"] = {"data": data, "format": "wav"}
    completion: Any = client.chat.completions.create(
        model="hyper", messages=turns, logprobs=True, extra_body={"hyper": {"long_audio": "chunk"}}
    )
    assert completion.choices[0].logprobs is None
    assert "no_logprobs" in {warning["code"] for warning in completion.hyper["warnings"]}


def test_choices_are_scored(client: OpenAI) -> None:
    completion: Any = client.chat.completions.create(
        model="hyper", messages=messages(), extra_body={"hyper": {"choices": ["one", "two", "three"]}}
    )
    answer = completion.hyper["answer"]
    assert answer["choice"] == completion.choices[0].message.content and len(answer["scores"]) == 3


def test_texts_without_effect_are_named(client: OpenAI) -> None:
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    turns: list[Any] = [*before, {"role": "assistant", "content": "Hi"}, *messages()]
    completion: Any = client.chat.completions.create(model="hyper", messages=turns)
    codes = {warning["code"] for warning in completion.hyper["warnings"]}
    assert {"system_message_ignored", "earlier_turns_ignored"} <= codes


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}}, "modalities"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 1.5}, "frequency_penalty"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 10**6}, "max_tokens"),
    ],
)
def test_a_parameter_that_changes_the_meaning_is_refused_by_name(
    client: OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="hyper", messages=messages(), extra_body=fields)
    assert caught.value.param == param


def test_harmless_parameters_are_accepted(client: OpenAI) -> None:
    completion = client.chat.completions.create(
        model="hyper",
        messages=messages(),
        n=1,
        user="somebody",
        metadata={"a": "b"},
        store=False,
        reasoning_effort="low",
        modalities=["text"],
        max_completion_tokens=200,
        response_format={"type": "text"},
        top_p=1,
    )
    assert completion.choices[0].message.content


def remote(url: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": url}}]}]


@pytest.mark.parametrize(
    ("turns", "param"),
    [
        ([{"role": "user", "content": "What is said?"}], "messages"),
        ([*messages(), *messages()], "messages"),
        ([*messages(), {"role": "assistant", "content": "Hm"}], "messages"),
        (messages(" "), "messages"),
        (remote("https://example.org/a.wav"), "messages.content.audio_url.url"),
        (remote("data:audio/wav,abc"), "messages.content.audio_url.url"),
    ],
)
def test_a_conversation_without_one_clip_and_one_question_is_refused(
    client: OpenAI, turns: list[Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="hyper", messages=turns)
    assert caught.value.param == param


def test_a_data_url_is_a_clip(client: OpenAI) -> None:
    url = f"data:audio/mpeg;base64,{base64.b64encode(CLIP.read_bytes()).decode()}"
    turns = remote(url)
    turns[0]["content"].append({"type": "text", "text": "What is said?"})
    assert client.chat.completions.create(model="hyper", messages=turns).choices


def test_models_are_listed_and_an_unknown_one_is_not_found(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert "hyper" in names
    assert client.models.retrieve("hyper").id == "hyper"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=messages())
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("response_format", FORMATS)
def test_a_clip_without_words_is_transcribed_as_nothing_in_every_format(client: OpenAI, response_format: Any) -> None:
    # The scripted engine measures clips and transcribes none.
    found: Any = client.audio.transcriptions.create(model="hyper", file=CLIP, response_format=response_format)
    match response_format:
        case "text" | "srt" | "vtt":
            assert found.strip() == ("WEBVTT" if response_format == "vtt" else "")
        case "verbose_json" | "diarized_json":
            assert found.text == "" and found.segments == [] and found.duration > 9
        case _:
            assert found.text == ""


def test_segments_are_the_granularity_of_a_transcript(client: OpenAI) -> None:
    found: Any = client.audio.transcriptions.create(
        model="hyper", file=CLIP, response_format="verbose_json", timestamp_granularities=["segment"]
    )
    assert found.segments == []


def test_words_stand_in_one_cue_of_the_window() -> None:
    assert srt([Segment(0.0, 9.6444, "a < b")]) == "1\n00:00:00,000 --> 00:00:09,644\na < b\n\n"
    assert vtt([Segment(0.0, 3661.5, "a < b")]) == "WEBVTT\n\n00:00:00.000 --> 01:01:01.500\na &lt; b\n\n"


def test_a_transcript_is_streamed(client: OpenAI) -> None:
    events: list[Any] = list(client.audio.transcriptions.create(model="hyper", file=CLIP, stream=True))
    assert events[-1].type == "transcript.text.done"
    assert "".join(event.delta for event in events[:-1]) == events[-1].text


@pytest.mark.parametrize(
    "fields",
    [
        {"timestamp_granularities": ["word"]},
        {"prompt": "names"},
        {"language": "de"},
        {"response_format": "verbose_json", "stream": True},
        {"response_format": "xml"},
    ],
)
def test_a_transcription_that_cannot_be_made_is_refused(client: OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(model="hyper", file=CLIP, **fields)
    assert caught.value.param or caught.value.code == "unknown_parameter"


def test_a_deadline_forbids_the_client_a_retry(live: Live) -> None:
    body = {"model": "hyper", "messages": messages(), "hyper": {"timeout_ms": 1}}
    response = httpx.post(f"{live.url}/v1/chat/completions", json=body)
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
