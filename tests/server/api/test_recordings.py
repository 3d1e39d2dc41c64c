"""Recordings longer than one window over HTTP: places, failures, progress, limits, and who finds what again."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from hyper_model.audio import SAMPLE_RATE_HZ
from server import api_keys as keys
from server.api.questions import Asked
from server.api.recordings import WindowDone, answer_recording, open_recording
from server.api.types import QaReply
from server.request_context import RequestContext
from tests.recording_engine import WORDS as TONES
from tests.recording_engine import ToneEngine, recording
from tests.serving import Live, assert_error, running, scripted, wait_for, wav

WORDS = [(4.0, "alpha"), (12.0, "bravo"), (33.0, "charlie"), (58.0, "alpha"), (80.0, "delta"), (83.0, "echo")]
SPEECH = wav(recording(95, WORDS))


@pytest.fixture(scope="module")
def engine() -> ToneEngine:
    return ToneEngine()


@pytest.fixture(scope="module")
def tones(engine: ToneEngine) -> Iterator[Live]:
    """Service over the engine that knows tones."""
    with running(scripted(max_queue_wait_s=1000, trim_silence=False), engine) as service:
        yield service


def chunk(live: Live, clip: bytes = SPEECH, **fields: Any) -> dict[str, Any]:
    reply = live.ask(clip, long_audio="chunk", **fields)
    assert reply.status_code == 200, reply.text
    return QaReply.model_validate_json(reply.text).model_dump(mode="json")


def test_each_word_is_found_in_the_window_that_holds_its_time(tones: Live) -> None:
    reply = chunk(tones, question="Which word is said?", choices=["bravo", "foxtrot"])
    timeline = reply["timeline"]
    assert reply["audio"][0]["windows"] == len(timeline) >= 4
    assert reply["audio"][0]["duration_s"] == reply["audio"][0]["used_s"] == 95
    assert timeline[0]["start_s"] == 0 and timeline[-1]["end_s"] == 95 and timeline[-1]["boundary"] == "end"
    for before, after in itertools.pairwise(timeline):
        assert before["end_s"] == after["start_s"] and before["boundary"] == "silence"
    for at_s, word in WORDS:
        (window,) = [each for each in timeline if each["start_s"] <= at_s < each["end_s"]]
        assert word in window["transcript"]
    assert (reply["answer"]["choice"], reply["answer"]["answered_by"]) == ("bravo", "windows")
    evidence = reply["answer"]["evidence"][0]
    assert evidence["start_s"] <= 12 < evidence["end_s"] and "bravo" in evidence["quote"]
    assert sum(reply["answer"]["scores"]) == pytest.approx(1)
    relistened = [each for each in timeline if each["relistened"]]
    assert 0 < len(relistened) <= 4 and timeline[evidence["window"]]["relistened"]
    assert reply["usage"]["total_tokens"] == sum(each["usage"]["total_tokens"] for each in timeline)


def test_silent_windows_are_not_asked(tones: Live, engine: ToneEngine) -> None:
    before = engine.num_asked
    reply = chunk(tones, wav(recording(120, [(2.0, "alpha"), (110.0, "bravo")])), question="What about bravo?")
    statuses = [each["status"] for each in reply["timeline"]]
    assert statuses[0] == statuses[-1] == "done" and statuses[1:-1] == ["silent"] * (len(statuses) - 2)
    relistened = sum(each["relistened"] for each in reply["timeline"])
    assert engine.num_asked - before == 2 + relistened
    assert reply["answer"]["text"] == "bravo"
    assert [each["text"] for each in reply["answer"]["runners_up"]] == ["alpha"]


def test_a_silent_recording_is_answered_with_a_warning(tones: Live) -> None:
    reply = chunk(tones, wav(np.zeros(100 * SAMPLE_RATE_HZ)), choices=["yes", "no"])
    assert {each["status"] for each in reply["timeline"]} == {"silent"}
    assert "silent_audio" in [warning["code"] for warning in reply["warnings"]]


def test_a_failed_window_in_the_middle_leaves_the_others(tones: Live, engine: ToneEngine) -> None:
    clip = wav(recording(95, [(4.0, "alpha"), (33.0, "charlie"), (83.0, "echo")], failing_s=40.0))
    reply = chunk(tones, clip, question="Which word is said?", choices=["echo", "foxtrot"])
    failed = [each for each in reply["timeline"] if each["status"] == "failed"]
    assert len(failed) == 1 and failed[0]["start_s"] <= 40 < failed[0]["end_s"]
    assert failed[0]["error"] == "internal_error" and failed[0]["transcript"] is None
    assert reply["answer"]["choice"] == "echo"
    (warning,) = [each for each in reply["warnings"] if each["code"] == "windows_failed"]
    assert warning["message"].startswith("1 of")
    assert reply["audio"][0]["used_s"] == pytest.approx(95 - failed[0]["end_s"] + failed[0]["start_s"])
    # A second question asks the failed window alone, and the best ones.
    before = engine.num_asked
    again = chunk(tones, clip, question="Which word is said?", choices=["echo", "foxtrot"])
    assert engine.num_asked - before == 1 + sum(each["relistened"] for each in again["timeline"])


def test_a_recording_whose_windows_all_fail_is_an_error(tones: Live) -> None:
    samples_S = recording(50, [])
    for at_s in (5.0, 45.0):
        samples_S += recording(50, [], failing_s=at_s)
    assert_error(tones.ask(wav(samples_S), long_audio="chunk"), 500, "internal_error")


def test_damage_in_the_middle_is_named_and_the_rest_stands(tones: Live) -> None:
    file = io.BytesIO()
    soundfile.write(file, recording(70, [(4.0, "alpha"), (60.0, "bravo")]), SAMPLE_RATE_HZ, format="MP3")
    data = bytearray(file.getvalue())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    reply = chunk(tones, bytes(data), question="Which word is said?", choices=["bravo", "foxtrot"])
    assert reply["answer"]["choice"] == "bravo"
    assert {warning["code"] for warning in reply["audio"][0]["warnings"]} & {"damage_skipped", "audio_missing"}
    # A container with checksums is refused.
    file = io.BytesIO()
    soundfile.write(file, recording(70, [(4.0, "alpha")]), SAMPLE_RATE_HZ, format="FLAC")
    data = bytearray(file.getvalue())
    data[len(data) // 2] ^= 0xFF
    data[len(data) // 2 + 1] ^= 0xFF
    assert_error(tones.ask(bytes(data), long_audio="chunk"), 400, "damaged_audio", "file")


def test_count_order_and_duration_come_from_the_timeline_by_code(tones: Live) -> None:
    counted = chunk(tones, question='How often is the word "alpha" said?', choices=["one", "two", "three"])
    assert (counted["answer"]["choice"], counted["answer"]["answered_by"]) == ("two", "timeline")
    assert "answered_from_timeline" in [warning["code"] for warning in counted["warnings"]]
    assert counted["perception"] is None and counted["trace"] is None
    times = [4.0, 58.0]
    assert [
        any(each["start_s"] <= at_s < each["end_s"] for each in counted["answer"]["evidence"]) for at_s in times
    ] == [True, True]
    order = ["delta, then bravo, then charlie", "bravo, then charlie, then delta", "charlie, bravo, delta"]
    reply = chunk(tones, question="In what order are the words said?", choices=order)
    assert reply["answer"]["choice_index"] == 1
    assert chunk(tones, question="Which word is said first?", choices=["charlie", "bravo"])["answer"]["text"] == "bravo"
    assert chunk(tones, question="Which word is said last?", choices=["alpha", "delta"])["answer"]["text"] == "delta"
    before = chunk(tones, question='Is "delta" said before "bravo"?', choices=["yes", "no"])
    assert (before["answer"]["text"], before["answer"]["answered_by"]) == ("no", "timeline")
    assert chunk(tones, question="How long is the recording?")["answer"]["text"] == "95 s"
    # Without the words in the timeline, the model answers.
    unknown = chunk(tones, question="Which word is said first?", choices=["foxtrot", "golf"])
    assert unknown["answer"]["answered_by"] == "windows"


def test_a_second_question_asks_no_window_again_and_another_caller_finds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    secrets = {name: keys.add(path, name=name) for name in ("anna", "ben")}
    engine = ToneEngine()

    def ask(live: Live, name: str, question: str) -> dict[str, Any]:
        fields = {"question": question, "choices": ["bravo", "foxtrot"], "long_audio": "chunk"}
        headers = {"authorization": f"Bearer {secrets[name]}"}
        reply = live.client.post("/v1/audio/qa", data=fields, files={"file": ("clip", SPEECH)}, headers=headers)
        assert reply.status_code == 200, reply.text
        return reply.json()

    with running(scripted(key_file=path, max_queue_wait_s=1000), engine) as live:
        num_warm_up = engine.num_asked
        first, num_first = ask(live, "anna", "Which word is said?"), engine.num_asked
        second, num_second = ask(live, "anna", "Which of the words is heard?"), engine.num_asked
        num_windows = first["audio"][0]["windows"]
        relistened = sum(each["relistened"] for each in second["timeline"])
        assert num_second - num_first == relistened < num_windows + relistened == num_first - num_warm_up
        assert first["recording"] == second["recording"]
        other = ask(live, "ben", "Which word is said?")
        assert engine.num_asked - num_second == num_windows + relistened
        assert other["recording"] != first["recording"]


def test_perceptions_are_dropped_after_their_time_and_beyond_their_size() -> None:
    engine = ToneEngine()
    with running(scripted(recording_cache_mib=0, max_queue_wait_s=1000), engine) as live:
        num_warm_up = engine.num_asked
        chunk(live)
        first = engine.num_asked - num_warm_up
        chunk(live)
        assert engine.num_asked - num_warm_up == 2 * first
        assert not live.service.perceptions.stored


def test_progress_is_streamed_window_by_window(tones: Live) -> None:
    clip = wav(recording(95, [*WORDS, (90.0, "foxtrot")]))
    events = tones.events(clip, long_audio="chunk", question="Which word?", choices=["bravo", "golf"])
    names = [name for name, _ in events]
    progress = [data for name, data in events if name == "window.done"]
    num_windows = len(progress)
    assert names == ["window.done"] * num_windows + ["answer.delta", "answer.done", "usage", "done"]
    assert [data["done"] for data in progress] == list(range(1, num_windows + 1))
    assert {data["of"] for data in progress} == {num_windows} and {data["index"] for data in progress} == set(
        range(num_windows)
    )
    assert events[-1][1]["answer"]["choice"] == "bravo"


def test_too_many_windows_name_the_limit_the_number_and_the_way_of_jobs(tones: Live, engine: ToneEngine) -> None:
    before = engine.num_asked
    error = assert_error(tones.ask(wav(recording(300, WORDS)), long_audio="chunk"), 422, "audio_too_long", "long_audio")
    assert error["limit"] == 5 and error["actual"] > 5
    assert "POST /v1/jobs" in error["hint"] and "300.0 s" in error["message"]
    assert engine.num_asked == before


def test_a_recording_of_three_hours_is_refused_by_name(tones: Live) -> None:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8_000, 1, format="FLAC") as writer:
        for _ in range(180):
            writer.write(np.zeros(480_000))
    for long_audio, limit in (("chunk", 3600), ("window", 3600), ("error", 600)):
        reply = tones.ask(file.getvalue(), long_audio=long_audio)
        assert assert_error(reply, 413, "audio_duration_too_large", "file")["limit"] == limit


def test_one_window_is_asked_at_its_place(tones: Live, engine: ToneEngine) -> None:
    reply = tones.ask(SPEECH, long_audio="window", start_s=31.5, question="Which word?").json()
    assert reply["answer"]["text"] == "charlie alpha"
    audio = reply["audio"][0]
    assert (audio["duration_s"], audio["start_s"], audio["used_s"], audio["windows"]) == (95, 31.5, 30, 1)
    assert engine.lengths[-1] == 30 * SAMPLE_RATE_HZ
    at_end = tones.ask(SPEECH, long_audio="window", start_s=79, question="Which word?").json()
    assert at_end["answer"]["text"] == "delta echo" and at_end["audio"][0]["used_s"] == 16
    error = assert_error(tones.ask(SPEECH, long_audio="window", start_s=95), 400, "invalid_parameter", "start_s")
    assert (error["limit"], error["actual"]) == (95, 95)


def test_a_clip_of_one_window_is_answered_as_without_chunk(tones: Live) -> None:
    clip = wav(recording(20, WORDS[:2]))
    plain, chunked = tones.ask(clip, question="Which?").json(), chunk(tones, clip, question="Which?")
    assert chunked["answer"] == plain["answer"] and chunked["trace"] == plain["trace"]
    assert len(chunked["timeline"]) == 1 and plain["timeline"] == []


def test_a_client_that_leaves_in_the_middle_stops_all_windows(tones: Live, engine: ToneEngine) -> None:
    clip = wav(recording(95, [(at_s, "foxtrot") for at_s, _ in WORDS]))
    tones.run(hold(engine))
    fields = {"question": "Which?", "long_audio": "chunk", "stream": "true"}
    with tones.client.stream("POST", "/v1/audio/qa", data=fields, files={"file": ("clip", clip)}) as stream:
        assert stream.status_code == 200
        wait_for(lambda: engine.num_in_flight >= 2, timeout_s=60)
    # Leaving the block closes the connection.
    tones.wait_until_idle()
    tones.run(release(engine))
    assert tones.service.limiter.num_working == tones.service.limiter.num_waiting == 0


def test_a_late_recording_returns_its_timeline_so_far(tones: Live, engine: ToneEngine) -> None:
    clip = wav(recording(95, [(at_s, "echo") for at_s, _ in WORDS[:2]]))
    tones.run(hold(engine))
    reply = tones.ask(clip, long_audio="chunk", timeout_ms=5000)
    assert_late = reply.json()
    tones.run(release(engine))
    assert (reply.status_code, assert_late["error"]["code"]) == (504, "deadline_exceeded")
    assert {each["status"] for each in assert_late["partial"]["timeline"]} == {"silent"}
    tones.wait_until_idle()


async def hold(engine: ToneEngine) -> None:
    engine.gate.clear()


async def release(engine: ToneEngine) -> None:
    engine.gate.set()


def test_a_job_drives_any_number_of_windows_step_by_step(tones: Live) -> None:
    words = [(24.0 * minute + 3, "charlie" if minute == 20 else "alpha") for minute in range(25)]

    async def work() -> tuple[list[WindowDone], QaReply]:
        service, context = tones.service, RequestContext("job", is_body_complete=True, priority="batch")
        opened = await open_recording(service, context, wav(recording(600, words)))
        asked = Asked("Which word is said?", ("charlie", "foxtrot"))
        steps: list[WindowDone] = []
        reply: QaReply | None = None
        async for step in answer_recording(service, context, asked, opened, deadline_s=1e12):
            if isinstance(step, WindowDone):
                steps.append(step)
            else:
                reply = step
        opened.close()
        assert reply is not None
        return steps, reply

    steps, reply = tones.run(work())
    assert len(steps) == steps[-1].of == len(reply.timeline) > 20
    assert reply.answer.choice == "charlie"
    assert reply.answer.evidence[0].start_s <= 24 * 20 + 3 < reply.answer.evidence[0].end_s


def test_windows_wait_as_batch_requests_and_leave_places_free(tones: Live, engine: ToneEngine) -> None:
    assert 1 < engine.most_at_once <= tones.service.admission.max_batch_in_flight
    assert tones.metric("hyper_recording_windows_total", status="done") > 20
    assert tones.metric("hyper_recording_windows_total", status="failed") >= 2
    assert tones.metric("hyper_queue_wait_seconds_count", **{"class": "batch"}) > 20


# --- OpenAI's endpoints ---


def transcribe(live: Live, clip: bytes, **fields: Any) -> httpx.Response:
    return live.client.post("/v1/audio/transcriptions", data={"model": "hyper", **fields}, files={"file": ("a", clip)})


def test_ten_minutes_are_transcribed_in_one_request_with_true_times(tones: Live) -> None:
    words = [(24.0 * number + 3, ["alpha", "bravo", "charlie"][number % 3]) for number in range(25)]
    clip = wav(recording(600, words))
    verbose = transcribe(tones, clip, response_format="verbose_json").json()
    assert verbose["text"].split() == [word for _, word in words]
    assert verbose["duration"] == 600
    for at_s, word in words:
        (segment,) = [each for each in verbose["segments"] if each["start"] <= at_s < each["end"]]
        assert word in segment["text"]
    cues = transcribe(tones, clip, response_format="srt").text
    assert cues.count(" --> ") == len(verbose["segments"]) and cues.startswith("1\n00:00:00,000 --> ")
    diarized = transcribe(tones, clip, response_format="diarized_json").json()
    assert {each["speaker"] for each in diarized["segments"]} >= {"w0.S1", "w1.S1"}
    assert_error(transcribe(tones, wav(recording(601, words))), 413, "audio_duration_too_large", "file")
    assert_error(transcribe(tones, SPEECH, long_audio="error"), 422, "audio_too_long", "file")


def test_a_transcript_of_windows_is_streamed_in_order(tones: Live) -> None:
    lines = transcribe(tones, SPEECH, stream="true").text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert "".join(each["delta"] for each in events[:-1]) == events[-1]["text"] == " ".join(word for _, word in WORDS)


def test_words_of_a_hard_cut_are_transcribed_once(tones: Live) -> None:
    samples_S = recording(45, [])
    times_S = np.arange(len(samples_S)) / SAMPLE_RATE_HZ
    samples_S += (0.08 * np.sin(2 * np.pi * 5_000 * times_S)).astype(np.float32)
    order = np.random.default_rng(1).integers(0, len(TONES), 56)
    samples_S += recording(45, [(0.8 * number + 0.1, list(TONES)[word]) for number, word in enumerate(order)])
    reply = chunk(tones, wav(samples_S))
    assert reply["timeline"][0]["boundary"] in ("hard", "quiet")
    said = " ".join(each["transcript"] for each in reply["timeline"]).split()
    assert 54 <= len(said) <= 57


def test_a_chat_uses_all_windows_if_it_says_so(tones: Live) -> None:
    import base64

    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(SPEECH).decode(), "format": "wav"}}
    content = [part, {"type": "text", "text": "Which word is said?"}]
    body = {"model": "hyper", "messages": [{"role": "user", "content": content}]}
    assert_error(tones.client.post("/v1/chat/completions", json=body), 422, "audio_too_long", "file")
    body["hyper"] = {"long_audio": "chunk", "choices": ["echo", "foxtrot"]}
    reply = tones.client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == "echo"
    assert len(reply["hyper"]["timeline"]) >= 4 and reply["id"].startswith("chatcmpl-")
    lines = tones.client.post("/v1/chat/completions", json={**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert any("window_done" in each.get("hyper", {}) for each in chunks)
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks) == "echo"
    body["hyper"] = {"start_s": 3}
    assert_error(tones.client.post("/v1/chat/completions", json=body), 400, "invalid_parameter", "start_s")


def test_info_names_the_limits(tones: Live) -> None:
    info = tones.client.get("/v1/info").json()
    assert info["long_audio"] == ["error", "window", "chunk"]
    assert (info["limits"]["sync_windows"], info["limits"]["max_recording_s"]) == (5, 3600)
