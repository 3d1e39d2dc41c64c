"""The baseline's ready-made parts, on clips; skipped without the packages of the set `baseline`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.paths import CLIPS

pytest.importorskip("faster_whisper")

from tests.training_data import write_bank, write_sounds
from training.data.sources.voices import Bank
from training.evaluation.runners.cascade import Cascade, Fitted, Parts, cluster, fit, listen, pitch_hz, speakers_of
from training.evaluation.score import judge
from training.evaluation.suites.data_file import data_items
from training.evaluation.suites.item import Item


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("baseline"))


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return data_items(CLIPS / "truth.json")[0]


def test_groups_are_as_many_as_the_voices_are_apart() -> None:
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.standard_normal((32, 3)))[0].T
    true = [0, 0, 1, 2, 1, 2, 0, 1]
    embeddings = centres[true] + 0.05 * rng.standard_normal((8, 32))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = cluster(embeddings, 0.3)
    assert [[found[a] == found[b] for a in range(8)] for b in range(8)] == [[x == y for x in true] for y in true]
    assert len(set(cluster(embeddings, 2.0))) == 1 and len(set(cluster(embeddings, 0.0))) == 8
    assert cluster(np.zeros((0, 4)), 0.3) == []


@pytest.mark.parametrize("hertz", [95.0, 130.0, 210.0, 300.0])
def test_pitch_is_that_of_the_sound(hertz: float) -> None:
    times = np.arange(16_000) / 16_000
    voice = np.sum([np.sin(2 * np.pi * hertz * k * times) / k for k in range(1, 6)], axis=0)
    assert pitch_hz(0.1 * voice.astype(np.float32)) == pytest.approx(hertz, rel=0.03)
    assert pitch_hz(np.zeros(16_000, np.float32)) == 0.0


def test_clips_are_heard_and_answered_and_fitting_keeps_its_promises(
    parts: Parts, items: list[Item], tmp_path: Path
) -> None:
    # The voices of the substitute bank are tones: training runs, but learns nothing.
    bank = Bank(write_bank(tmp_path / "bank"))
    small = fit(parts, bank, write_sounds(tmp_path / "sounds"), num_fitted=40, num_tuned=6, use_tqdm=False)
    small.save(tmp_path / "cascade.npz")
    loaded = Fitted.load(tmp_path / "cascade.npz")
    assert loaded is not None and loaded.labels == small.labels and np.array_equal(loaded.weights, small.weights)
    assert Fitted.load(tmp_path / "none.npz") is None
    replace(small, labels=("rain",)).save(tmp_path / "old.npz")
    assert Fitted.load(tmp_path / "old.npz") is None
    assert set(loaded.measured) == {
        "environment_accuracy_left_out",
        "ridge",
        "speaker_count_accuracy",
        "sex_accuracy",
    }

    cascade = Cascade(parts, replace(loaded, threshold=0.32, pitch_hz=165.0))
    spoken = [item for item in items if item.truth.num_speakers]
    replies = [cascade.answer(item) for item in items]
    item_scores = [judge(item, reply, reads="perception") for item, reply in zip(items, replies, strict=True)]
    errors = sum(j.word_errors or 0 for j in item_scores) / sum(j.num_words or 0 for j in item_scores)
    counts = sum(j.count_is_right is True for j in item_scores)
    print(f"cascade: word error {errors:.3f}, counts {counts} of {len(spoken)}")
    assert errors <= 0.25
    assert counts >= 5
    assert all(reply.e2e_s and reply.choice is not None for reply in replies)
    assert all(j.is_strict is None and j.is_consistent is None for j in item_scores)
    (silent,) = (j for item, j in zip(items, item_scores, strict=True) if item.truth.num_speakers == 0)
    assert silent.invents_speech is False
    again = cascade.answer(items[0])
    assert again.prediction == replies[0].prediction and len(cascade.heard) == len(items)


def test_a_clip_without_speech_has_no_windows(parts: Parts) -> None:
    noise = 0.01 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    segments, windows = listen(parts, noise)
    assert segments == [] and windows.spans == [] and speakers_of(windows, 0.3) == []
