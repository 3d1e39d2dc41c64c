"""Draw talk: clips of one to five lines in one to three voices, each a function of its seed alone.

The clips teach a decoder to transcribe. They have open text, sentence patterns and unpredictable lines, 1 to 15 s in
all. They pass through rooms, telephones and codecs, over noise of 0 to 20 dB, with silence around the lines. Some have
no speech. Fast synthesizers speak each line on demand. A bank of utterances adds the voices of slow ones.

Axes: S samples at 16 kHz. This module depends on no model.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import soxr

from hyper_model.audio import SAMPLE_RATE_HZ, mix
from training.data.channels import degrade
from training.data.scenes import Scene, SceneSpeaker, Turn, tilt_spectrum
from training.data.sources import recordings as sounds
from training.data.sources.downloads import SOUNDS_FOLDER, TEXTS_FOLDER, MissingDataError
from training.data.sources.open_text import Split, draw_text
from training.data.sources.sentences import draw_line, line_from_text
from training.data.sources.unpredictable import draw_unpredictable
from training.data.sources.voices import Bank, Voice, draw_pace, held_out_lines, list_voices, speak

LONGEST_S = 15.0
_NUM_LINES, _NUM_LINES_WEIGHTS = (1, 2, 3, 4, 5), (30, 26, 20, 14, 10)
_NUM_VOICES, _NUM_VOICES_WEIGHTS = (1, 2, 3), (62, 28, 10)
_ENGINE_WEIGHTS = {"kokoro": 40, "hibari": 40, "flite": 30, "espeak": 16}
_SOURCES, _SOURCE_WEIGHTS = ("open", "pattern", "unpredictable"), (46, 14, 40)
_SILENT_SHARE, _LONG_SILENCE_SHARE = 0.05, 0.12
_NOISE_SHARE, _RECORDING_SHARE, _CHANNEL_SHARE = 0.5, 0.5, 0.35
_SEED_OF_BANK = 0


class TalkBuilder:
    """Source of talk clips of one split.

    Args:
        assets: Folder of the fetched texts, recordings and voices.
        split: Split of the voices and lines.
        bank: Utterances of slow synthesizers; None leaves their voices out.
        text_split: Split of the lines, if another. Sentence patterns are then left out, since they have no split.
        engines: Synthesizers to use, of those with voices.

    Raises:
        MissingDataError: No voice is left.
    """

    def __init__(
        self,
        assets: Path,
        split: Split,
        *,
        bank: Bank | None = None,
        text_split: Split | None = None,
        engines: Collection[str] = tuple(_ENGINE_WEIGHTS),
    ) -> None:
        self.assets, self.bank = assets, bank
        self.split: Split = split
        self.text_split: Split = text_split or split
        self.texts, self.sounds = assets / TEXTS_FOLDER, assets / SOUNDS_FOLDER
        self.voices: dict[str, list[Voice]] = {}
        banked = {voice.name for voice in bank.voices(split)} if bank else set[str]()
        for voice in list_voices():
            is_there = voice.engine != "kokoro" or voice.name in banked
            if voice.split == split and voice.engine in engines and is_there:
                self.voices.setdefault(voice.engine, []).append(voice)
        if not self.voices:
            raise MissingDataError(f"no {split} voice of {', '.join(engines)}: build the bank first (make bank)")
        wanted = "test" if split == "test" else "train"
        self.recordings = tuple(r for r in sounds.list_recordings() if r.split == wanted and self._has(r))
        # Evaluation lines are excluded from training, spoken or written.
        self.held_out = held_out_lines(seed=_SEED_OF_BANK) if split == "train" else frozenset[str]()

    def _has(self, recording: sounds.Recording) -> bool:
        return all((self.sounds / name).exists() for name in recording.files)

    def draw(self, seed: int) -> tuple[Scene, np.ndarray]:
        """Draw one clip: its truth and its audio, float32 [S]."""
        rng = random.Random(f"talk/{self.split}/{seed}")
        is_silent = rng.random() < _SILENT_SHARE
        spoken = [] if is_silent else self._draw_lines(rng)
        speakers, turns, speech_S = _place(rng, spoken)
        mixture_S, recording, snr_db = self._add_noise(rng, speech_S)
        channel = None
        if self.split == "train" and mixture_S.any() and rng.random() < _CHANNEL_SHARE:
            mixture_S, channel = degrade(mixture_S, rng)
        scene = Scene(
            seed=seed,
            split=self.split,
            environment=recording.label if recording else sounds.QUIET,
            recording=recording.files[0] if recording else None,
            snr_db=snr_db,
            speakers=speakers,
            turns=turns,
            background_line=None,
            has_overlap=False,
            duration_s=len(mixture_S) / SAMPLE_RATE_HZ,
            channel=channel,
        )
        return scene, _set_level(rng, mixture_S)

    def _draw_voice(self, rng: random.Random) -> Voice:
        engine = rng.choices(list(self.voices), [_ENGINE_WEIGHTS[name] for name in self.voices])[0]
        voice = rng.choice(self.voices[engine])
        if self.split == "train" and engine != "kokoro":
            # A little faster or slower, a voice sounds like another one.
            return replace(voice, playback=voice.playback * rng.uniform(0.95, 1.05))
        return voice

    def _draw_text(self, rng: random.Random) -> str:
        while True:
            match rng.choices(_SOURCES, _SOURCE_WEIGHTS)[0]:
                case "open":
                    text = draw_text(rng, self.text_split, self.texts)
                case "pattern":
                    text = draw_line(rng).text
                    if self.text_split != self.split:
                        continue
                case _:
                    text = draw_unpredictable(rng, self.text_split, self.texts)
            if text not in self.held_out:
                return text

    def _speak(self, rng: random.Random, voice: Voice) -> tuple[str, np.ndarray]:
        if voice.engine == "kokoro":
            assert self.bank is not None
            utterance, path = rng.choice(self.bank.utterances[voice.name])
            return utterance.text, self.bank.samples(utterance, path)
        text = self._draw_text(rng)
        return text, speak(text, voice, self.assets, draw_pace(voice, rng))

    def _draw_lines(self, rng: random.Random) -> list[tuple[Voice, str, np.ndarray]]:
        """Draw the lines of a clip, at most `LONGEST_S` together, with a separate microphone per voice."""
        count = rng.choices(_NUM_VOICES, _NUM_VOICES_WEIGHTS)[0]
        voices = [(self._draw_voice(rng), rng.uniform(-0.4, 0.4)) for _ in range(count)]
        lines: list[tuple[Voice, str, np.ndarray]] = []
        num_samples = 0
        for number in range(rng.choices(_NUM_LINES, _NUM_LINES_WEIGHTS)[0]):
            voice, tilt = voices[number] if number < count else rng.choice(voices)
            text, samples_S = self._speak(rng, voice)
            num_samples += len(samples_S)
            if num_samples > LONGEST_S * SAMPLE_RATE_HZ:
                break
            lines.append((voice, text, tilt_spectrum(samples_S, tilt) if self.split == "train" else samples_S))
        return lines or self._draw_lines(rng)

    def _add_noise(
        self, rng: random.Random, speech_S: np.ndarray
    ) -> tuple[np.ndarray, sounds.Recording | None, float | None]:
        """Add colored noise, a recording, or nothing to the speech."""
        if rng.random() >= _NOISE_SHARE:
            return speech_S, None, None
        recording = None
        if self.recordings and rng.random() < _RECORDING_SHARE:
            recording = rng.choice(self.recordings)
            background_S = self._read(rng, recording, len(speech_S))
        else:
            background_S = _colored_noise(rng, len(speech_S))
        if not background_S.any():
            return speech_S, None, None
        if not speech_S.any():
            return background_S * np.float32(0.05 / max(1e-6, _rms(background_S))), recording, None
        snr_db = rng.uniform(0.0, 20.0)
        return mix(speech_S, background_S, snr_db), recording, snr_db

    def _read(self, rng: random.Random, recording: sounds.Recording, num_samples: int) -> np.ndarray:
        samples_S = sounds.load(self.sounds / rng.choice(recording.files))
        if self.split == "train":
            samples_S = soxr.resample(samples_S, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ * rng.uniform(0.8, 1.25), quality="LQ")
        start = rng.randrange(max(1, len(samples_S) - num_samples))
        return np.resize(samples_S[start:], num_samples) if len(samples_S) else np.zeros(num_samples, np.float32)


def _place(
    rng: random.Random, lines: list[tuple[Voice, str, np.ndarray]]
) -> tuple[tuple[SceneSpeaker, ...], tuple[Turn, ...], np.ndarray]:
    """Place lines one after the other with silence around them; without lines, return 1 to 8 s of silence."""

    def pause_s(longest_s: float) -> float:
        return rng.uniform(1.0, 3.0) if rng.random() < _LONG_SILENCE_SHARE else rng.uniform(0.05, longest_s)

    ids: dict[str, SceneSpeaker] = {}
    turns: list[Turn] = []
    cursor_s = pause_s(0.6)
    for voice, text, samples_S in lines:
        speaker = ids.setdefault(voice.name, SceneSpeaker(f"S{len(ids) + 1}", voice.name, voice.sex))
        end_s = cursor_s + len(samples_S) / SAMPLE_RATE_HZ
        turns.append(Turn(speaker.id, line_from_text(text), cursor_s, end_s))
        cursor_s = end_s + pause_s(0.8)
    duration_s = cursor_s if turns else rng.uniform(1.0, 8.0)
    speech_S = np.zeros(round(duration_s * SAMPLE_RATE_HZ), np.float32)
    for turn, (_, _, samples_S) in zip(turns, lines, strict=True):
        begin = round(turn.start_s * SAMPLE_RATE_HZ)
        speech_S[begin : begin + len(samples_S)] = samples_S[: len(speech_S) - begin]
    return tuple(ids.values()), tuple(turns), speech_S


def _rms(samples_S: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(samples_S))))


def _colored_noise(rng: random.Random, num_samples: int) -> np.ndarray:
    """Return noise between white and brown, with root mean square 1."""
    # A power of two, since transforms of other lengths take several times as long.
    size = 1 << max(1, num_samples - 1).bit_length()
    noise = np.random.default_rng(rng.randrange(2**32))
    spectrum = noise.standard_normal(size // 2 + 1) + 1j * noise.standard_normal(size // 2 + 1)
    spectrum[1:] /= np.arange(1, len(spectrum)) ** rng.uniform(0.0, 1.0)
    spectrum[0] = 0.0
    noise_S = np.fft.irfft(spectrum, size)[:num_samples].astype(np.float32)
    return noise_S / np.float32(max(1e-9, _rms(noise_S)))


def _set_level(rng: random.Random, samples_S: np.ndarray) -> np.ndarray:
    """Add a recorder's noise, 25 to 60 dB below the clip, and set the level of the sum."""
    level = _rms(samples_S)
    floor_S = _colored_noise(rng, len(samples_S))
    if level:
        samples_S = samples_S / np.float32(level) + floor_S * np.float32(10 ** (-rng.uniform(25, 60) / 20))
        samples_S = samples_S * np.float32(10 ** (rng.uniform(-36, -16) / 20))
    else:
        samples_S = floor_S * np.float32(10 ** (rng.uniform(-80, -34) / 20))
    peak = float(np.abs(samples_S).max())
    return samples_S * np.float32(0.98 / peak) if peak > 0.98 else samples_S
