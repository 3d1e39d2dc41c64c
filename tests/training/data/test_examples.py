"""Data sets of seven formats give the same rows, and an error names a bad row's place and field."""

from __future__ import annotations

import csv
import io
import json
import pickle
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hyper_model.audio import Waveform
from hyper_model.errors import HyperError
from hyper_model.trace import MAX_CHOICES, Trace, render
from tests.paths import CLIPS
from training.cli.data import data
from training.data.examples import (
    Example,
    ExampleError,
    Summary,
    check_examples,
    read_examples,
)
from training.data.formats import FORMATS
from training.data.formats.choices import split_question
from training.data.formats.rows import MAX_SHOWN_CHARS

PAQA_OUTPUT = (
    "<THINK>\n<PLANNING>\nFind the fifth voice.\n</PLANNING>\n<CAPTION>\n- **Speaker 5**: Reboots.\n</CAPTION>\n"
    "<REASONING>\nOption (a) is said by the sixth.\n</REASONING>\n<SUMMARY>\nThe correct answer is B.\n</SUMMARY>\n"
    '</THINK>\n<RESPONSE>\nThe fifth person says "Rebooting now." The answer is B.\n</RESPONSE>\n'
)
PAQA = {
    "instruction": "<audio>What does the fifth person say? (a) This is bad. (b) Rebooting now. (c) Stay calm.",
    "output": PAQA_OUTPUT,
    "audios": ["/data/multispeaker_choice_1.wav"],
    "id": 1,
}
SHAREGPT = {
    "messages": [
        {"role": "system", "content": "You listen."},
        {"role": "user", "content": "<audio>What's that sound?"},
        {"role": "assistant", "content": "It is the sound of glass shattering."},
    ],
    "audios": ["demo/1.mp3"],
}
AVQA = {
    "id": 183,
    "video_name": "-HG3Omg_89c_000030",
    "video_id": 341,
    "question_text": "What happened in the video?",
    "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"],
    "answer": 1,
    "question_relation": "View",
    "question_type": "Happening",
    "dataset_name": "AVQA",
    "audio_path": "wavs/-HG3Omg_89c_30.wav",
}
MMAU = {
    "id": "3fe64f3d",
    "audio_id": "./test-mini-audios/3fe64f3d.wav",
    "question": "Based on the given audio, identify the source of the speaking voice.",
    "choices": ["Man", "Woman", "Child", "Robot"],
    "answer": "Man",
    "dataset": "AudioSet",
    "task": "sound",
    "split": "test-mini",
    "category": "Reasoning",
    "sub-category": "Acoustic Source Inference",
    "difficulty": "medium",
}
MMAR = {
    "id": "demo_0001",
    "audio_path": "./audio/demo_0001.wav",
    "question": "What is producing the sound?",
    "choices": ["Owl", "Robot", "Rooster", "Parrot"],
    "answer": "Parrot",
    "modality": "sound",
    "category": "Semantic Layer",
    "sub-category": "Speaker Analysis",
    "language": "en",
    "source": "youtube",
    "url": "https://example.com",
    "timestamp": "00:11:10,00:11:30",
}
PLAIN = {
    "file": "one.mp3",
    "question": "Who married Henry?",
    "choices": ["Felix", "Simon"],
    "answer": "Felix",
    "environment": "quiet",
    "num_speakers": 1,
    "transcript": "Felix and Henry got married in December",
    "duration_s": 9.6,
}
TABLE = "audio,question,answer,choices,category,environment,transcript,num_speakers\n"


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_array(path: Path, *rows: object) -> Path:
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def read_one(path: Path, format: str | None = None) -> Example:
    [example] = read_examples(path, format=format)
    return example


def refusal(path: Path, format: str | None = None, audio_root: Path | None = None) -> ExampleError:
    with pytest.raises(ExampleError) as caught:
        list(read_examples(path, format=format, audio_root=audio_root))
    return caught.value


