"""Talk: a clip is reproducible from its seed, keeps to its split, and matches its transcript."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hyper_model.audio import SAMPLE_RATE_HZ
from tests.training_data import write_bank, write_sounds, write_wordnet
from training.data.sources.downloads import SOUNDS_FOLDER, TEXTS_FOLDER, MissingDataError
from training.data.sources.voices import TEST_VOICES, Bank
from training.data.talk import LONGEST_S, TalkBuilder


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> TalkBuilder:
    """Talk with the voices of a bank, without a synthesizer."""
    work = tmp_path_factory.mktemp("talk")
    write_wordnet(work / TEXTS_FOLDER)
    write_sounds(work / SOUNDS_FOLDER)
    return TalkBuilder(work, "train", bank=Bank(write_bank(work / "bank")), engines=("kokoro",))


def test_a_clip_follows_from_its_seed_alone(builder: TalkBuilder) -> None:
    first = [builder.draw(seed) for seed in range(12)]
    again = [builder.draw(seed) for seed in reversed(range(12))]
    for (scene, samples_S), (other_scene, other_S) in zip(first, reversed(again), strict=True):
        assert scene == other_scene
        assert np.array_equal(samples_S, other_S)
    assert len({samples_S.tobytes() for _, samples_S in first}) == len(first)


def test_turns_lie_inside_the_clip_in_order_and_speakers_are_numbered_as_they_begin(builder: TalkBuilder) -> None:
    for seed in range(60):
        scene, samples_S = builder.draw(seed)
        assert samples_S.dtype == np.float32 and np.abs(samples_S).max() <= 1.0
        assert len(samples_S) == round(scene.duration_s * SAMPLE_RATE_HZ)
        ends_s = [0.0, *(turn.end_s for turn in scene.turns)]
        assert all(end_s < turn.start_s for end_s, turn in zip(ends_s, scene.turns, strict=False))
        assert ends_s[-1] < scene.duration_s
        assert sum(turn.end_s - turn.start_s for turn in scene.turns) <= LONGEST_S
        begun = list(dict.fromkeys(turn.speaker for turn in scene.turns))
        assert begun == [speaker.id for speaker in scene.speakers] == [f"S{i + 1}" for i in range(len(begun))]


def test_training_talk_has_no_test_voice_and_some_clips_hold_no_speech(builder: TalkBuilder) -> None:
    scenes = [builder.draw(seed)[0] for seed in range(150)]
    assert TEST_VOICES.isdisjoint(speaker.voice for scene in scenes for speaker in scene.speakers)
    assert any(not scene.turns and not scene.transcript for scene in scenes)
    assert {len(scene.turns) for scene in scenes} >= {1, 2, 3, 4, 5}
    levels_db = [scene.snr_db for scene in scenes if scene.snr_db is not None]
    assert levels_db and all(0.0 <= level_db <= 20.0 for level_db in levels_db)


def test_a_split_without_a_voice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="no train voice of kokoro"):
        TalkBuilder(tmp_path, "train", engines=("kokoro",))
