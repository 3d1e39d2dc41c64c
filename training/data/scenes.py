"""Builds scenes: who speaks when, over which background, and the truth about it; renders them to 16 kHz sound.

Axes: S samples at 16 kHz. A scene is drawn from a seed alone, so the same seed, bank and recordings give the same clip.
Knows nothing of questions, prompts or models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soxr

from hyper_model.audio import SAMPLE_RATE_HZ
from training.data.sources import recordings as sounds
from training.data.sources.downloads import MissingDataError
from training.data.sources.noise import NoiseFolder
from training.data.sources.sentences import Line, line_from_text
from training.data.sources.voices import Bank, Split, Utterance, same_speaker


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
    """One of the recorded classes, `quiet` or `background speech`; for noise of one's own, its label."""
    recording: str | None
    snr_db: float | None
    """Speech over background, dB, both as mean squares over the whole clip; None where one of the two is absent."""
    speakers: tuple[SceneSpeaker, ...]
    turns: tuple[Turn, ...]
    background_line: str | None
    has_overlap: bool
    duration_s: float
    other_lines: tuple[str, ...] = ()
    """Open lines that nobody says here, from the same voices: what wrong choices are made of."""
    channel: str | None = None
    """What the clip was sent through (`training/data/channels.py`)."""
    contradicted: str | None = None
    """A question to which the background's line gives another answer than a speaker's."""

    @property
    def transcript(self) -> str:
        return ". ".join(turn.line.text for turn in self.turns)

    @property
    def overlap_share(self) -> float:
        """The share of the time in which somebody speaks during which two or more do."""
        edges = sorted([(t.start_s, 1) for t in self.turns] + [(t.end_s, -1) for t in self.turns])
        spoken_s = shared_s = 0.0
        voices, last_s = 0, 0.0
        for at_s, change in edges:
            spoken_s += (at_s - last_s) * (voices > 0)
            shared_s += (at_s - last_s) * (voices > 1)
            voices, last_s = voices + change, at_s
        return shared_s / spoken_s if spoken_s else 0.0


@dataclass(frozen=True, eq=False)
class Rendered:
    """A scene's sound in the parts that it is the sum of, each float32 [S]; `mixture_S` is what is heard."""

    scene: Scene
    speech_S: np.ndarray  # noqa: N815  # the axis suffix
    background_S: np.ndarray  # noqa: N815
    floor_S: np.ndarray  # noqa: N815
    """The recorder's own noise, 60 to 75 dB below full scale; no part of the ratio of speech to background."""

    @property
    def mixture_S(self) -> np.ndarray:  # noqa: N802
        return self.speech_S + self.background_S + self.floor_S


NUM_OTHER_LINES = 6

# One voice often speaks several turns, so that counting turns is not counting people; it still says something, since n
# people take at least n turns. The evaluation states what turns alone would reach.
NUM_TURNS = {
    1: ((1, 2, 3, 4), (36, 23, 21, 20)),
    2: ((2, 3, 4), (42, 32, 26)),
    3: ((3, 4), (56, 44)),
    4: ((4, 5), (76, 24)),
    5: ((5, 6), (80, 20)),
    6: ((6, 7), (85, 15)),
}
NUM_SPEAKERS = ((0, 1, 2, 3, 4, 5, 6), (8, 27, 23, 20, 14, 5, 3))
_LONGEST_S = 28.0
"""Scenes end before this, inside the encoder's window of 30 s; a clip takes at most 1.5 s more at its ends."""

_MAX_TRIES = 300

_OPEN_SHARE = 0.5
"""Lines of open text among a scene's; the others have questions about their content."""

_CONTRADICTING_SHARE = 0.5
"""Scenes with background speech in which it answers a question otherwise than a speaker does, where a line does so."""


@dataclass(frozen=True, eq=False)
class _Placed:
    """One line where it stands in the clip."""

    voice: str
    text: str
    start_s: float
    samples_S: np.ndarray  # noqa: N815

    @property
    def end_s(self) -> float:
        return self.start_s + len(self.samples_S) / SAMPLE_RATE_HZ