def test_paqa_as_published_has_choices_in_the_question_and_the_answer_in_a_sentence(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", PAQA)
    assert read_one(path) == Example(
        id="1",
        audio=Path("/data/multispeaker_choice_1.wav"),
        question="What does the fifth person say?",
        answer="Rebooting now.",
        choices=("This is bad.", "Rebooting now.", "Stay calm."),
        completion=PAQA_OUTPUT,
        source=f"{path}, line 1",
    )


@pytest.mark.parametrize(
    "final",
    [
        *("B", "(b)", "B.", "B. two", "(B) two", "two", "Two."),
        *(
            "The answer is (b) two.",
            "**Answer: B**",
            "I hear both, making the answer B.",
            "The likely number is (b) two.",
        ),
    ],
)
def test_a_traces_final_answer_is_turned_into_the_choice(tmp_path: Path, final: str) -> None:
    completion = render(Trace(reasoning="I count.", response="A", reflection="No.", final_answer=final))
    row = {**PAQA, "instruction": "<audio>\nHow many?\nA. one\nB. two\n", "output": completion}
    example = read_one(write_lines(tmp_path / "x.jsonl", row))
    assert (example.question, example.answer, example.choices) == ("How many?", "two", ("one", "two"))
    assert example.completion == completion


def test_the_letter_and_text_tags_of_the_published_code_are_read(tmp_path: Path) -> None:
    output = "<THINK>x</THINK><RESPONSE>\n<LETTER>C</LETTER>\n<TEXT>Stay calm.</TEXT>\n</RESPONSE>"
    assert read_one(write_lines(tmp_path / "x.jsonl", {**PAQA, "output": output})).answer == "Stay calm."


@pytest.mark.parametrize(
    "text",
    [
        "What is it? (a) a dog (b) a cat, or two (c) rain",
        "What is it? (A) a dog (B) a cat, or two (C) rain",
        "What is it?(a) a dog(b) a cat, or two(c) rain",
        "What is it?\nA. a dog\nB. a cat, or two\nC. rain",
        "What is it?\n(A) a dog\n(B) a cat, or two\n(C) rain",
        "What is it?\nA) a dog\nB) a cat, or two\nC) rain",
        "What is it?\nChoices:\nA. a dog\nB. a cat, or two\nC. rain",
        "What is it? Choices: A. a dog B. a cat, or two C. rain",
        "What is it?\nOptions:\n- a dog\n- a cat, or two\n- rain",
        "What is it?\nChoices: a dog | a cat, or two | rain",
        "What is it? Options: a dog; a cat, or two; rain.",
        "What is it? Please choose the answer from the following options: ['a dog', \"a cat, or two\", 'rain'].",
        "<audio>What is it?\n<audio>Choices: (a) a dog (b) a cat, or two (c) rain",
    ],
)
def test_choices_inside_an_instruction_are_found(text: str) -> None:
    assert split_question(text) == ("What is it?", ("a dog", "a cat, or two", "rain"))


@pytest.mark.parametrize(
    "text",
    [
        "What does A. Lincoln say?",
        "Is it (a) a dog?",
        "Which comes first, (b) or (c)?",
        "What are his options: tea, or coffee?",
        "What is said?",
        "Choices: one",
    ],
)
def test_a_question_without_choices_stays_whole(text: str) -> None:
    assert split_question(text) == (text, ())


def test_what_follows_the_choices_stays_in_the_question() -> None:
    text = "What is it?\nA. a dog\nB. rain\nAnswer with the letter."
    assert split_question(text) == ("What is it?\nAnswer with the letter.", ("a dog", "rain"))
    text = "What is it? Options: ['a dog', 'it\\'s rain']. Think first."
    assert split_question(text) == ("What is it?\nThink first.", ("a dog", "it's rain"))


def test_sharegpt_of_llama_factory_reads_messages_and_conversations(tmp_path: Path) -> None:
    path = write_array(tmp_path / "demo.json", SHAREGPT)
    expected = Example(
        id="demo-1",
        audio=tmp_path / "demo/1.mp3",
        question="What's that sound?",
        answer="It is the sound of glass shattering.",
        source=f"{path}, item 1",
    )
    assert read_one(path) == expected
    completion = render(Trace(reasoning="It rings.", response="a bell", final_answer="a bell"))
    conversation = [
        {"from": "human", "value": "<audio>What rings?\nA. a bell\nB. a phone"},
        {"from": "gpt", "value": completion},
    ]
    example = read_one(write_lines(tmp_path / "x.jsonl", {"conversations": conversation, "audios": ["1.mp3"]}))
    assert (example.answer, example.choices, example.completion) == ("a bell", ("a bell", "a phone"), completion)


def test_avqa_of_r1_aqa_reads_an_index(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train_qa.data", AVQA)
    assert read_one(path) == Example(
        id="183",
        audio=tmp_path / "wavs/-HG3Omg_89c_30.wav",
        question="What happened in the video?",
        answer="Yacht consignment",
        choices=("motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"),
        category="Happening",
        source=f"{path}, line 1",
    )


def test_avqa_finds_its_audio_under_other_names(tmp_path: Path) -> None:
    row: dict[str, Any] = {name: value for name, value in AVQA.items() if name != "audio_path"}
    assert read_one(write_lines(tmp_path / "x.jsonl", row)).audio == tmp_path / "-HG3Omg_89c_000030.wav"
    named = {**row, "audio": "b.flac", "answer": "motorboat"}
    example = read_one(write_lines(tmp_path / "x.jsonl", named))
    assert (example.audio, example.answer) == (tmp_path / "b.flac", "motorboat")


def test_mmau_is_reported_by_task_and_sub_category(tmp_path: Path) -> None:
    path = write_array(tmp_path / "mmau-test-mini.json", MMAU)
    assert read_one(path) == Example(
        id="3fe64f3d",
        audio=tmp_path / "test-mini-audios/3fe64f3d.wav",
        question="Based on the given audio, identify the source of the speaking voice.",
        answer="Man",
        choices=("Man", "Woman", "Child", "Robot"),
        category="sound/Acoustic Source Inference",
        difficulty="medium",
        source=f"{path}, item 1",
    )


def test_mmar_is_reported_by_modality_and_category(tmp_path: Path) -> None:
    example = read_one(write_array(tmp_path / "MMAR-meta.json", MMAR))
    assert (example.answer, example.category) == ("Parrot", "sound/Semantic Layer")
    assert (example.id, example.audio) == ("demo_0001", tmp_path / "audio/demo_0001.wav")


def test_a_table_says_nothing_by_an_empty_cell(tmp_path: Path) -> None:
    text = (
        TABLE
        + 'a.wav,"How many, do you think?",2,1|2|3,count,street,"one\nsays, ""two""",2\n\nb.wav,Who?,nobody,,,,,\n'
    )
    path = write_text(tmp_path / "mine.csv", text)
    first, second = read_examples(path)
    assert first == Example(
        id="mine-2",
        audio=tmp_path / "a.wav",
        question="How many, do you think?",
        answer="2",
        choices=("1", "2", "3"),
        category="count",
        environment="street",
        transcript='one\nsays, "two"',
        num_speakers=2,
        source=f"{path}, line 2",
    )
    # The first record has two lines and a blank one follows.
    assert second == Example("mine-5", tmp_path / "b.wav", "Who?", "nobody", source=f"{path}, line 5")


def test_our_own_clips_are_a_plain_list() -> None:
    found = list(read_examples(CLIPS / "truth.json"))
    truth = json.loads((CLIPS / "truth.json").read_text(encoding="utf-8"))
    assert [(e.question, list(e.choices), e.answer, e.num_speakers) for e in found] == [
        (row["question"], row["choices"], row["answer"], row["num_speakers"]) for row in truth
    ]
    assert found[0].transcript == "" and found[0].environment == "water" and found[0].id == "truth-1"
    assert all(example.audio.is_file() for example in found)


def test_a_plain_list_may_leave_answers_out(tmp_path: Path) -> None:
    row = {"file": "a.wav", "question": "What is heard?"}
    path = write_array(tmp_path / "x.json", row, {**row, "choices": ["rain", "wind"], "num_speakers": 0})
    bare, asked = read_examples(path)
    assert bare == Example("x-1", tmp_path / "a.wav", "What is heard?", "", source=f"{path}, item 1")
    assert (asked.answer, asked.choices, asked.num_speakers) == ("", ("rain", "wind"), 0)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("x.jsonl", PAQA, "paqa"),
        ("x.jsonl", SHAREGPT, "sharegpt"),
        ("x.json", {"conversations": SHAREGPT["messages"], "audios": ["1.mp3"]}, "sharegpt"),
        ("x.jsonl", AVQA, "avqa"),
        ("x.jsonl", {"audio": "a.wav", "question": "?", "choices": ["a", "b"], "answer": "a"}, "avqa"),
        ("x.json", MMAU, "mmau"),
        ("x.json", MMAR, "mmar"),
        ("my-mmar.json", {k: v for k, v in MMAR.items() if k != "modality"}, "mmar"),
        ("x.json", PLAIN, "plain"),
    ],
)
def test_a_format_is_told_from_the_first_row_or_the_name(
    tmp_path: Path, name: str, row: Mapping[str, object], expected: str
) -> None:
    write = write_array if name.endswith(".json") else write_lines
    found = check_examples(write(tmp_path / name, row, row))
    assert (found.format, found.num_examples) == (expected, 2)


