"""The programs in examples/ against the service over the scripted engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import CLIPS, ROOT
from tests.serving import Live, tone

CLIP = str(CLIPS / "one-voice.mp3")
LONG = "{long}"

RUNS = {
    "ask.py": [
        ((CLIP, "What is heard?"), "answer: 9.6 s of loud sound\nbackground: loud sound\nwords: \n"),
        ((CLIP, "Which?", "yes", "no"), " no\nbackground:"),
    ],
    "stream.py": [((CLIP, "What is heard?"), "REASONING: This engine follows a script")],
    "many_clips.py": [
        (("What is heard?", CLIP, __file__), f"{CLIP}: 9.6 s of loud sound\n{__file__}: no answer: This is not audio")
    ],
    "errors.py": [
        ((CLIP, "What is heard?"), "9.6 s of loud sound\n"),
        ((LONG, "What is heard?"), "The clip has 31"),
        ((__file__, "What is heard?"), "unsupported_audio: This is not audio"),
    ],
}


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(live: Live, name: str, tmp_path: Path) -> None:
    long = tmp_path / "long.wav"
    long.write_bytes(tone(31.0))
    for arguments, words in RUNS[name]:
        command = [sys.executable, str(ROOT / "examples" / name), *(each.format(long=long) for each in arguments)]
        environment = {**os.environ, "HYPER_URL": live.url}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert words in done.stdout and not done.stderr


def test_every_example_is_run() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(RUNS)
