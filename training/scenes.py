"""Builds scenes: who speaks when, over which background, and the truth about it; renders them to 16 kHz sound.

Axes: S samples at 16 kHz. A scene is drawn from a seed alone, so the same seed, bank and recordings give the same clip.
Knows nothing of questions, prompts or models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from hyper_model.audio import SAMPLE_RATE_HZ, mix
from training import sounds
from training.lines import Line, line_from_text
from training.voices import Bank, Split, Utterance, same_speaker


@dataclass(frozen=True)
class SceneSpeaker:
    """One person of a scene, numbered in order of first speech."""

    id: str
    voice: str
    sex: str


@dataclass(frozen=True)
class Turn:
    """One line spoken by one person."""

    speaker: str
    line: Line
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Scene:
    """The truth about a clip."""

    seed: int
    split: Split
    environment: str
    """One of the recorded classes, `quiet` or `background speech`."""
    recording: str | None
    snr_db: float | None
    """Speech over background, dB; None where one of the two is absent."""
    speakers: tuple[SceneSpeaker, ...]
    turns: tuple[Turn, ...]
    background_line: str | None
    has_overlap: bool
    duration_s: float
    other_lines: tuple[str, ...] = ()
    """Open lines that nobody says here, from the same voices: what wrong choices are made of."""
    channel: str | None = None
    """What the clip was sent through (`training/channels.py`)."""

    @property
    def transcript(self) -> str:
        return ". ".join(turn.line.text for turn in self.turns)


NUM_OTHER_LINES = 6

# One voice often speaks several turns, so that counting turns is not counting people; it still says something, since n
# people take at least n turns. The evaluation states what turns alone would reach.
_NUM_TURNS = {
    1: ((1, 2, 3, 4), (36, 23, 21, 20)),
    2: ((2, 3, 4), (42, 32, 26)),
    3: ((3, 4), (56, 44)),
    4: ((4, 5), (76, 24)),
}
_NUM_SPEAKERS = ((0, 1, 2, 3, 4), (8, 28, 24, 22, 18))


class SceneBuilder:
    """Draws and renders scenes of one split from a bank and the recordings.

    Args:
        num_speakers: draw only scenes with this many people (None: the usual mixture).
        snr_db: (low, high) of the uniform SNR draw.
        one_voice_turns: every scene has one voice speaking this many turns: the shortcut test of the speaker count.
    """

    def __init__(
        self,
        bank: Bank,
        sounds_folder: Path,
        split: Split,
        *,
        num_speakers: int | None = None,
        snr_db: tuple[float, float] = (0.0, 20.0),
        one_voice_turns: int | None = None,
    ) -> None:
        self.bank = bank
        self.folder = sounds_folder
        self.split: Split = split
        self.num_speakers = num_speakers
        self.snr_db = snr_db
        self.one_voice_turns = one_voice_turns
        self.voices = tuple(bank.voices(split))
        self.open_texts = tuple(
            utterance.text for voice in self.voices for utterance, _ in bank.by_kind(voice.name, is_open=True)
        )
        # Recordings are not split three ways: there are too few. Validation hears training recordings, new voices.
        wanted = "test" if split == "test" else "train"
        self.recordings: dict[str, list[sounds.Recording]] = {}
        for recording in sounds.list_recordings():
            if recording.split == wanted:
                self.recordings.setdefault(recording.label, []).append(recording)

    def draw_utterance(
        self, rng: random.Random, voice: str, *, is_open: bool | None = None
    ) -> tuple[Utterance, np.ndarray]:
        """Draw a line of a voice and its sound; of open text, or of the patterns, where the voice has any such."""
        options = self.bank.utterances[voice]
        if is_open is not None:
            options = self.bank.by_kind(voice, is_open=is_open) or options
        utterance, path = rng.choice(options)
        return utterance, self.bank.samples(utterance, path)

    def draw_other_lines(self, rng: random.Random, said: set[str], count: int) -> tuple[str, ...]:
        """Draw open lines of this split's voices that are not among `said`."""
        if not self.open_texts:
            return ()
        drawn = dict.fromkeys(rng.choice(self.open_texts) for _ in range(count))
        return tuple(text for text in drawn if text not in said)

    def draw_background(self, rng: random.Random, label: str, num_samples: int) -> tuple[np.ndarray, str]:
        """Draw a recording of a class, cut or repeated to `num_samples`, and the name of its first file."""
        recording = rng.choice(self.recordings[label])
        background_S = np.zeros(num_samples, np.float32)
        # Few recordings stand for a class: train on many versions of each.
        factor = rng.uniform(0.8, 1.25) if self.split == "train" else 1.0
        tilt = rng.uniform(-0.7, 0.8) if self.split == "train" else 0.0
        start = -rng.randrange(SAMPLE_RATE_HZ // 2)
        while start < num_samples:
            piece_S = sounds.load(self.folder / rng.choice(recording.files))
            if self.split == "train":
                piece_S = tilt_spectrum(piece_S, tilt)
            if factor != 1.0:
                piece_S = soxr.resample(piece_S, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ * factor, quality="LQ")
            if len(piece_S) > num_samples:
                cut = rng.randrange(len(piece_S) - num_samples)
                piece_S = piece_S[cut : cut + num_samples]
            begin, end = max(0, start), min(num_samples, start + len(piece_S))
            if end > begin:
                background_S[begin:end] += piece_S[begin - start : end - start]
            start += len(piece_S) + int(rng.uniform(0.0, 0.6) * SAMPLE_RATE_HZ)
        return background_S, recording.files[0]

    def _draw_distant_speech(self, rng: random.Random, num_samples: int, taken: set[str]) -> tuple[np.ndarray, str]:
        voice = rng.choice([v for v in self.voices if same_speaker(v.name) not in taken])
        utterance, speech_S = self.draw_utterance(rng, voice.name)
        # A voice from another room: no treble, and an exponential tail of diffuse reflections.
        dull_S = soxr.resample(soxr.resample(speech_S, 16_000, 4_400), 4_400, 16_000)
        noise = np.random.default_rng(rng.randrange(2**32))
        tail = noise.standard_normal(4_000) * np.exp(-np.arange(4_000) / 1_200)
        tail[0] = 4.0
        wet_S = np.convolve(dull_S, tail / np.sqrt(np.sum(tail**2)))[:num_samples].astype(np.float32)
        background_S = np.zeros(num_samples, np.float32)
        start = rng.randrange(max(1, num_samples - len(wet_S) + 1))
        background_S[start : start + len(wet_S)] = wet_S[: num_samples - start]
        return background_S, utterance.text

    def draw(self, seed: int) -> tuple[Scene, np.ndarray]:
        """Draw one scene and its sound, float32 [S]."""
        rng = random.Random(seed)
        num_speakers = self.num_speakers if self.num_speakers is not None else rng.choices(*_NUM_SPEAKERS)[0]
        if self.one_voice_turns is not None:
            num_speakers = 1
        voices = rng.sample(self.voices, min(len(self.voices), 2 * num_speakers + 2))
        people: list[str] = []
        sexes: dict[str, str] = {}
        for voice in voices:
            if same_speaker(voice.name) not in {same_speaker(name) for name in people} and len(people) < num_speakers:
                people.append(voice.name)
                sexes[voice.name] = voice.sex
        order = self._draw_order(rng, people)
        speed = {name: rng.uniform(0.92, 1.09) if self.split == "train" else 1.0 for name in people}
        tilt = {name: rng.uniform(-0.35, 0.35) if self.split == "train" else 0.0 for name in people}
        level = {name: 10 ** (rng.uniform(-3.0, 3.0) / 20) for name in people}
        lead_s = rng.uniform(0.1, 0.5)
        cursor_s, placed, has_overlap = lead_s, [], False
        said: set[str] = set()
        for index, name in enumerate(order):
            utterance, samples_S = self.draw_utterance(rng, name)
            for _ in range(5):
                if utterance.text not in said:
                    break
                utterance, samples_S = self.draw_utterance(rng, name)
            said.add(utterance.text)
            if tilt[name]:
                samples_S = tilt_spectrum(samples_S, tilt[name])
            if abs(speed[name] - 1.0) > 0.01:
                samples_S = soxr.resample(samples_S, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ / speed[name], quality="MQ")
            if index:
                overlaps = order[index - 1] != name and rng.random() < 0.12
                has_overlap |= overlaps
                cursor_s += -rng.uniform(0.2, 0.5) if overlaps else rng.uniform(0.12, 0.6)
            start_s = max(0.0, cursor_s)
            cursor_s = start_s + len(samples_S) / SAMPLE_RATE_HZ
            placed.append((name, utterance.text, start_s, cursor_s, samples_S * level[name]))
        duration_s = cursor_s + rng.uniform(0.1, 0.5) if placed else rng.uniform(2.0, 6.0)
        num_samples = int(duration_s * SAMPLE_RATE_HZ)
        speech_S = np.zeros(num_samples, np.float32)
        for _, _, start_s, _, samples_S in placed:
            begin = int(start_s * SAMPLE_RATE_HZ)
            piece_S = samples_S[: num_samples - begin]
            speech_S[begin : begin + len(piece_S)] += piece_S

        label = self._draw_label(rng, num_speakers)
        recording, background_line, snr_db = None, None, None
        background_S = np.zeros(num_samples, np.float32)
        if label == sounds.BACKGROUND_SPEECH:
            taken = {same_speaker(name) for name in people}
            background_S, background_line = self._draw_distant_speech(rng, num_samples, taken)
            snr_db = rng.uniform(8.0, 18.0)
        elif label != sounds.QUIET:
            background_S, recording = self.draw_background(rng, label, num_samples)
            snr_db = rng.uniform(*self.snr_db)
        mixture_S = self._mix(rng, speech_S if placed else None, background_S, snr_db)

        ids = {name: f"S{i + 1}" for i, name in enumerate(dict.fromkeys(order))}
        scene = Scene(
            seed=seed,
            split=self.split,
            environment=label,
            recording=recording,
            snr_db=snr_db if placed else None,
            speakers=tuple(SceneSpeaker(ids[name], name, sexes[name]) for name in ids),
            turns=tuple(Turn(ids[name], line_from_text(text), start, end) for name, text, start, end, _ in placed),
            background_line=background_line,
            has_overlap=has_overlap,
            duration_s=num_samples / SAMPLE_RATE_HZ,
        )
        return scene, mixture_S

    def _draw_order(self, rng: random.Random, people: Sequence[str]) -> list[str]:
        if not people:
            return []
        counts, weights = _NUM_TURNS[len(people)]
        num_turns = self.one_voice_turns or rng.choices(counts, weights)[0]
        order = list(people) + [rng.choice(people) for _ in range(num_turns - len(people))]
        rng.shuffle(order)
        return order

    def _draw_label(self, rng: random.Random, num_speakers: int) -> str:
        if num_speakers and rng.random() < 0.12:
            return sounds.QUIET
        if num_speakers and rng.random() < 0.10 and len(self.voices) > num_speakers:
            return sounds.BACKGROUND_SPEECH
        if not num_speakers and rng.random() < 0.08:
            return sounds.QUIET
        return rng.choice(list(self.recordings))

    @staticmethod
    def _mix(
        rng: random.Random, speech_S: np.ndarray | None, background_S: np.ndarray, snr_db: float | None
    ) -> np.ndarray:
        floor = np.random.default_rng(rng.randrange(2**32)).standard_normal(len(background_S)).astype(np.float32)
        floor *= 10 ** (rng.uniform(-75, -60) / 20)
        background_power = float(np.mean(background_S**2))
        if speech_S is None:
            target = 10 ** (rng.uniform(-34, -20) / 20)
            mixture_S = background_S * (target / max(1e-6, np.sqrt(background_power)))
        elif snr_db is None or background_power == 0.0:
            mixture_S = speech_S
        else:
            mixture_S = mix(speech_S, background_S, snr_db)
        mixture_S = (mixture_S + floor) * 10 ** (rng.uniform(-4.0, 4.0) / 20)
        peak = float(np.abs(mixture_S).max())
        return (mixture_S * (0.98 / peak) if peak > 0.98 else mixture_S).astype(np.float32)


def tilt_spectrum(samples_S: np.ndarray, amount: float) -> np.ndarray:
    """Tilt the spectrum with one tap (above 0 dulls, below 0 sharpens) at equal level: another microphone or room."""
    tilted_S = samples_S.copy()
    tilted_S[1:] += amount * samples_S[:-1]
    power, tilted_power = float(np.mean(samples_S**2)), float(np.mean(tilted_S**2))
    return tilted_S * np.float32(np.sqrt(power / max(tilted_power, 1e-12)))