@pytest.mark.parametrize("name", ["x.csv", "x.CSV", "x.txt"])
def test_a_table_is_told_from_its_name_or_its_beginning(tmp_path: Path, name: str) -> None:
    path = write_text(tmp_path / name, "audio,question,answer\r\na.wav,Who?,me\r\n")
    assert check_examples(path).format == "csv"


def test_arrays_and_lines_are_told_apart_in_every_format(tmp_path: Path) -> None:
    of_lines = list(read_examples(write_lines(tmp_path / "x.json", MMAU, MMAU)))
    of_array = list(read_examples(write_array(tmp_path / "x.json", MMAU, MMAU)))
    assert [replace(e, source="") for e in of_lines] == [replace(e, source="") for e in of_array]
    one_line = write_text(tmp_path / "x.json", "\ufeff \n" + json.dumps([MMAU]))
    assert read_one(one_line).answer == "Man"


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = write_text(tmp_path / "x.jsonl", "\ufeff" + json.dumps(PLAIN) + "\r\n\r\n" + json.dumps(PLAIN))
    assert [example.source for example in read_examples(path)] == [f"{path}, line 1", f"{path}, line 3"]


def test_a_named_format_is_not_doubted(tmp_path: Path) -> None:
    error = refusal(write_array(tmp_path / "mmau.json", PLAIN), "mmau")
    assert error.field == "audio_id" and "is missing" in error.message
    assert sorted(FORMATS) == ["avqa", "csv", "mmar", "mmau", "paqa", "plain", "sharegpt"]


