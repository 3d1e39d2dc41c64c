"""Properties of scenes and of the examples drawn from them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from hyper_model.trace import render
from hyper_model.trace_parser import TraceFormat, parse_text
from tests.training_data import write_bank, write_sounds
from training.data.clips import scene_from_json, scene_to_json
from training.data.questions import KINDS, draw_example, possible_kinds
from training.data.scenes import SceneBuilder
from training.data.sources import recordings as sounds
from training.data.sources.voices import TEST_VOICES, VALIDATION_VOICES, Bank, list_voices, same_speaker
from training.evaluation.score import chance_accuracy


@pytest.fixture(scope="module")
def builders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SceneBuilder]:
    folder = tmp_path_factory.mktemp("scenes")
    bank, recordings = Bank(write_bank(folder / "bank")), write_sounds(folder / "sounds")
    return {split: SceneBuilder(bank, recordings, split) for split in ("train", "validation", "test")}


def test_no_voice_is_in_two_splits_and_the_named_test_voices_are_held_out() -> None:
    splits = {voice.name: voice.split for voice in list_voices()}
    assert {name for name, split in splits.items() if split == "test"} == TEST_VOICES
    assert {name for name, split in splits.items() if split == "validation"} == VALIDATION_VOICES
    assert {"af_nova", "af_sarah", "am_michael", "am_fenrir", "bf_emma", "bm_george", "slt", "rms"} == TEST_VOICES


def test_every_class_has_recordings_on_both_sides_and_no_file_is_on_both() -> None:
    files: dict[str, set[str]] = {"train": set(), "test": set()}
    labels: dict[str, set[str]] = {"train": set(), "test": set()}
    for recording in sounds.list_recordings():
        files[recording.split] |= set(recording.files)
        labels[recording.split].add(recording.label)
    assert not files["train"] & files["test"]
    assert labels["train"] == labels["test"] == set(sounds.labels())
    assert len(sounds.labels()) >= 16


def test_a_seed_gives_the_same_scene_and_sound_again(builders: dict[str, SceneBuilder]) -> None:
    for seed in range(10):
        scene, samples_S = builders["train"].draw(seed)
        again, again_S = builders["train"].draw(seed)
        assert scene == again
        np.testing.assert_array_equal(samples_S, again_S)


def test_scenes_are_well_formed(builders: dict[str, SceneBuilder]) -> None:
    for seed in range(200):
        scene, samples_S = builders["train"].draw(seed)
        assert samples_S.dtype == np.float32
        assert np.abs(samples_S).max() <= 1.0
        assert scene.duration_s == pytest.approx(len(samples_S) / 16_000)
        assert [s.id for s in scene.speakers] == [f"S{i + 1}" for i in range(len(scene.speakers))]
        assert list(dict.fromkeys(turn.speaker for turn in scene.turns)) == [s.id for s in scene.speakers]
        assert len({same_speaker(s.voice) for s in scene.speakers}) == len(scene.speakers)
        assert (scene.snr_db is None) == (scene.environment == sounds.QUIET or not scene.turns)
        assert (scene.background_line is not None) == (scene.environment == sounds.BACKGROUND_SPEECH)
        assert scene_from_json(scene_to_json(scene)) == scene


def test_test_scenes_use_only_held_out_voices_and_recordings(builders: dict[str, SceneBuilder]) -> None:
    held_out = {name for r in sounds.list_recordings() if r.split == "test" for name in r.files}
    for seed in range(100):
        scene, _ = builders["test"].draw(seed)
        assert {s.voice for s in scene.speakers} <= TEST_VOICES
        assert scene.recording is None or scene.recording in held_out


def test_the_number_of_turns_does_not_give_away_the_number_of_people(builders: dict[str, SceneBuilder]) -> None:
    people = Counter(
        len(scene.speakers)
        for scene, _ in (builders["train"].draw(seed) for seed in range(600))
        if len(scene.turns) == 4
    )
    assert set(people) == {1, 2, 3, 4}
    assert max(people.values()) < 0.7 * people.total()


def test_one_voice_scenes_have_one_speaker_with_the_asked_number_of_turns(builders: dict[str, SceneBuilder]) -> None:
    test = builders["test"]
    builder = SceneBuilder(test.bank, test.folder, "test", one_voice_turns=4)
    for seed in range(20):
        scene, _ = builder.draw(seed)
        assert (len(scene.speakers), len(scene.turns)) == (1, 4)


def test_examples_of_every_kind_carry_a_strict_trace_whose_answer_is_the_gold_one(
    builders: dict[str, SceneBuilder],
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(300):
        scene, _ = builders["train"].draw(seed)
        rng = random.Random(seed)
        for kind in possible_kinds(scene):
            example = draw_example(scene, rng, kind=kind)
            seen[kind] += 1
            parsed = parse_text(render(example.trace))
            assert parsed.format is TraceFormat.STRICT
            assert parsed.trace == example.trace
            assert example.answer in (example.trace.final_answer or "")
            if example.choices:
                assert len(set(example.choices)) == len(example.choices) >= 2
                assert example.choices.count(example.answer) == 1
    assert set(seen) == set(KINDS)


def test_the_right_choice_stands_anywhere(builders: dict[str, SceneBuilder]) -> None:
    scene, _ = builders["train"].draw(3)
    rng = random.Random(0)
    examples = [draw_example(scene, rng, kind="environment", with_choices=True) for _ in range(400)]
    places = Counter(example.choices.index(example.answer) for example in examples)
    assert set(places) == {0, 1, 2, 3, 4}


def test_chance_is_the_mean_of_one_over_the_number_of_choices(builders: dict[str, SceneBuilder]) -> None:
    scene, _ = builders["train"].draw(3)
    rng = random.Random(0)
    examples = [draw_example(scene, rng, kind="present", with_choices=True) for _ in range(5)]
    assert chance_accuracy([example.choices for example in examples]) == 0.5
