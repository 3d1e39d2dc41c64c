"""Names the hard sets: scenes of one known difficulty each, for measuring where a model stops hearing.

A hard set is a name and what its builder is told; the scenes follow from seeds as all scenes do. Knows nothing of
models or of how answers are item_scores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.data.scenes import SceneBuilder
from training.data.sources.voices import Bank, Split

SNR_LEVELS_DB = (20, 15, 10, 5, 0)

HARD_SETS: dict[str, dict[str, Any]] = {
    # More than three people ("hard" of arXiv 2604.14806), over any background.
    "hard-multi-speaker": {"num_speakers": (4, 5, 6)},
    # A recorded background at exactly this level under one to three people; the same seed gives the same scene at each.
    **{
        f"snr-{level}": {"num_speakers": (1, 2, 3), "background": "recorded", "snr_db": (float(level), float(level))}
        for level in SNR_LEVELS_DB
    },
    # Two people speak at once for 30 to 70 % of the time in which anybody does.
    "overlap": {"num_speakers": (2, 3, 4), "overlap_share": (0.3, 0.7)},
    # A distant voice answers a question otherwise than the speaker who is asked about (question kind `free`).
    "contradicting-background": {"num_speakers": (1, 2), "background": "contradicting"},
}
"""Name -> arguments of `SceneBuilder`."""

ASKED_KIND: dict[str, str] = {"contradicting-background": "free"}
"""The kind of question to which a hard set's difficulty belongs, where it belongs to one."""


def builder_for(suite: str, bank: Bank, sounds_folder: Path, split: Split) -> SceneBuilder:
    """Make the builder of a hard set's scenes.

    Raises:
        ValueError: no hard set has this name.
    """
    if suite not in HARD_SETS:
        raise ValueError(f"{suite!r} is none of the hard sets {', '.join(HARD_SETS)}")
    return SceneBuilder(bank, sounds_folder, split, **HARD_SETS[suite])
