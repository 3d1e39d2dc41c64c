"""Promises of each hard set about its scenes."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from tests.training_data import write_bank, write_sounds
from training.data.hard_sets import HARD_SETS, SNR_LEVELS_DB, builder_for
from training.data.questions import draw_example, possible_kinds
from training.data.scenes import Rendered
from training.data.sources import recordings as sounds
from training.data.sources.downloads import MissingDataError
from training.data.sources.sentences import line_from_text
from training.data.sources.voices import Bank, Utterance, same_speaker


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rendered]]:
    folder: Path = tmp_path_factory.mktemp("hard")
    bank, recordings = Bank(write_bank(folder / "bank", lines_per_voice=24)), write_sounds(folder / "sounds")
    return {
        name: [builder.draw_parts(seed) for seed in range(25)]
        for name, builder in ((name, builder_for(name, bank, recordings, "test")) for name in HARD_SETS)
    }


def _power(samples_S: np.ndarray) -> float:
    return float(np.mean(samples_S.astype(np.float64) ** 2))


def test_multi_speaker_scenes_have_four_to_six_different_people(scenes: dict[str, list[Rendered]]) -> None:
    counts = {len(rendered.scene.speakers) for rendered in scenes["hard-multi-speaker"]}
    assert counts == {4, 5, 6}
    for rendered in scenes["hard-multi-speaker"]:
        assert len({same_speaker(s.voice) for s in rendered.scene.speakers}) == len(rendered.scene.speakers)
        assert rendered.scene.duration_s < 30.0


@pytest.mark.parametrize("level_db", SNR_LEVELS_DB)
def test_each_level_is_exact_over_the_whole_clip(scenes: dict[str, list[Rendered]], level_db: int) -> None:
    for rendered in scenes[f"snr-{level_db}"]:
        assert rendered.scene.environment in sounds.labels()
        measured_db = 10 * np.log10(_power(rendered.speech_S) / _power(rendered.background_S))
        assert measured_db == pytest.approx(level_db, abs=0.01)
        assert rendered.scene.snr_db == level_db


def test_the_levels_are_of_the_same_scenes(scenes: dict[str, list[Rendered]]) -> None:
    for loud, soft in zip(scenes["snr-0"], scenes["snr-20"], strict=True):
        assert (loud.scene.transcript, loud.scene.recording) == (soft.scene.transcript, soft.scene.recording)
        loud_S, soft_S = (
            loud.background_S / _power(loud.speech_S) ** 0.5,
            soft.background_S / _power(soft.speech_S) ** 0.5,
        )
        np.testing.assert_allclose(loud_S, 10 * soft_S, rtol=1e-3, atol=1e-4)


def test_the_ratio_counts_pauses_so_that_speech_stands_higher_while_somebody_speaks(
    scenes: dict[str, list[Rendered]],
) -> None:
    for rendered in scenes["snr-5"]:
        active = np.zeros(len(rendered.speech_S), bool)
        for turn in rendered.scene.turns:
            active[int(turn.start_s * 16_000) : int(turn.end_s * 16_000)] = True
        during_db = 10 * np.log10(_power(rendered.speech_S[active]) / _power(rendered.background_S))
        assert during_db == pytest.approx(5.0 - 10 * np.log10(active.mean()), abs=0.01)
        assert during_db > 5.0


def test_overlapping_scenes_overlap_by_30_to_70_percent(scenes: dict[str, list[Rendered]]) -> None:
    for rendered in scenes["overlap"]:
        scene = rendered.scene
        assert 0.3 <= scene.overlap_share <= 0.7
        assert scene.has_overlap
        starts = [turn.start_s for turn in scene.turns]
        ends = [turn.end_s for turn in scene.turns]
        assert starts == sorted(starts) and ends == sorted(ends)
        for first, second in zip(scene.turns[::2], scene.turns[1::2], strict=True):
            assert first.speaker != second.speaker


def test_the_background_contradicts_what_a_speaker_is_asked_about(scenes: dict[str, list[Rendered]]) -> None:
    for rendered in scenes["contradicting-background"]:
        scene = rendered.scene
        assert scene.environment == sounds.BACKGROUND_SPEECH
        assert scene.background_line is not None and scene.contradicted is not None
        said = {q.answer for t in scene.turns for q in t.line.questions if q.question == scene.contradicted}
        background = {
            q.answer for q in line_from_text(scene.background_line).questions if q.question == scene.contradicted
        }
        assert said and background and not said & background
        assert "free" in possible_kinds(scene)
        example = draw_example(scene, random.Random(0), kind="free", with_choices=True)
        assert {example.answer} == said
        assert background & set(example.choices)
        assert "speaker" in example.question


@pytest.mark.parametrize("name", ["overlap", "contradicting-background"])
def test_a_bank_that_cannot_make_a_hard_set_says_so(name: str, tmp_path: Path) -> None:
    # Two voices with one line each, of very different lengths, without a question.
    for voice, text, num_samples in (("af_nova", "good morning everyone", 16_000), ("rms", "yes of course", 2_000)):
        (tmp_path / f"{voice}.0.i16").write_bytes(np.full(num_samples, 900, "<i2").tobytes())
        (tmp_path / f"{voice}.0.json").write_text(json.dumps([asdict(Utterance(voice, "man", text, 0, num_samples))]))
    builder = builder_for(name, Bank(tmp_path), write_sounds(tmp_path / "sounds"), "test")
    with pytest.raises(MissingDataError, match="too few lines of test voices"):
        builder.draw(0)


def test_an_unknown_hard_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'snr-3' is none of the hard sets hard-multi-speaker"):
        builder_for("snr-3", Bank(write_bank(tmp_path / "bank", lines_per_voice=1)), tmp_path, "test")
