"""The items of a suite, and the description of a suite.

Items have parts, each the subject of some figures:

- `main`: the normal mixture.
- `one_voice`: four turns of one voice.
- `speech_free`: no speech.
- `snr_20` to `snr_0`: the same scenes at five background levels.
- `swapped`: questions of `main` about the clips of other items; a model with real perception answers them by chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hyper_model.audio import WINDOW_S, Waveform, decode, require_single_window
from hyper_model.errors import HyperError
from hyper_model.files import sha256_of
from training.data.sources.voices import Bank, Split
from training.data.truth import Truth


@dataclass(frozen=True, eq=False)
class Item:
    """One question about one clip, and the truth; the answering system gets only question, choices and audio.

    Attributes:
        id: Equal in all runs with this question and clip.
        clip: The samples, float32 [S], or the path of the file.
        voice, background: Cluster names: the first speaker's voice, and the background's original recording. For
            unknown ones, both are the clip.
        groups: Keys of broken-down figures, such as {"kind": "count", "class": "water", "people": "2"}.
        is_recorded: True if the background is a recording.
        num_turns: None if unknown.
    """

    id: str
    part: str
    truth: Truth
    clip: np.ndarray | Path
    voice: str
    background: str
    groups: Mapping[str, str] = field(default_factory=dict[str, str])
    is_recorded: bool = False
    num_turns: int | None = None

    def load(self, *, cuts_long: bool = False) -> np.ndarray:
        """Return the samples, float32 [S] at 16 kHz.

        Args:
            cuts_long: Take the beginning of a clip longer than one window; otherwise the clip is refused.

        Raises:
            HyperError: The file cannot be read or decoded, or the clip is too long.
        """
        if isinstance(self.clip, np.ndarray):
            return self.clip
        try:
            data = self.clip.read_bytes()
        except OSError as error:
            raise HyperError(f"{self.clip}: {error.strerror or error}") from error
        waveform = decode(data)
        if cuts_long:
            return waveform.slice(0, min(waveform.duration_s, WINDOW_S)).samples_S
        require_single_window(waveform)
        return waveform.samples_S

    def digest(self) -> str:
        """Return a checksum of question, choices, answer and audio, to compare the items of two runs.

        A file counts by its bytes, since another one may take its name; a missing file counts by its name.
        """
        truth = self.truth
        if isinstance(self.clip, np.ndarray):
            sound = Waveform(self.clip).sha256
        else:
            try:
                sound = sha256_of(self.clip)
            except OSError:
                sound = self.clip.name
        return hashlib.sha256(repr((truth.question, truth.choices, truth.answer, sound)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class SuiteRequest:
    """Sources and size of a suite's items.

    Attributes:
        num_items: None takes the suite's default.
        open_bank: Open the bank of a split's voices, and build missing voices.
        sounds_folder: Recordings of backgrounds.
        data, audio_root: A data set's file and the start of its relative audio paths; for suites with `reads_file`.
        on_faults: Called with the errors of left-out rows.
    """

    num_items: int | None
    open_bank: Callable[[Split], Bank]
    sounds_folder: Path
    data: Path | None = None
    audio_root: Path | None = None
    on_faults: Callable[[Sequence[HyperError]], None] = lambda faults: None


@dataclass(frozen=True)
class Suite:
    """A suite of questions.

    Attributes:
        description: For `--help`.
        items: Draw or read the items.
        split: Split of the voices and recordings of a suite of scenes; None for other suites.
        reads_file: True if the items come from a user's file.
        is_recordings: True if the suite asks a service about long recordings, and has no items of its own.
    """

    description: str
    items: Callable[[SuiteRequest], list[Item]]
    split: Split | None = None
    reads_file: bool = False
    is_recordings: bool = False
