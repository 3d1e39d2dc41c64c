"""Define the hard sets: scenes of one known difficulty each, for the limits of a model's perception.

A hard set is a name with arguments of `SceneBuilder`; its scenes follow from seeds like all others. This module depends
on no model and no scoring.
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
    # A recorded background at exactly this SNR under one to three people. A seed gives the same scene at each level.
    **{
        f"snr-{level}": {"num_speakers": (1, 2, 3), "background": "recorded", "snr_db": (float(level), float(level))}
        for level in SNR_LEVELS_DB
    },
    # Two people speak at once for 30 to 70 % of the speech time.
    "overlap": {"num_speakers": (2, 3, 4), "overlap_share": (0.3, 0.7)},
    # A distant voice contradicts a speaker's answer; the question (kind `free`) is about the speaker.
    "contradicting-background": {"num_speakers": (1, 2), "background": "contradicting"},
}
"""Name -> arguments of `SceneBuilder`."""

ASKED_KIND: dict[str, str] = {"contradicting-background": "free"}
"""Hard set -> kind of question with its difficulty, for sets bound to one kind."""


def builder_for(suite: str, bank: Bank, sounds_folder: Path, split: Split) -> SceneBuilder:
    """Return the scene builder of a hard set.

    Raises:
        ValueError: no hard set has this name.
    """
    if suite not in HARD_SETS:
        raise ValueError(f"{suite!r} is none of the hard sets {', '.join(HARD_SETS)}")
    return SceneBuilder(bank, sounds_folder, split, **HARD_SETS[suite])
