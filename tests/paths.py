"""Names the folders that tests read."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIPS = ROOT / "tests/assets/clips"