def test_the_first_row_is_given_before_a_bad_later_line_is_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", PLAIN)
    with path.open("ab") as file:
        file.write(b"{not json\n\xff\n")
    rows = read_examples(path)
    assert next(rows).answer == "Felix"
    with pytest.raises(ExampleError, match="line 2: not JSON"):
        next(rows)
    table = write_text(tmp_path / "x.csv", "audio,question,answer\na.wav,Who?,me\n")
    with table.open("ab") as file:
        file.write(b"a.wav,\xff,me\n")
    rows = read_examples(table)
    assert next(rows).answer == "me"
    with pytest.raises(ExampleError, match=r"line 3: not UTF-8 at byte 7, received b'\\xff'"):
        next(rows)


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"answer": "Tina"}, "answer", "the answer is none of the choices, received 'Tina'"),
        ({"answer": "A. Simon"}, "answer", "the answer is none of the choices, received 'A. Simon'"),
        ({"answer": "C"}, "answer", "the answer is none of the choices, received 'C'"),
        ({"answer": 2}, "answer", "is not an index of 2 choices, received 2"),
        ({"answer": True}, "answer", "is not text, received True"),
        ({"answer": " "}, "answer", "is empty, received ''"),
        ({"answer": 0, "choices": []}, "answer", "is an index, and there are no choices, received 0"),
        ({"answer": 1, "choices": ["1", "2"]}, "answer", "may be a choice or the index of one"),
        ({"question": None}, "question", "is missing"),
        ({"question": "  "}, "question", "the question is empty, received ''"),
        ({"question": ["Who?"]}, "question", "is not text, received ['Who?']"),
        ({"question": "a\ud800"}, "question", "contains an invalid character"),
        ({"choices": "Felix"}, "choices", "is not a list, received 'Felix'"),
        ({"choices": ["Felix", 2]}, "choices", "holds a choice that is not text, received 2"),
        (
            {"choices": ["Felix", " Felix "]},
            "choices",
            "two choices are equal; make them different, received ['Felix', 'Felix']",
        ),
        ({"choices": ["Felix"]}, "choices", "1 choices given; the number must be 0 or 2 to 26, received ['Felix']"),
        ({"choices": ["Felix", ""]}, "choices", "a choice is empty"),
        ({"choices": [str(n) for n in range(27)]}, "choices", "27 choices given; the number must be 0 or 2 to 26"),
        ({"file": None}, "file", "is missing"),
        ({"file": ""}, "file", "the audio path is empty"),
        ({"file": ["a.wav", "b.wav"]}, "file", "is not text, received ['a.wav', 'b.wav']"),
        ({"num_speakers": "two"}, "num_speakers", "is not a whole number, received 'two'"),
        ({"num_speakers": True}, "num_speakers", "is not a whole number, received True"),
        ({"num_speakers": -1}, "num_speakers", "is below 0, received -1"),
        ({"id": 1.5}, "id", "is not text, received 1.5"),
        ({"environment": 3}, "environment", "is not text, received 3"),
    ],
)
def test_a_bad_field_is_named_with_what_was_received(
    tmp_path: Path, change: dict[str, object], field: str, message: str
) -> None:
    path = write_array(tmp_path / "x.json", PLAIN, {**PLAIN, **change})
    error = refusal(path, "plain")
    assert error.message.startswith(f"{path}, item 2, field '{field}': {message}")
    assert (error.field, error.source) == (field, f"{path}, item 2")


