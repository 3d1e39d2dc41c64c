"""Draw scenes (speakers, turns, background and their truth) and render them as 16 kHz audio.

Axes: S samples at 16 kHz. A scene follows from its seed alone: equal seed, bank and recordings give an equal clip. This
module depends on no question, prompt or model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soxr

from hyper_model.audio import SAMPLE_RATE_HZ, snr_gain
from training.data.sources import recordings as sounds
from training.data.sources.downloads import MissingDataError
from training.data.sources.noise import NoiseFolder
from training.data.sources.sentences import Line, line_from_text
from training.data.sources.voices import Bank, Split, Utterance, same_speaker


@dataclass(frozen=True)
class SceneSpeaker:
    """One person of a scene; ids follow the order of first speech."""

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
    """A recorded class, `quiet` or `background speech`; with a `NoiseFolder`, the label of the file."""
    recording: str | None
    snr_db: float | None
    """Speech over background in dB, from mean squares over the whole clip; None if either is absent."""
    speakers: tuple[SceneSpeaker, ...]
    turns: tuple[Turn, ...]
    background_line: str | None
    has_overlap: bool
    duration_s: float
    other_lines: tuple[str, ...] = ()
    """Open lines of the same voices, absent from this clip; the source of wrong choices."""
    channel: str | None = None
    """Name of the applied channel (`training/data/channels.py`), or None."""
    contradicted: str | None = None
    """Question with one answer in a speaker's line and another in the background's line."""

    @property
    def transcript(self) -> str:
        """Return the lines of all turns, joined in order."""
        return ". ".join(turn.line.text for turn in self.turns)

    @property
    def overlap_share(self) -> float:
        """Return the share of speech time with two or more simultaneous speakers."""
        edges = sorted([(t.start_s, 1) for t in self.turns] + [(t.end_s, -1) for t in self.turns])
        spoken_s = shared_s = 0.0
        num_voices, last_s = 0, 0.0
        for at_s, change in edges:
            spoken_s += (at_s - last_s) * (num_voices > 0)
            shared_s += (at_s - last_s) * (num_voices > 1)
            num_voices, last_s = num_voices + change, at_s
        return shared_s / spoken_s if spoken_s else 0.0


@dataclass(frozen=True, eq=False)
class Rendered:
    """The audio of a scene in separate parts, each float32 [S]."""

    scene: Scene
    speech_S: np.ndarray  # noqa: N815  # the axis suffix
    background_S: np.ndarray  # noqa: N815
    floor_S: np.ndarray  # noqa: N815
    """Noise of the recorder, 60 to 75 dB below full scale; not part of the SNR."""

    @property
    def mixture_S(self) -> np.ndarray:  # noqa: N802
        """Return the sum of all parts: the audio of the clip."""
        return self.speech_S + self.background_S + self.floor_S


NUM_OTHER_LINES = 6

# A voice often speaks several turns, so the number of turns does not give the number of people. The two stay
# correlated, since n people take at least n turns. The evaluation reports the accuracy of a guess from turns alone.
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
"""Limit for the end of a scene, inside the encoder's window of 30 s; a clip adds at most 1.5 s at its ends."""

_MAX_TRIES = 300

_OPEN_SHARE = 0.5
"""Share of open text among the lines of a scene; the other lines have questions about their content."""

_CONTRADICTING_SHARE = 0.5
"""Share of background speech meant to contradict a speaker's answer, if the bank has such a line."""


@dataclass(frozen=True, eq=False)
class _Placed:
    """One line at its position in the clip."""

    voice: str
    text: str
    start_s: float
    samples_S: np.ndarray  # noqa: N815

    @property
    def end_s(self) -> float:
        return self.start_s + len(self.samples_S) / SAMPLE_RATE_HZ


def _sum_speech(placed: Sequence[_Placed], num_samples: int) -> np.ndarray:
    """Return the sum of all turns, cut at `num_samples`."""
    speech_S = np.zeros(num_samples, np.float32)
    for item in placed:
        begin = int(item.start_s * SAMPLE_RATE_HZ)
        piece_S = item.samples_S[: num_samples - begin]
        speech_S[begin : begin + len(piece_S)] += piece_S
    return speech_S


