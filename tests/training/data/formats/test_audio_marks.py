"""The marks that stand for a clip are recognised in every spelling of published data sets, or refused by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.data.examples import read_examples
from training.data.formats.audio_marks import AudioMarkError, remove_marks
from training.data.formats.types import Example, ExampleError

RECOGNISED = (
    "<audio>{}",
    "<audio>\n{}",
    "{}<audio>",
    "{}\n<audio>",
    "<AUDIO> {}",
    "<|AUDIO|>{}",
    "<|audio|>\n{}",
    "<|audio_1|>{}",
    "<sound>\n{}",
    "<speech>{}",
    "<SpeechHere>{}",
    "<Speech><SpeechHere></Speech> {}",
    "<audio_soft_token>{}",
    "<start_of_audio><audio_soft_token><audio_soft_token><end_of_audio>{}",
    "[AUDIO]{}",
    "[BEGIN_AUDIO][AUDIO][AUDIO] {}",
    "(<audio>./</audio>)\n{}",
    "<|audio_start|><|audio_pad|><|audio_pad|><|audio_end|>{}",
    "<|begin_of_audio|><|audio|><|end_of_audio|>\n{}",
    "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{}",
    "Audio 1:<audio>/data/clips/x-1.wav</audio>\n{}",
    "Audio: <audio>\n{}",
    "&lt;audio&gt;{}",
    "<audio&gt;{}",
    "< audio >{}",
    "{{{{audio}}}} {}",
    "<audio>: {}",
    "[audio]{}",
    "[Audio 1] {}",
    "${{audio}} {}",
    "%audio% {}",
    "<|audio|>\u200b{}",
    "\ufeff<audio>{}",
    "<audio>\\n{}",
)
REFUSED = (
    "<audio><audio>Which of the two is louder?",
    "<audio>\n<audio>\nWhich of the two is louder?",
    "<|AUDIO|><|AUDIO|>Which?",
    "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nAudio 2: <|audio_bos|><|AUDIO|><|audio_eos|>\nWhich?",
    "<audio Who?",
    "audio>Who?",
    "<|AUDIO|Who?",
    "|AUDIO|>Who?",
    "&lt;audio Who?",
    "<image>Who?",
    "<audio><image>Who?",
    "<|vision_start|><|image_pad|><|vision_end|>Who?",
    "<video>Who?",
    "<|im_start|>user\nWho?",
    "[INST]<audio>Who?[/INST]",
    "<s><audio>Who?</s>",
    "<input_audio>Who?",
    "<audio_features>Who?",
    "<audios>Who?",
    '<audio src="x.wav"/>Who?',
    "<__media__>Who?",
    "＜audio＞Who?",
    "![](clip.wav) Who?",
    "[clip](https://x.example/a.mp3) Who?",
)
QUESTION = "Who married Henry?"


@pytest.mark.parametrize("mark", RECOGNISED)
def test_a_mark_of_one_clip_is_removed_with_its_label(mark: str) -> None:
    assert remove_marks(mark.format(QUESTION)) == QUESTION


@pytest.mark.parametrize("text", REFUSED)
def test_several_clips_other_media_and_broken_marks_are_refused(text: str) -> None:
    with pytest.raises(AudioMarkError):
        remove_marks(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is said in <audio>?", "What is said in the audio?"),
        ("Listen to <|AUDIO|> and answer.", "Listen to the audio and answer."),
        ("Listen to the recording <audio> and answer.", "Listen to the recording and answer."),
        ("In the audio <audio>, who speaks?", "In the audio, who speaks?"),
        ("Who speaks in <audio>", "Who speaks in the audio"),
        ("Is a sound > 50 dB? (see [music])", "Is a sound > 50 dB? (see [music])"),
        ("Is x < y and the audio good?", "Is x < y and the audio good?"),
        ("What does <3 mean?", "What does <3 mean?"),
        ("If a < b, is the sound > c?", "If a < b, is the sound > c?"),
        ("Who says «audio» [laughter]?", "Who says «audio» [laughter]?"),
    ],
)
def test_a_mark_inside_a_sentence_becomes_words_and_other_words_stay(text: str, expected: str) -> None:
    assert remove_marks(text) == expected


def rows(path: Path, *fields: dict[str, Any]) -> tuple[list[Example], list[ExampleError]]:
    path.write_text("".join(json.dumps(row) + "\n" for row in fields))
    faults: list[ExampleError] = []
    return list(read_examples(path, on_fault=faults.append)), faults


def chat(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": said(content, "Felix"), "audios": ["1.wav"], **fields}


def said(content: Any, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def test_every_row_is_read_without_marks_or_refused_by_its_line(tmp_path: Path) -> None:
    part = {"type": "audio", "audio": "audio/1.wav"}
    text = {"type": "text", "text": QUESTION}
    examples, faults = rows(
        tmp_path / "sharegpt.jsonl",
        chat(f"<|AUDIO|>{QUESTION}"),
        chat([part, text], audios=[]),
        chat([part, text], audios=None),
        chat("<audio><audio>Which?"),
        chat([part, part, text], audios=None),
        chat([part, text]),
        chat([{"type": "image", "image": "x.png"}, text], audios=None),
        {
            **chat(QUESTION),
            "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "<audio>"}],
        },
    )
    assert [example.question for example in examples] == [QUESTION] * 3
    assert [example.audio.name for example in examples] == ["1.wav"] * 3
    assert [fault.source.rpartition(" ")[2] for fault in faults] == ["4", "5", "6", "7", "8"]


def test_marks_are_recognised_in_every_format(tmp_path: Path) -> None:
    marked = f"<|AUDIO|>{QUESTION}"
    choices = ["Felix", "Paul"]
    for name, row in {
        "plain": {"file": "1.wav", "question": marked, "answer": "Felix"},
        "alpaca": {"instruction": marked, "input": "", "output": "Felix", "audios": ["1.wav"]},
        "avqa": {"multi_choice": choices, "question_text": marked, "answer": 0, "video_name": "1"},
        "mmau": {"audio_id": "1.wav", "question": marked, "choices": choices, "answer": "Felix", "task": "speech"},
    }.items():
        examples, faults = rows(tmp_path / f"{name}.jsonl", row)
        assert [example.question for example in examples] == [QUESTION], (name, faults)