@pytest.mark.parametrize(
    ("row", "change", "field", "message"),
    [
        (PAQA, {"instruction": None}, "instruction", "is missing"),
        (PAQA, {"output": None}, "output", "is missing"),
        (PAQA, {"output": 3}, "output", "is not text, received 3"),
        (PAQA, {"output": " "}, "output", "is empty"),
        (PAQA, {"output": PAQA_OUTPUT + "\ud800"}, "output", "contains an invalid character"),
        (PAQA, {"instruction": "<audio> (a) x (b) y"}, "instruction", "the question is empty"),
        (
            PAQA,
            {"instruction": "Who? (a) x (b) x"},
            "instruction",
            "two choices are equal; make them different, received ['x', 'x']",
        ),
        (PAQA, {"audios": None}, "audios", "is missing"),
        (PAQA, {"audios": "a.wav"}, "audios", "is not a list, received 'a.wav'"),
        (PAQA, {"audios": []}, "audios", "holds 0 audio paths where one is supported"),
        (
            PAQA,
            {"audios": ["a.wav", "b.wav"]},
            "audios",
            "holds 2 audio paths where one is supported, received ['a.wav'",
        ),
        (PAQA, {"audios": [1]}, "audios", "holds an audio path that is not text, received 1"),
        (PAQA, {"output": "<THINK>It is B.</THINK>"}, "output", "is a trace without an answer"),
        (PAQA, {"output": "<THINK>x</THINK><RESPONSE>D</RESPONSE>"}, "output", "the answer is none of the choices"),
        (
            PAQA,
            {"output": "<RESPONSE>The answer is A. The answer is B.</RESPONSE>"},
            "output",
            "the answer is none of the choices",
        ),
        (SHAREGPT, {"messages": "hello"}, "messages", "is not a list, received 'hello'"),
        (SHAREGPT, {"messages": ["hello"]}, "messages", "holds a message that is no object, received 'hello'"),
        (SHAREGPT, {"messages": []}, "messages", "holds 0 messages of the user where one is supported"),
        (SHAREGPT, {"messages": [{"role": "tool", "content": ""}]}, "messages", "holds a role that is none of user,"),
        (SHAREGPT, {"messages": [{"role": "user"}]}, "messages", "holds a message whose content is not text"),
        (
            SHAREGPT,
            {"messages": [*SHAREGPT["messages"], SHAREGPT["messages"][2]]},
            "messages",
            "holds 2 messages of the assistant where one is supported",
        ),
        (AVQA, {"answer": 4}, "answer", "is not an index of 4 choices, received 4"),
        (AVQA, {"answer": -1}, "answer", "is not an index of 4 choices, received -1"),
        (AVQA, {"multi_choice": None}, "multi_choice", "is missing (nor is there choices)"),
        (AVQA, {"question_text": None}, "question_text", "is missing (nor is there question)"),
        (AVQA, {"audio_path": None, "video_name": None}, "audio_path", "is missing (nor is there audio or video_name)"),
        (MMAU, {"answer": None}, "answer", "is missing"),
        (MMAU, {"choices": None}, "choices", "is missing"),
        (MMAU, {"audio_id": None}, "audio_id", "is missing"),
        (MMAU, {"task": 1}, "task", "is not text, received 1"),
        (MMAR, {"answer": "Owl\nRobot"}, "answer", "the answer is none of the choices, received 'Owl\\nRobot'"),
    ],
)
def test_each_format_names_its_own_fields(
    tmp_path: Path, row: dict[str, Any], change: dict[str, object], field: str, message: str
) -> None:
    path = write_lines(tmp_path / "x.jsonl", row, {**row, **change})
    error = refusal(path)
    assert error.message.startswith(f"{path}, line 2, field '{field}': {message}")


