"""Parts of the benchmark: fresh clips, ratios, and the environment of measured processes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import soundfile

from hyper_model.audio import decode
from hyper_model.manifest import GATED_SECTIONS
from loadtests.bench import GATE, Figure, Rounds, table, time_chat
from loadtests.client import QA_PATH
from loadtests.clips import SAMPLE_RATE_HZ, FreshClips, wav
from loadtests.target import environment
from tests.paths import CLIPS
from tests.serving import Live, tone

CHAT_PATH = "/v1/chat/completions"


def test_each_seed_is_a_clip_of_its_own_and_the_same_every_time() -> None:
    fresh = FreshClips(CLIPS)
    clips = [fresh.make(seed) for seed in range(20)]
    assert {len(clip) for clip in clips} == {5 * SAMPLE_RATE_HZ} and {clip.dtype for clip in clips} == {
        np.dtype(np.float32)
    }
    assert len({clip.tobytes() for clip in clips}) == 20
    assert np.array_equal(FreshClips(CLIPS).make(7), clips[7])
    assert decode(wav(clips[0])).samples_S == pytest.approx(clips[0], abs=1e-4)


def test_a_folder_without_long_recordings_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "short.wav", np.zeros(SAMPLE_RATE_HZ), SAMPLE_RATE_HZ)
    with pytest.raises(FileNotFoundError, match="more than 5 s"):
        FreshClips(tmp_path)


def test_a_figure_is_the_ratio_of_medians_beside_those_of_single_rounds() -> None:
    rounds = Rounds()
    for ours, theirs in ((1.0, 4.0), (2.0, 4.0), (9.0, 6.0)):
        rounds.add(ours, theirs)
    figure = rounds.figure("some_ratio", "<= 1")
    assert figure == Figure("some_ratio", 0.5, 0.25, 1.5, "<= 1")
    assert table([figure]).splitlines()[1].split() == ["some_ratio", "0.5", "0.25", "to", "1.5", "<=", "1"]


def test_the_same_questions_are_asked_by_chat_and_by_form(live: Live) -> None:
    before = {path: live.metric("hyper_requests_total", endpoint=path) for path in (QA_PATH, CHAT_PATH)}
    pairs = asyncio.run(time_chat(live.url, [tone(), tone(2.0)]))
    assert len(pairs) == 2 and min(min(pair) for pair in pairs) > 0
    asked = {path: live.metric("hyper_requests_total", endpoint=path) - before[path] for path in before}
    # One more by form, which fills the cache.
    assert asked == {QA_PATH: 4, CHAT_PATH: 2}


def test_the_gate_that_is_measured_works_in_every_section_that_may_pause() -> None:
    assert GATE["sections"] == list(GATED_SECTIONS)


def test_what_configures_the_service_of_whoever_measures_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPER_ENGINE", "scripted")
    monkeypatch.setenv("SOMETHING_ELSE", "stays")
    found = environment(HYPER_PORT="1")
    assert "HYPER_ENGINE" not in found and (found["SOMETHING_ELSE"], found["HYPER_PORT"]) == ("stays", "1")
