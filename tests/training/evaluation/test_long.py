"""The suite of long recordings: its truths are those of the scenes, and its figures count what they say."""

from __future__ import annotations

import numpy as np
import pytest

from hyper_model.audio import SAMPLE_RATE_HZ
from tests.training_data import write_bank, write_sounds
from training.data.scenes import SceneBuilder
from training.data.sources.voices import Bank
from training.evaluation.runners.recordings import Asker, flac, overlaps
from training.evaluation.suites.long import KINDS, LongRecording, draw_questions, draw_recording
from training.text_metrics import words


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> SceneBuilder:
    folder = tmp_path_factory.mktemp("long")
    bank, sounds = write_bank(folder / "bank", lines_per_voice=12), write_sounds(folder / "sounds")
    return SceneBuilder(Bank(bank), sounds, "test")


@pytest.fixture(scope="module")
def recording(builder: SceneBuilder) -> LongRecording:
    return draw_recording(builder, 2, 0)


def test_a_recording_follows_from_its_number_and_holds_its_scenes(
    builder: SceneBuilder, recording: LongRecording
) -> None:
    assert len(recording.samples_S) == 120 * SAMPLE_RATE_HZ
    assert np.array_equal(draw_recording(builder, 2, 0).samples_S, recording.samples_S)
    assert not np.array_equal(draw_recording(builder, 2, 1).samples_S, recording.samples_S)
    ends = [start_s + scene.duration_s for start_s, scene in recording.scenes]
    starts = [start_s for start_s, _ in recording.scenes]
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False))
    assert all(turn.end_s <= 120 for turn in recording.turns)


def test_each_answer_is_the_truth_of_the_scenes(recording: LongRecording) -> None:
    said = {turn.line.text: turn for turn in recording.turns}
    spoken = [word for turn in recording.turns for word in words(turn.line.text)]
    environments = {scene.environment for _, scene in recording.scenes}
    numbers = ("never", "once", "twice", "three times", "four times")
    questions = draw_questions(recording, 6)
    assert {question.kind for question in questions} == set(KINDS)
    for question in questions:
        truth = question.truth
        match question.kind:
            case "needle":
                assert [choice for choice in truth.choices if choice in said] == [truth.answer]
            case "order":
                assert truth.answer == min(truth.choices, key=lambda choice: said[choice].start_s)
            case "count":
                assert truth.answer == numbers[spoken.count(truth.question.split('"')[1])]
            case "absence":
                label = truth.question.removeprefix("Is ").removesuffix(" in the background?")
                assert (truth.answer == "yes") == (label in environments) == bool(question.times)
            case _:
                one, other = truth.question.split('"')[1::2]
                assert (truth.answer == "yes") == (spoken.index(one) < spoken.index(other))


def test_words_near_cuts_and_lost_seconds_are_counted(recording: LongRecording) -> None:
    asker = Asker("http://127.0.0.1:1")
    middle_s = 60.0
    spoken = [
        [word for turn in recording.turns for word in words(turn.line.text) if side(turn.start_s)] for side in SIDES
    ]
    timeline = [
        {"start_s": 0.0, "end_s": middle_s, "status": "done", "transcript": " ".join(spoken[0])},
        {"start_s": middle_s, "end_s": 110.0, "status": "done", "transcript": ""},
        {"start_s": 110.0, "end_s": 120.0, "status": "failed", "transcript": None},
    ]
    asker.compare_words(recording, timeline)
    found = asker.found
    assert found.near[1] + found.elsewhere[1] == sum(map(len, spoken))
    assert found.elsewhere[0] + found.near[0] >= len(spoken[1])
    assert found.lost_s == 10
    asker.close()


SIDES = (lambda start_s: start_s < 60, lambda start_s: start_s >= 60)


def test_a_window_holds_a_time_if_they_overlap() -> None:
    window = {"start_s": 10.0, "end_s": 20.0}
    assert overlaps(window, [(0, 5), (19, 25)])
    assert not overlaps(window, [(0, 10), (20, 25)])
    assert flac(np.zeros(1600, np.float32))[:4] == b"fLaC"
