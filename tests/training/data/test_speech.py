"""Speech clips: one voice or none, its own lines, a known background, and unspoken wrong choices."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from tests.training_data import write_bank, write_sounds
from training.data.clips import scene_from_json, scene_to_json
from training.data.questions import draw_example, possible_kinds
from training.data.scenes import Scene
from training.data.sources import recordings as sounds
from training.data.sources.open_text import content_words, split_of
from training.data.sources.voices import TEST_VOICES, Bank
from training.data.speech import SpeechBuilder


@pytest.fixture(scope="module")
def builders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SpeechBuilder]:
    folder = tmp_path_factory.mktemp("speech")
    bank, recordings = Bank(write_bank(folder / "bank", lines_per_voice=24)), write_sounds(folder / "sounds")
    return {split: SpeechBuilder(bank, recordings, split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def drawn(builders: dict[str, SpeechBuilder]) -> list[tuple[Scene, np.ndarray]]:
    return [builders["train"].draw(seed) for seed in range(400)]


def test_clips_are_well_formed_and_drawn_the_same_again(
    builders: dict[str, SpeechBuilder], drawn: list[tuple[Scene, np.ndarray]]
) -> None:
    for seed, (scene, samples_S) in enumerate(drawn):
        assert (samples_S.dtype, len(samples_S)) == (np.float32, round(scene.duration_s * 16_000))
        assert np.isfinite(samples_S).all() and 0.0 < np.abs(samples_S).max() <= 0.99
        assert len(scene.speakers) <= 1 and len(scene.turns) <= 5 and not scene.has_overlap
        assert sum(turn.end_s - turn.start_s for turn in scene.turns[1:]) < 15.0
        assert not {turn.line.text for turn in scene.turns} & set(scene.other_lines)
        assert scene_from_json(scene_to_json(scene)) == scene
        if seed < 20:
            again, again_S = builders["train"].draw(seed)
            assert again == scene
            np.testing.assert_array_equal(again_S, samples_S)


def test_clips_come_in_the_stated_shares(drawn: list[tuple[Scene, np.ndarray]]) -> None:
    scenes = [scene for scene, _ in drawn]
    spoken = [scene for scene in scenes if scene.turns]
    assert 0.03 < 1 - len(spoken) / len(scenes) < 0.1
    assert 0.5 < sum(s.environment == sounds.QUIET for s in spoken) / len(spoken) < 0.7
    assert 0.25 < sum(s.channel is not None for s in scenes) / len(scenes) < 0.42
    assert all(5.0 <= s.snr_db <= 20.0 for s in spoken if s.snr_db is not None)
    assert all((s.recording is None) == (s.environment == sounds.QUIET) for s in scenes)
    num_lines = Counter(len(scene.turns) for scene in spoken)
    assert 0.3 < num_lines[1] / len(spoken) < 0.6
    assert sum(num_lines[count] for count in (3, 4, 5)) > 0.25 * len(spoken) and num_lines[5] >= 5
    is_open = Counter(turn.line.is_open for scene in spoken for turn in scene.turns)
    assert is_open[True] > 0.75 * is_open.total()


def test_held_out_clips_have_held_out_voices_lines_and_recordings_and_no_channel(
    builders: dict[str, SpeechBuilder],
) -> None:
    held_out = {name for r in sounds.list_recordings() if r.split == "test" for name in r.files}
    for seed in range(60):
        scene, _ = builders["test"].draw(seed)
        assert {s.voice for s in scene.speakers} <= TEST_VOICES
        assert scene.recording is None or scene.recording in held_out
        assert scene.channel is None
        for text in [*(t.line.text for t in scene.turns if t.line.is_open), *scene.other_lines]:
            assert split_of(text) == "test"


def test_questions_about_open_lines_offer_nothing_else_that_is_said(drawn: list[tuple[Scene, np.ndarray]]) -> None:
    asked = Counter()
    for seed, (scene, _) in enumerate(drawn):
        rng = random.Random(seed)
        said = {word.lower() for turn in scene.turns for word in turn.line.text.split()}
        for kind in possible_kinds(scene):
            example = draw_example(scene, rng, kind=kind, with_choices=True)
            asked[kind] += 1
            assert example.choices.count(example.answer) == 1
            if kind == "word":
                assert [choice for choice in example.choices if choice.lower() in said] == [example.answer]
            if kind == "order":
                assert example.answer == scene.turns[0].line.text
    assert {"word", "says", "environment", "count"} <= set(asked)
    assert asked["word"] > 300


def test_wrong_words_are_as_long_and_as_common_as_the_right_one(drawn: list[tuple[Scene, np.ndarray]]) -> None:
    for seed, (scene, _) in enumerate(drawn):
        if not scene.turns or not all(turn.line.is_open for turn in scene.turns):
            continue
        example = draw_example(scene, random.Random(seed), kind="word")
        pool = {word for line in scene.other_lines for word in content_words(line)}
        for choice in example.choices:
            assert choice == example.answer or choice in pool
            assert abs(len(choice) - len(example.answer)) <= 3