def test_an_index_in_avqa_stays_an_index_among_numbers(tmp_path: Path) -> None:
    row = {**AVQA, "multi_choice": ["1", "2", "3"], "answer": 1}
    assert read_one(write_lines(tmp_path / "x.jsonl", row)).answer == "2"


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("B", ["A", "C", "B"], "B"),
        ("b", ["one", "two"], "two"),
        ("(B)", ["one", "two"], "two"),
        ("b) Two", ["one", "two"], "two"),
        ("B two.", ["one", "two"], "two"),
        ("A dog", ["a cat", "a dog"], "a dog"),
        ("a  dog", ["a cat", "a dog"], "a dog"),
        ("a", ["b", "A"], None),
        ("A. two", ["one", "two"], None),
        ("tw", ["one", "two"], None),
        ("1", ["one", "two"], None),
    ],
)
def test_an_answer_is_a_choice_by_its_words_or_its_letter(
    tmp_path: Path, answer: str, choices: list[str], expected: str | None
) -> None:
    path = write_array(tmp_path / "x.json", {**PLAIN, "answer": answer, "choices": choices})
    if expected is None:
        assert refusal(path).field == "answer"
    else:
        assert read_one(path).answer == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"file": "a.wav"', "line 1: not JSON at column 17 (Expecting ',' delimiter), received nothing more"),
        (b'\n{"file": a}', "line 2: not JSON at column 10 (Expecting value), received 'a}'"),
        (b'[{"file": "a.wav"},\n{"file": oops}]', "line 2: not JSON at column 10 (Expecting value), received 'oops}]'"),
        (b'["a"]', "item 1: the row is no object, received 'a'"),
        (b"[[]]", "item 1: the row is no object, received []"),
        (b'{"file": "\xff"}', "line 1: not UTF-8 at byte 11, received b'\\xff'"),
        (b'[{},\n{"file": "\xff"}]', "line 2: not UTF-8 at byte 11, received b'\\xff'"),
        (b"\xef\xbb\xbf[\xff]", "line 1: not UTF-8 at byte 2, received b'\\xff'"),
        (b'{"question": "What?"}', "line 1: the first row is of no known format; name one of sharegpt,"),
        (b"[" * 200_000, ": not JSON that can be read, received '[[["),
        (b'{"num_speakers": ' + b"9" * 5000 + b"}", "line 1: not JSON that can be read, received"),
        (b"", ": the file holds no rows"),
        (b" \n\n", ": the file holds no rows"),
        (b"[]", ": the file holds no rows"),
    ],
)
def test_what_is_no_row_is_refused_by_its_place(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    error = refusal(path)
    assert message in error.message and error.message.startswith(str(path)) and error.field is None


def test_a_row_that_is_no_object_is_refused_in_lines(tmp_path: Path) -> None:
    assert "line 2: the row is no object, received 3" in refusal(write_lines(tmp_path / "x.jsonl", PLAIN, 3)).message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("audio,question\na.wav,Who?\n", "line 1, field 'answer': the header has no such column, received ['audio', "),
        ("audio,question,answer,audio\n", "line 1, field 'audio': the header has this column twice"),
        ("audio,question,answer\na.wav,Who?\n", "line 2: the row has 2 values where the header has 3"),
        ("audio,question,answer\na.wav,Who,me,now\n", "line 2: the row has 4 values where the header has 3"),
        ('audio,question,answer\na.wav,"Who?,me\n', "line 2: not CSV (unexpected end of data)"),
        ("audio,question,answer\na.wav,,me\n", "line 2, field 'question': the question is empty, received ''"),
        ("audio,question,answer\n,Who?,me\n", "line 2, field 'audio': the audio path is empty"),
        ("audio,question,answer\na.wav,Who?,\n", "line 2, field 'answer': is empty"),
        ("audio,question,answer,choices\na.wav,Who?,me,you|they\n", "the answer is none of the choices, received 'me'"),
        ("audio,question,answer,choices\na.wav,Who?,me,me|me\n", "two choices are equal"),
        ("audio,question,answer,choices\na.wav,Who?,me,me||you\n", "a choice is empty"),
        ("audio,question,answer,num_speakers\na.wav,Who?,me,²\n", "'num_speakers': is not a whole number from 0"),
        ("audio,question,answer\n", ": the file holds no rows"),
        ("", ": the file holds no rows"),
    ],
)
def test_a_bad_table_is_refused_by_its_place(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(write_text(tmp_path / "x.csv", text)).message


def test_a_message_shows_a_little_of_one_field(tmp_path: Path) -> None:
    long = "very " * 1000
    path = write_array(tmp_path / "x.json", {**PLAIN, "answer": long, "transcript": "secret"})
    message = refusal(path).message
    assert message.removeprefix(str(path)) == (
        f", item 1, field 'answer': the answer is none of the choices, received {repr(long)[: MAX_SHOWN_CHARS - 1]}…"
    )


def test_paths_start_at_the_audio_root_and_do_not_leave_it_by_dots(tmp_path: Path) -> None:
    root = tmp_path / "audio"

    def audio_of(file: str) -> Path:
        path = write_array(tmp_path / "x.json", {**PLAIN, "file": file})
        return next(read_examples(path, audio_root=root)).audio

    assert audio_of("a.wav") == root / "a.wav"
    assert audio_of("./b/a.wav") == root / "b/a.wav"
    assert audio_of("b/../a.wav") == root / "a.wav"
    assert audio_of("..a.wav") == root / "..a.wav"
    assert audio_of("/data/a.wav") == Path("/data/a.wav")
    for outside in ("../a.wav", "b/../../a.wav", "../audio-2/a.wav", f"{root}/../a.wav", "/data/../etc/a.wav", ".."):
        path = write_array(tmp_path / "x.json", {**PLAIN, "file": outside})
        error = refusal(path, audio_root=root)
        assert error.field == "file" and "the audio path leaves the audio root, received '" in error.message
    # Without a root, paths are not restricted.
    assert read_one(write_array(tmp_path / "x.json", {**PLAIN, "file": "../a.wav"})).audio == tmp_path / "../a.wav"


def test_an_audio_root_may_be_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_array(tmp_path / "x.json", {**PLAIN, "file": "../a.wav"})
    with pytest.raises(ExampleError, match="leaves the audio root"):
        list(read_examples("x.json", audio_root="."))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "cannot read the file (No such file or directory)" in refusal(tmp_path / "none.jsonl").message
    assert "cannot read the file (Is a directory)" in refusal(tmp_path).message


def test_a_format_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = write_array(tmp_path / "x.json", PLAIN)
    error = refusal(path, "excel")  # pyright: ignore[reportArgumentType]
    assert error.message == f"{path}: the format is none of {', '.join(FORMATS)}, received 'excel'"


def test_files_that_would_fill_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.data.formats.rows.MAX_ARRAY_BYTES", 1000)
    monkeypatch.setattr("training.data.formats.rows.MAX_LINE_BYTES", 1000)
    rows = [PLAIN] * 10
    message = refusal(write_array(tmp_path / "x.json", *rows)).message
    assert message == (
        f"{tmp_path / 'x.json'}: the JSON array has more than 1000 bytes, and arrays are loaded whole: "
        "write one object a line instead"
    )
    assert len(list(read_examples(write_lines(tmp_path / "x.jsonl", *rows)))) == 10
    path = write_lines(tmp_path / "x.jsonl", PLAIN, {**PLAIN, "transcript": "a" * 1000})
    assert refusal(path).message == f"{path}, line 2: the line has more than 1000 bytes"


def test_a_name_that_only_sounds_like_a_format_tells_none(tmp_path: Path) -> None:
    for name in ("mycsv.json", "explained.json"):
        error = refusal(write_array(tmp_path / name, {"question": "Who?", "count": 1}))
        assert error.message.endswith(f"{', '.join(FORMATS)}, received ['question', 'count']")


def test_a_refusal_is_a_hyper_error_that_survives_pickling(tmp_path: Path) -> None:
    error = refusal(write_array(tmp_path / "x.json", {**PLAIN, "answer": "Tina"}))
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, HyperError) and type(copy) is ExampleError
    assert vars(copy) == vars(error) and str(copy) == str(error)