class SceneBuilder:
    """Source of scenes of one split, drawn and rendered from a voice bank and recordings.

    Args:
        num_speakers: draw only scenes with this number of people, or with one of these numbers. None: the usual
            mixture.
        snr_db: (low, high) of the uniform SNR draw.
        one_voice_turns: every scene has one voice with this number of turns. This tests the speaker count for a
            shortcut.
        overlap_share: (low, high) of the share of speech with two simultaneous speakers; turns then come in pairs.
            None: one change of speaker in eight overlaps a little.
        background: draw only scenes with a `recorded` background, or with background speech `contradicting` a speaker.
            None: the usual mixture. A scene without any line to contradict is drawn again.
        noise: user-supplied recordings in place of the built-in ones (`training/data/sources/noise.py`).
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
        # There are too few recordings for three splits. Validation scenes use training recordings with new voices.
        wanted = "test" if split == "test" else "train"
        self.recordings: dict[str, list[sounds.Recording]] = {}
        for recording in sounds.list_recordings():
            if recording.split == wanted:
                self.recordings.setdefault(recording.label, []).append(recording)
        self._answers: dict[str, list[tuple[str, str, Utterance, Path]]] | None = None

    def draw_utterance(
        self, rng: random.Random, voice: str, *, is_open: bool | None = None, longest_s: float | None = None
    ) -> tuple[Utterance, np.ndarray]:
        """Draw a line of a voice and its audio, float32 [S].

        Args:
            is_open: prefer open text (True) or sentence patterns (False), if the voice has such lines.
            longest_s: prefer lines of at most this length; without any, take the shortest line.
        """
        options = self.bank.utterances[voice]
        if is_open is not None:
            options = self.bank.by_kind(voice, is_open=is_open) or options
        if longest_s is not None:
            short = [entry for entry in options if entry[0].num_samples <= longest_s * SAMPLE_RATE_HZ]
            options = short or [min(options, key=lambda entry: entry[0].num_samples)]
        utterance, path = rng.choice(options)
        return utterance, self.bank.samples(utterance, path)

    def draw_other_lines(self, rng: random.Random, excluded: set[str], count: int) -> tuple[str, ...]:
        """Draw open lines of this split's voices, except `excluded` ones."""
        if not self.open_texts:
            return ()
        drawn = dict.fromkeys(rng.choice(self.open_texts) for _ in range(count))
        return tuple(text for text in drawn if text not in excluded)

    def draw_background(self, rng: random.Random, label: str, num_samples: int) -> tuple[np.ndarray, str]:
        """Draw a recording of a class, cut or repeated to `num_samples`.

        Returns:
            float32 [S] and the name of the recording's first file.
        """
        recording = rng.choice(self.recordings[label])
        background_S = np.zeros(num_samples, np.float32)
        # Each class has few recordings, so training varies their speed and spectrum.
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
        # Imitate a voice in another room: no treble, and an exponential tail of diffuse reflections.
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
        """Find a question with different answers in a placed line and in a line of a voice not `taken`."""
        if self._answers is None:
            self._answers = {}
            for voice in self.voices:
                for utterance, path in self.bank.by_kind(voice.name, is_open=False):
                    for question_of_line in line_from_text(utterance.text).questions:
                        entry = (question_of_line.answer, same_speaker(voice.name), utterance, path)
                        self._answers.setdefault(question_of_line.question, []).append(entry)
        asked_of = [question_of_line for item in placed for question_of_line in line_from_text(item.text).questions]
        answers = {question_of_line.question: question_of_line.answer for question_of_line in asked_of}
        if len(answers) < len(asked_of):
            return None  # Two people answer one question, so its answer is ambiguous.
        questions = list(answers)
        rng.shuffle(questions)
        spoken_texts = {item.text for item in placed}
        for question in questions:
            others = [
                (utterance, path)
                for answer, speaker, utterance, path in self._answers.get(question, ())
                if answer != answers[question] and speaker not in taken and utterance.text not in spoken_texts
            ]
            if others:
                return question, *rng.choice(others)
        return None

    def draw(self, seed: int) -> tuple[Scene, np.ndarray]:
        """Draw one scene and its audio, float32 [S]."""
        rendered = self.draw_parts(seed)
        return rendered.scene, rendered.mixture_S

    def draw_parts(self, seed: int) -> Rendered:
        """Draw one scene and its audio in parts.

        Raises:
            MissingDataError: the bank has no lines for such a scene.
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
        speech_S = _sum_speech(placed, num_samples)
        label = self._draw_label(rng, len(people))
        recording, background_line, contradicted, snr_db = None, None, None, None
        background_S = np.zeros(num_samples, np.float32)
        if label == sounds.BACKGROUND_SPEECH:
            taken = {same_speaker(name) for name in people}
            contradiction = None
            if self.background or rng.random() < _CONTRADICTING_SHARE:
                contradiction = self._find_contradiction(rng, placed, taken)
            if contradiction is not None:
                contradicted, utterance, path = contradiction
                utterance_S = self.bank.samples(utterance, path)
            elif self.background:
                return None
            else:
                voice = rng.choice([v for v in self.voices if same_speaker(v.name) not in taken])
                utterance, utterance_S = self.draw_utterance(rng, voice.name)
            background_line = utterance.text
            background_S = self._render_distant_speech(rng, utterance_S, num_samples)
            snr_db = rng.uniform(*((5.0, 12.0) if self.background else (8.0, 18.0)))
        elif label != sounds.QUIET:
            if self.noise is not None:
                background_S, label, recording = self.noise.draw(rng, num_samples)
            else:
                background_S, recording = self.draw_background(rng, label, num_samples)
            snr_db = rng.uniform(*self.snr_db)
        if snr_db is not None and not background_S.any():
            # Digital silence has no SNR.
            return None
        parts = self._mix(rng, speech_S, background_S, snr_db)

        order = [item.voice for item in placed]
        ids = {name: f"S{i + 1}" for i, name in enumerate(dict.fromkeys(order))}
        turns = tuple(Turn(ids[p.voice], line_from_text(p.text), p.start_s, p.end_s) for p in placed)
        used_texts = {item.text for item in placed} | {background_line or ""}
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
            other_lines=self.draw_other_lines(rng, used_texts, NUM_OTHER_LINES) if placed else (),
            contradicted=contradicted,
        )
        return Rendered(scene, *parts)

    def _draw_people(self, rng: random.Random) -> tuple[list[str], dict[str, str]]:
        """Draw voices of different people.

        Returns:
            The voice names, and voice name -> `woman` or `man`.
        """
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
        """Draw (speed, spectral tilt, gain) per person; the values hold for all turns of the person."""
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
        self,
        rng: random.Random,
        name: str,
        manner: tuple[float, float, float],
        spoken_texts: set[str],
        longest_s: float,
    ) -> tuple[str, np.ndarray]:
        """Draw a line not yet in `spoken_texts`, with the person's speed, tilt and gain."""
        is_open = rng.random() < _OPEN_SHARE and self.background != "contradicting"
        utterance, samples_S = self.draw_utterance(rng, name, is_open=is_open, longest_s=longest_s)
        for _ in range(5):
            if utterance.text not in spoken_texts:
                break
            utterance, samples_S = self.draw_utterance(rng, name, is_open=is_open, longest_s=longest_s)
        spoken_texts.add(utterance.text)
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
        spoken_texts: set[str] = set()
        for index, name in enumerate(order):
            if index:
                overlaps = order[index - 1] != name and rng.random() < 0.12
                cursor_s += -rng.uniform(0.2, 0.5) if overlaps else rng.uniform(0.12, 0.6)
            # Leave time for the turns still to come.
            longest_s = (_LONGEST_S - cursor_s) / (len(order) - index) if index else _LONGEST_S / len(order)
            text, samples_S = self._speak(rng, name, manners[name], spoken_texts, 0.9 * longest_s)
            # Turns stay in the order of their numbers, even if the previous line is too short for the overlap.
            start_s = max(placed[-1].start_s + 0.05 if placed else 0.0, cursor_s)
            placed.append(_Placed(name, text, start_s, samples_S))
            cursor_s = placed[-1].end_s
        return placed

    def _place_pairs(self, rng: random.Random, people: Sequence[str]) -> list[_Placed] | None:
        """Place turns in pairs of different people, each pair with a drawn share of overlap.

        Returns:
            The placed lines; None if the drawn lengths differ too much.
        """
        assert self.overlap_share is not None
        low, high = self.overlap_share
        manners = self._draw_manners(rng, people)
        names = list(people)
        if len(names) % 2:
            names.append(rng.choice(names[:-1]))
        cursor_s = rng.uniform(0.1, 0.5)
        placed: list[_Placed] = []
        spoken_texts: set[str] = set()
        for first, second in zip(names[::2], names[1::2], strict=True):
            pair = [self._speak(rng, name, manners[name], spoken_texts, 6.0) for name in (first, second)]
            lengths_s = [len(samples_S) / SAMPLE_RATE_HZ for _, samples_S in pair]
            # Starts and ends differ, so that the first and the last speaker stay audible.
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
        """Scale speech, background and noise floor, float32 [S] each; their sum stays inside full scale.

        The background is scaled by `snr_gain` of the mean squares over the whole clip, silence included.
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
            gain = snr_gain(speech_power, background_power, snr_db)
        level = 10 ** (rng.uniform(-4.0, 4.0) / 20)
        parts = [speech_S.astype(np.float64), gain * background_S, floor_S]
        peak = float(np.abs(sum(parts)).max()) * level
        level *= min(1.0, 0.98 / max(peak, 1e-9))
        speech_S, background_S, floor_S = ((level * part).astype(np.float32) for part in parts)
        return speech_S, background_S, floor_S


def tilt_spectrum(samples_S: np.ndarray, amount: float) -> np.ndarray:
    """Tilt the spectrum with one tap at equal level, as another microphone or room would.

    Args:
        amount: above 0 reduces treble, below 0 raises it.
    """
    tilted_S = samples_S.copy()
    tilted_S[1:] += amount * samples_S[:-1]
    power, tilted_power = float(np.mean(samples_S**2)), float(np.mean(tilted_S**2))
    return tilted_S * np.float32(np.sqrt(power / max(tilted_power, 1e-12)))
