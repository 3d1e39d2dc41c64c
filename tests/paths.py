"""Paths of folders used by tests."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIPS = ROOT / "tests/assets/clips"