def test_checking_counts_rows_choices_categories_and_audio_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "here.wav").write_bytes(b"RIFF")
    (tmp_path / "empty.wav").touch()
    rows = [
        {**PLAIN, "file": "here.wav", "category": "count"},
        {**PLAIN, "file": "gone.wav", "category": "word", "choices": []},
        {**PLAIN, "file": "gone.wav", "category": "count"},
        {**PLAIN, "file": "x" * 5000},
        {**PLAIN, "file": "empty.wav"},
    ]
    found = check_examples(write_array(tmp_path / "x.json", *rows))
    assert (found.num_examples, found.num_with_choices, found.by_category) == (5, 4, {"count": 2, "word": 1})
    # Each is named once, with the first row that has it.
    assert [text.rpartition(" is ")[2] for text in found.bad_audio] == ["missing", "missing", "empty"]
    assert "item 2: " in found.bad_audio[0] and "gone.wav" in found.bad_audio[0] and found.warnings == ()
    assert check_examples(CLIPS / "truth.json", decodes=True) == Summary("plain", 10, 10, (), {})
    assert len(check_examples(tmp_path / "x.json", audio_root=CLIPS).bad_audio) == 4


def test_checking_decodes_clips_and_names_what_would_stop_or_spoil_a_run(tmp_path: Path) -> None:
    clip = (CLIPS / "one-voice-word.flac").read_bytes()
    silence = Waveform(np.zeros(16_000, np.float32))
    long = Waveform(np.zeros(31 * 16_000, np.float32))
    for name, content in {
        "good.flac": clip,
        "cut.flac": clip[:20_000],
        "text.wav": b"hello, this is text",
        "silent.wav": encoded(silence),
        "long.wav": encoded(long),
        "short.wav": encoded(silence)[:12_044],
    }.items():
        (tmp_path / name).write_bytes(content)
    names = ["good.flac", "cut.flac", "text.wav", "silent.wav", "long.wav", "short.wav"]
    found = check_examples(write_array(tmp_path / "x.json", *({**PLAIN, "file": name} for name in names)), decodes=True)
    assert [text.split(": ")[1].rpartition("/")[2] for text in found.bad_audio] == ["cut.flac", "text.wav", "long.wav"]
    assert sorted({text.split(": ")[1].rpartition("/")[2] for text in found.warnings}) == ["short.wav", "silent.wav"]


