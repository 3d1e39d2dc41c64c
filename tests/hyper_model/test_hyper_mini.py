"""The embedded checkpoint in use: `hyper serve`, ten held-out clips in common upload formats, and their truth.

`hyper data samples` draws the clips with fixed seeds, from voices and recordings outside the training data. A small
model makes errors. The bounds below are for ten clips together, well under the card's figures.
"""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from openai import OpenAI

from hyper.commands import ask
from hyper_model.checkpoint import open_checkpoint
from tests.process import ROOT, exit_code, serve_process
from tests.serving import parse_events
from training.text_metrics import edit_distance, words

CLIPS = ROOT / "tests/assets/clips"
TRUTH: list[dict[str, Any]] = json.loads((CLIPS / "truth.json").read_text(encoding="utf-8"))
CHECKPOINT = ROOT / "checkpoints/hyper-mini"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve_process({"HYPER_ENGINE": "vllm"}, ready_timeout_s=280) as (process, address):
        yield address
        process.send_signal(signal.SIGTERM)
        assert exit_code(process, 60) == 0


def post(url: str, path: Path, **fields: Any) -> httpx.Response:
    with path.open("rb") as file:
        return httpx.post(f"{url}/v1/audio/qa", data=fields, files={"file": (path.name, file)}, timeout=120)


@pytest.fixture(scope="module")
def replies(url: str) -> list[dict[str, Any]]:
    """Replies to the ten questions, sent at once."""

    def ask_one(row: dict[str, Any]) -> dict[str, Any]:
        response = post(url, CLIPS / row["file"], question=row["question"], choices=row["choices"])
        assert response.status_code == 200, response.text
        return response.json()

    with ThreadPoolExecutor(len(TRUTH)) as pool:
        return list(pool.map(ask_one, TRUTH))


def test_every_reply_is_a_whole_strict_trace_about_the_whole_clip(replies: list[dict[str, Any]]) -> None:
    labels = set(open_checkpoint(CHECKPOINT).manifest.environment_labels)
    for row, reply in zip(TRUTH, replies, strict=True):
        assert (reply["termination"], reply["trace"]["format"]) == ("complete", "strict"), row["file"]
        assert reply["answer"]["choice"] == row["choices"][reply["answer"]["choice_index"]]
        assert sum(reply["answer"]["scores"]) == pytest.approx(1)
        assert set(reply["perception"]["environment"]) <= labels
        (audio,) = reply["audio"]
        # Lossy formats pad a little at either end.
        assert audio["used_s"] == audio["duration_s"] == pytest.approx(row["duration_s"], abs=0.15)
        assert reply["usage"]["audio_tokens"] == pytest.approx(25 * audio["duration_s"], abs=2)


def test_the_answers_and_the_perception_match_the_truth(replies: list[dict[str, Any]]) -> None:
    pairs = list(zip(TRUTH, replies, strict=True))
    answers = sum(reply["answer"]["choice"] == row["answer"] for row, reply in pairs)
    environments = sum(reply["perception"]["environment"] == [row["environment"]] for row, reply in pairs)
    counts = sum(len(reply["perception"]["speakers"]) == row["num_speakers"] for row, reply in pairs)
    errors = sum(
        edit_distance(words(row["transcript"]), words(reply["perception"]["transcript"])) for row, reply in pairs
    )
    num_words = sum(len(words(row["transcript"])) for row in TRUTH)
    print(f"answers {answers}, environments {environments}, counts {counts} of 10; {errors} of {num_words} words wrong")
    assert answers >= 7
    assert environments >= 5
    assert counts >= 6
    assert errors <= 0.35 * num_words


def test_a_clip_without_speech_has_no_words_and_no_speakers(replies: list[dict[str, Any]]) -> None:
    reply = replies[[row["num_speakers"] for row in TRUTH].index(0)]
    assert reply["perception"]["transcript"] == ""
    assert reply["perception"]["speakers"] == []


def test_a_stream_ends_with_the_answer_that_the_whole_reply_has(url: str, replies: list[dict[str, Any]]) -> None:
    row = TRUTH[1]
    response = post(url, CLIPS / row["file"], question=row["question"], choices=row["choices"], stream="true")
    events = parse_events(response.text)
    name, done = events[-1]
    assert name == "done"
    assert done["answer"]["choice"] == replies[1]["answer"]["choice"]
    assert done["trace"] == replies[1]["trace"]


def test_hyper_ask_prints_the_answer(url: str) -> None:
    row = TRUTH[1]
    arguments = [str(CLIPS / row["file"]), row["question"], "--url", url]
    for choice in row["choices"]:
        arguments += ["--choice", choice]
    result = CliRunner().invoke(ask, arguments)
    assert result.exit_code == 0, result.output
    assert any(choice in result.output for choice in row["choices"])


def test_another_clip_gets_another_transcript(replies: list[dict[str, Any]]) -> None:
    spoken = [reply["perception"]["transcript"] for row, reply in zip(TRUTH, replies, strict=True) if row["transcript"]]
    assert len(set(spoken)) == len(spoken)


def test_the_openai_client_gets_words_answer_and_speakers(url: str) -> None:
    clip = CLIPS / "one-voice.mp3"
    data = base64.b64encode(clip.read_bytes()).decode()
    audio: Any = {"type": "input_audio", "input_audio": {"data": data, "format": "mp3"}}
    content: Any = [audio, {"type": "text", "text": "Who married Henry?"}]
    with OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120) as client:
        completion: Any = client.chat.completions.create(
            model="hyper-mini", messages=[{"role": "user", "content": content}]
        )
        plain = client.audio.transcriptions.create(model="hyper", file=clip)
        spoken: Any = client.audio.transcriptions.create(model="hyper", file=clip, response_format="diarized_json")
        subtitles: Any = client.audio.transcriptions.create(model="hyper", file=clip, response_format="srt")
    assert completion.choices[0].message.content == completion.hyper["answer"]["text"] != ""
    assert "married" in plain.text
    assert subtitles.startswith("1\n00:00:00,000 --> 00:00:09,644\n") and plain.text in subtitles
    assert spoken.segments and all(segment.speaker.startswith("S") for segment in spoken.segments)