class SceneBuilder:
    """Draws and renders scenes of one split from a bank and the recordings.

    Args:
        num_speakers: draw only scenes with this many people, or with as many as one of these (None: the usual mixture).
        snr_db: (low, high) of the uniform SNR draw.
        one_voice_turns: every scene has one voice speaking this many turns: the shortcut test of the speaker count.
        overlap_share: (low, high) of the share of speech that two people speak at once; turns then come in pairs.
            None: one change of speaker in eight overlaps a little.
        background: draw only scenes with a `recorded` background, or with background speech that is `contradicting`
            what a speaker says (None: the usual mixture). A scene of which no line can be contradicted is drawn again.
        noise: recordings of one's own that take the place of the table's (`training/data/sources/noise.py`).
    """

    def __init__(
        self,
        bank: Bank,
        sounds_folder: Path,
        split: Split,
        *,
        num_speakers: int | Sequence[int] | None = None,
        snr_db: tuple[float, float] = (0.0, 20.0),
        one_voice_turns: int | None = None,
        overlap_share: tuple[float, float] | None = None,
        background: Literal["recorded", "contradicting"] | None = None,
        noise: NoiseFolder | None = None,
    ) -> None:
        self.bank = bank
        self.folder = sounds_folder
        self.split: Split = split
        self.num_speakers = (num_speakers,) if isinstance(num_speakers, int) else num_speakers
        self.snr_db = snr_db
        self.one_voice_turns = one_voice_turns
        self.overlap_share = overlap_share
        self.background = background
        self.noise = noise
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
        self._answers: dict[str, list[tuple[str, str, Utterance, Path]]] | None = None

    def draw_utterance(
        self, rng: random.Random, voice: str, *, is_open: bool | None = None, longest_s: float | None = None
    ) -> tuple[Utterance, np.ndarray]:
        """Draw a line of a voice and its sound.

        Args:
            is_open: of open text or of the sentence patterns, where the voice has such lines.
            longest_s: of at most this length, where the voice has such lines; else its shortest.
        """
        options = self.bank.utterances[voice]
        if is_open is not None:
            options = self.bank.by_kind(voice, is_open=is_open) or options
        if longest_s is not None:
            short = [entry for entry in options if entry[0].num_samples <= longest_s * SAMPLE_RATE_HZ]
            options = short or [min(options, key=lambda entry: entry[0].num_samples)]
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

    @staticmethod
    def _render_distant_speech(rng: random.Random, speech_S: np.ndarray, num_samples: int) -> np.ndarray:
        # A voice from another room: no treble, and an exponential tail of diffuse reflections.
        dull_S = soxr.resample(soxr.resample(speech_S, 16_000, 4_400), 4_400, 16_000)
        noise = np.random.default_rng(rng.randrange(2**32))
        tail = noise.standard_normal(4_000) * np.exp(-np.arange(4_000) / 1_200)
        tail[0] = 4.0
        wet_S = np.convolve(dull_S, tail / np.sqrt(np.sum(tail**2)))[:num_samples].astype(np.float32)
        background_S = np.zeros(num_samples, np.float32)
        start = rng.randrange(max(1, num_samples - len(wet_S) + 1))
        background_S[start : start + len(wet_S)] = wet_S[: num_samples - start]
        return background_S

    def _find_contradiction(
        self, rng: random.Random, placed: Sequence[_Placed], taken: set[str]
    ) -> tuple[str, Utterance, Path] | None:
        """Find a question that one speaker's line answers and a line of a voice not `taken` answers otherwise."""
        if self._answers is None:
            self._answers = {}
            for voice in self.voices:
                for utterance, path in self.bank.by_kind(voice.name, is_open=False):
                    for asked in line_from_text(utterance.text).questions:
                        entry = (asked.answer, same_speaker(voice.name), utterance, path)
                        self._answers.setdefault(asked.question, []).append(entry)
        asked_of = [asked for item in placed for asked in line_from_text(item.text).questions]
        answers = {asked.question: asked.answer for asked in asked_of}
        if len(answers) < len(asked_of):
            return None  # Two people answer one question: whom it means could not be told.
        questions = list(answers)
        rng.shuffle(questions)
        said = {item.text for item in placed}
        for question in questions:
            others = [
                (utterance, path)
                for answer, speaker, utterance, path in self._answers.get(question, ())
                if answer != answers[question] and speaker not in taken and utterance.text not in said
            ]
            if others:
                return question, *rng.choice(others)
        return None

    def draw(self, seed: int) -> tuple[Scene, np.ndarray]:
        """Draw one scene and its sound, float32 [S]."""
        rendered = self.draw_parts(seed)
        return rendered.scene, rendered.mixture_S

    def draw_parts(self, seed: int) -> Rendered:
        """Draw one scene and its sound in parts.

        Raises:
            MissingDataError: the bank holds no lines that can make such a scene.
        """
        rng = random.Random(seed)
        for _ in range(_MAX_TRIES):
            rendered = self._try_to_draw(rng, seed)
            if rendered is not None:
                return rendered
        raise MissingDataError(
            f"{_MAX_TRIES} draws made no such scene: the bank holds too few lines of {self.split} voices"
        )

    def _try_to_draw(self, rng: random.Random, seed: int) -> Rendered | None:
        people, sexes = self._draw_people(rng)
        placed = self._place_pairs(rng, people) if self.overlap_share else self._place_turns(rng, people)
        if placed is None:
            return None
        end_s = max((item.end_s for item in placed), default=0.0)
        duration_s = end_s + rng.uniform(0.1, 0.5) if placed else rng.uniform(2.0, 6.0)
        num_samples = int(duration_s * SAMPLE_RATE_HZ)
        speech_S = np.zeros(num_samples, np.float32)
        for item in placed:
            begin = int(item.start_s * SAMPLE_RATE_HZ)
            piece_S = item.samples_S[: num_samples - begin]
            speech_S[begin : begin + len(piece_S)] += piece_S

        label = self._draw_label(rng, len(people))
        recording, background_line, contradicted, snr_db = None, None, None, None
        background_S = np.zeros(num_samples, np.float32)
        if label == sounds.BACKGROUND_SPEECH:
            taken = {same_speaker(name) for name in people}
            found = None
            if self.background or rng.random() < _CONTRADICTING_SHARE:
                found = self._find_contradiction(rng, placed, taken)
            if found is not None:
                contradicted, utterance, path = found
                heard_S = self.bank.samples(utterance, path)
            elif self.background:
                return None
            else:
                voice = rng.choice([v for v in self.voices if same_speaker(v.name) not in taken])
                utterance, heard_S = self.draw_utterance(rng, voice.name)
            background_line = utterance.text
            background_S = self._render_distant_speech(rng, heard_S, num_samples)
            snr_db = rng.uniform(*((5.0, 12.0) if self.background else (8.0, 18.0)))
        elif label != sounds.QUIET:
            if self.noise is not None:
                background_S, label, recording = self.noise.draw(rng, num_samples)
            else:
                background_S, recording = self.draw_background(rng, label, num_samples)
            snr_db = rng.uniform(*self.snr_db)
        if snr_db is not None and not background_S.any():
            # A cut that holds nothing but digital silence has no ratio.
            return None
        parts = self._mix(rng, speech_S, background_S, snr_db)

        order = [item.voice for item in placed]
        ids = {name: f"S{i + 1}" for i, name in enumerate(dict.fromkeys(order))}
        turns = tuple(Turn(ids[p.voice], line_from_text(p.text), p.start_s, p.end_s) for p in placed)
        said = {item.text for item in placed} | {background_line or ""}
        scene = Scene(
            seed=seed,
            split=self.split,
            environment=label,
            recording=recording,
            snr_db=snr_db if placed else None,
            speakers=tuple(SceneSpeaker(ids[name], name, sexes[name]) for name in ids),
            turns=turns,
            background_line=background_line,
            has_overlap=any(later.start_s < max(e.end_s for e in turns[:i]) for i, later in enumerate(turns) if i),
            duration_s=num_samples / SAMPLE_RATE_HZ,
            other_lines=self.draw_other_lines(rng, said, NUM_OTHER_LINES) if placed else (),
            contradicted=contradicted,
        )
        return Rendered(scene, *parts)

    def _draw_people(self, rng: random.Random) -> tuple[list[str], dict[str, str]]:
        """Draw the voices of different people, and whether each is a woman's or a man's."""
        if self.one_voice_turns is not None:
            count = 1
        elif self.num_speakers is not None:
            count = rng.choice(self.num_speakers)
        else:
            count = rng.choices(*NUM_SPEAKERS)[0]
        people: list[str] = []
        sexes: dict[str, str] = {}
        for voice in rng.sample(self.voices, min(len(self.voices), 2 * count + 2)):
            if same_speaker(voice.name) not in {same_speaker(name) for name in people} and len(people) < count:
                people.append(voice.name)
                sexes[voice.name] = voice.sex
        return people, sexes

    def _draw_order(self, rng: random.Random, people: Sequence[str]) -> list[str]:
        if not people:
            return []
        counts, weights = NUM_TURNS[len(people)]
        num_turns = self.one_voice_turns or rng.choices(counts, weights)[0]
        order = list(people) + [rng.choice(people) for _ in range(num_turns - len(people))]
        rng.shuffle(order)
        return order

    def _draw_manners(self, rng: random.Random, people: Sequence[str]) -> dict[str, tuple[float, float, float]]:
        """Draw speed, spectral tilt and gain of each person: the same in all of the person's turns."""
        is_training = self.split == "train"
        return {
            name: (
                rng.uniform(0.92, 1.09) if is_training else 1.0,
                rng.uniform(-0.35, 0.35) if is_training else 0.0,
                10 ** (rng.uniform(-3.0, 3.0) / 20),
            )
            for name in people
        }

    def _speak(
        self, rng: random.Random, name: str, manner: tuple[float, float, float], said: set[str], longest_s: float
    ) -> tuple[str, np.ndarray]:
        """Draw a line that nobody has `said`, in the person's manner."""
        is_open = rng.random() < _OPEN_SHARE and self.background != "contradicting"
        utterance, samples_S = self.draw_utterance(rng, name, is_open=is_open, longest_s=longest_s)
        for _ in range(5):
            if utterance.text not in said:
                break
            utterance, samples_S = self.draw_utterance(rng, name, is_open=is_open, longest_s=longest_s)
        said.add(utterance.text)
        speed, tilt, gain = manner
        if tilt:
            samples_S = tilt_spectrum(samples_S, tilt)
        if abs(speed - 1.0) > 0.01:
            samples_S = soxr.resample(samples_S, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ / speed, quality="MQ")
        return utterance.text, (samples_S * gain).astype(np.float32)

    def _place_turns(self, rng: random.Random, people: Sequence[str]) -> list[_Placed]:
        order = self._draw_order(rng, people)
        manners = self._draw_manners(rng, people)
        cursor_s = rng.uniform(0.1, 0.5)
        placed: list[_Placed] = []
        said: set[str] = set()
        for index, name in enumerate(order):
            if index:
                overlaps = order[index - 1] != name and rng.random() < 0.12
                cursor_s += -rng.uniform(0.2, 0.5) if overlaps else rng.uniform(0.12, 0.6)
            # Whoever speaks leaves time for those who come after.
            longest_s = (_LONGEST_S - cursor_s) / (len(order) - index) if index else _LONGEST_S / len(order)
            text, samples_S = self._speak(rng, name, manners[name], said, 0.9 * longest_s)
            # A short line before may leave no room for an overlap: lines keep the order they are numbered in.
            start_s = max(placed[-1].start_s + 0.05 if placed else 0.0, cursor_s)
            placed.append(_Placed(name, text, start_s, samples_S))
            cursor_s = placed[-1].end_s
        return placed

    def _place_pairs(self, rng: random.Random, people: Sequence[str]) -> list[_Placed] | None:
        """Place turns in pairs of different people, each pair overlapping by a drawn share of its time.

        None where lines of too different lengths were drawn.
        """
        assert self.overlap_share is not None
        low, high = self.overlap_share
        manners = self._draw_manners(rng, people)
        names = list(people)
        if len(names) % 2:
            names.append(rng.choice(names[:-1]))
        cursor_s = rng.uniform(0.1, 0.5)
        placed: list[_Placed] = []
        said: set[str] = set()
        for first, second in zip(names[::2], names[1::2], strict=True):
            pair = [self._speak(rng, name, manners[name], said, 6.0) for name in (first, second)]
            lengths_s = [len(samples_S) / SAMPLE_RATE_HZ for _, samples_S in pair]
            # Each begins and ends apart from the other, so that who is first and last can be heard.
            most_s = min(lengths_s) - 0.15
            limit = most_s / (sum(lengths_s) - most_s)
            if limit <= low + 0.02:
                return None
            share = rng.uniform(low + 0.01, min(high - 0.01, limit))
            overlap_s = share * sum(lengths_s) / (1 + share)
            for (text, samples_S), name in zip(pair, (first, second), strict=True):
                placed.append(_Placed(name, text, cursor_s, samples_S))
                cursor_s = placed[-1].end_s - overlap_s
            cursor_s += overlap_s + rng.uniform(0.12, 0.6)
        return placed

    def _draw_label(self, rng: random.Random, num_speakers: int) -> str:
        if self.background == "contradicting":
            return sounds.BACKGROUND_SPEECH
        if self.background == "recorded":
            return rng.choice(list(self.recordings))
        if num_speakers and rng.random() < 0.12:
            return sounds.QUIET
        if num_speakers and rng.random() < 0.10 and len(self.voices) > num_speakers:
            return sounds.BACKGROUND_SPEECH
        if not num_speakers and rng.random() < 0.08:
            return sounds.QUIET
        return rng.choice(list(self.recordings))

    @staticmethod
    def _mix(
        rng: random.Random, speech_S: np.ndarray, background_S: np.ndarray, snr_db: float | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scale speech, background and noise floor, float32 [S] each, so that their sum stays inside full scale.

        The background's gain is sqrt(P_speech / (P_background * 10^(snr_db / 10))), P being mean squares over the whole
        clip, pauses included (arXiv 2604.14806, data construction).
        """
        floor_S = np.random.default_rng(rng.randrange(2**32)).standard_normal(len(background_S))
        floor_S *= 10 ** (rng.uniform(-75, -60) / 20)
        speech_power = float(np.mean(speech_S.astype(np.float64) ** 2))
        background_power = float(np.mean(background_S.astype(np.float64) ** 2))
        if not speech_power:
            gain = 10 ** (rng.uniform(-34, -20) / 20) / max(1e-6, background_power**0.5)
        elif snr_db is None:
            gain = 0.0
        else:
            gain = (speech_power / (background_power * 10 ** (snr_db / 10))) ** 0.5
        level = 10 ** (rng.uniform(-4.0, 4.0) / 20)
        parts = [speech_S.astype(np.float64), gain * background_S, floor_S]
        peak = float(np.abs(sum(parts)).max()) * level
        level *= min(1.0, 0.98 / max(peak, 1e-9))
        speech_S, background_S, floor_S = ((level * part).astype(np.float32) for part in parts)
        return speech_S, background_S, floor_S


def tilt_spectrum(samples_S: np.ndarray, amount: float) -> np.ndarray:
    """Tilt the spectrum with one tap (above 0 dulls, below 0 sharpens) at equal level: another microphone or room."""
    tilted_S = samples_S.copy()
    tilted_S[1:] += amount * samples_S[:-1]
    power, tilted_power = float(np.mean(samples_S**2)), float(np.mean(tilted_S**2))
    return tilted_S * np.float32(np.sqrt(power / max(tilted_power, 1e-12)))