def encoded(waveform: Waveform) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform.samples_S, 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def test_checking_names_every_bad_row_and_reading_may_leave_them_out(tmp_path: Path) -> None:
    bad = {**PLAIN, "answer": "Tina"}
    path = write_array(tmp_path / "x.json", bad, PLAIN, {**PLAIN, "question": ""}, PLAIN)
    found = check_examples(path)
    assert (found.num_examples, len(found.faults)) == (2, 2)
    assert ["item 1" in str(found.faults[0]), "item 3" in str(found.faults[1])] == [True, True]
    faults: list[ExampleError] = []
    assert len(list(read_examples(path, on_fault=faults.append))) == 2
    assert list(map(str, faults)) == list(map(str, found.faults))


def test_the_command_counts_a_good_set_and_names_the_faults_of_a_bad_one(tmp_path: Path) -> None:
    good = CliRunner().invoke(data, ["check", str(CLIPS / "truth.json")])
    assert good.exit_code == 0 and "plain, 10 examples, 10 with choices" in good.output
    path = write_array(tmp_path / "x.json", PLAIN, {**PLAIN, "answer": "Tina"})
    bad = CliRunner().invoke(data, ["check", str(path)])
    assert bad.exit_code == 1 and "item 2" in bad.output and "1 unusable rows" in bad.output


TEXTS = (
    st.text(st.characters(exclude_characters="\0|", exclude_categories=["Cs"]), min_size=1, max_size=20)
    .map(str.strip)
    .filter(lambda text: any(unicodedata.category(char)[0] not in "CZ" for char in text))
)


@st.composite
def drawn_examples(draw: st.DrawFn) -> Example:
    num_choices = draw(st.sampled_from([0, 2, 3, MAX_CHOICES]))
    # A leading number keeps them distinct after any normalization.
    choices = tuple(f"{place} {draw(TEXTS)}" for place in range(num_choices))
    return Example(
        id=draw(TEXTS),
        audio=Path("/data") / f"{draw(st.integers(0, 99))}.wav",
        question=draw(TEXTS),
        answer=draw(st.sampled_from(choices)) if choices else draw(TEXTS),
        choices=choices,
        category=draw(st.none() | TEXTS),
        environment=draw(st.none() | TEXTS),
        transcript=draw(st.none() | TEXTS),
        num_speakers=draw(st.none() | st.integers(0, 99)),
    )


def to_row(example: Example, audio_field: str) -> dict[str, Any]:
    fields = ("id", "question", "answer", "category", "environment", "transcript", "num_speakers")
    row = {name: getattr(example, name) for name in fields}
    return row | {audio_field: str(example.audio), "choices": list(example.choices)}


def read_back(path: Path, format: str) -> list[Example]:
    return [replace(example, source="") for example in read_examples(path, format=format)]


@given(st.lists(drawn_examples(), min_size=1, max_size=3))
def test_a_table_reads_back_as_it_was_written(drawn: Sequence[Example]) -> None:
    rows = [to_row(example, "audio") for example in drawn]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "choices": "|".join(row["choices"])} for row in rows)
        assert read_back(path, "csv") == drawn


@given(st.lists(drawn_examples(), min_size=1, max_size=3), st.booleans())
def test_a_plain_list_reads_back_as_it_was_written(drawn: Sequence[Example], is_array: bool) -> None:
    rows = [to_row(example, "file") for example in drawn]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_bytes((json.dumps(rows, ensure_ascii=False) if is_array else lines).encode())
        assert read_back(path, "plain") == drawn
