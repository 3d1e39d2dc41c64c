"""Warnings about a decoded clip: codes, messages and seconds.

A clip is refused if its sound cannot be trusted. An odd but usable clip is decoded with a warning. The codes are a
closed set: programs branch on them and metrics use them as labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

AudioWarningCode = Literal[
    "several_tracks",
    "track_skipped",
    "channels_out_of_phase",
    "channels_differ",
    "size_mismatch",
    "audio_missing",
    "edit_list_applied",
    "junk_skipped",
    "damage_skipped",
    "padding_trimmed",
    "unused_sound",
    "silence_trimmed",
    "quiet_added",
    "too_short_for_words",
    "heard_in_pieces",
]
"""Every reason for a warning about a clip; `docs/audio.md` describes each."""

WARNING_CODES: frozenset[str] = frozenset(get_args(AudioWarningCode))


@dataclass(frozen=True)
class AudioWarning:
    """An oddity of a decoded clip.

    Attributes:
        code: Stable identifier for programs.
        message: One or two sentences for a person, without any text of the clip.
        seconds: Length of the affected sound; None if no length applies.
    """

    code: AudioWarningCode
    message: str
    seconds: float | None = None
