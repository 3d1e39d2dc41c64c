"""Recordings of held-out scenes with pauses, and questions about them: needle, order, count, absence, two windows.

A recording follows from its seed alone. Every question has the times of the sound that decides it. This module depends
on no service and no figure.

Axes: S samples at 16 kHz.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hyper_model.audio import SAMPLE_RATE_HZ
from training.data.clips import SEED_STRIDE
from training.data.scenes import Scene, SceneBuilder, Turn
from training.data.sources.recordings import list_recordings
from training.data.truth import Truth
from training.evaluation.suites.item import Suite
from training.text_metrics import words

MINUTES = (1, 2, 5, 10, 30, 60)
"""Lengths of recordings."""

PAUSE_S = (0.6, 2.5)
_FIRST_SEED = SEED_STRIDE["test"] + 8_000_000
_SEEDS_PER_RECORDING = 1_000
_MIN_LETTERS = 4
_NUMBERS = ("never", "once", "twice", "three times", "four times")
_MAX_COUNT = 4


@dataclass(frozen=True)
class LongQuestion:
    """One question about a recording.

    Attributes:
        kind: needle, order, count, absence or two_windows.
        truth: Question, choices and answer.
        times: Start and end in seconds of each sound that decides the answer; none for an absent sound.
    """

    kind: str
    truth: Truth
    times: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, eq=False)
class LongRecording:
    """One recording and its truth.

    Attributes:
        samples_S: float32 [S].
        scenes: Scenes with their start in seconds.
    """

    name: str
    minutes: int
    samples_S: np.ndarray  # noqa: N815
    scenes: tuple[tuple[float, Scene], ...]

    @property
    def turns(self) -> list[Turn]:
        """Return all turns with times of the recording, in order."""
        moved = [
            Turn(turn.speaker, turn.line, start_s + turn.start_s, start_s + turn.end_s)
            for start_s, scene in self.scenes
            for turn in scene.turns
        ]
        return sorted(moved, key=lambda turn: turn.start_s)


def draw_recording(builder: SceneBuilder, minutes: int, number: int) -> LongRecording:
    """Lay scenes with pauses into one recording of this length; the last scene is cut at its end."""
    seed = _FIRST_SEED + (MINUTES.index(minutes) * 100 + number) * _SEEDS_PER_RECORDING
    rng = random.Random(seed)
    samples_S = np.zeros(minutes * 60 * SAMPLE_RATE_HZ, np.float32)
    noise_S = np.random.default_rng(seed).normal(0, 2e-4, len(samples_S)).astype(np.float32)
    scenes: list[tuple[float, Scene]] = []
    at = 0
    while at < len(samples_S):
        scene, scene_S = builder.draw(seed + len(scenes) + 1)
        if at + len(scene_S) > len(samples_S) and scenes:
            break
        samples_S[at : at + len(scene_S)] = scene_S[: len(samples_S) - at]
        scenes.append((at / SAMPLE_RATE_HZ, scene))
        at += len(scene_S) + round(rng.uniform(*PAUSE_S) * SAMPLE_RATE_HZ)
    return LongRecording(f"{minutes}min/{number}", minutes, np.clip(samples_S + noise_S, -1, 1), tuple(scenes))


def draw_questions(recording: LongRecording, num_per_kind: int) -> list[LongQuestion]:
    """Draw up to this number of questions of each kind; a short recording may have fewer."""
    questions: list[LongQuestion] = []
    for kind, draw in _KINDS.items():
        rng = random.Random(f"{recording.name}/{kind}")
        found: dict[str, LongQuestion] = {}
        for question in draw(recording, rng):
            found.setdefault(f"{question.truth.question} {sorted(question.truth.choices)}", question)
            if len(found) == num_per_kind:
                break
        questions += found.values()
    return questions


def _needles(recording: LongRecording, rng: random.Random) -> Iterator[LongQuestion]:
    turns = recording.turns
    said = {turn.line.text for turn in turns}
    others = [line for _, scene in recording.scenes for line in scene.other_lines if line not in said]
    for _ in range(20 * bool(turns)):
        turn = rng.choice(turns)
        wrong = list(dict.fromkeys(rng.choice(others) for _ in range(3))) if others else []
        if wrong:
            yield _asked(
                rng, "needle", "Which of these sentences is said?", turn.line.text, wrong, [(turn.start_s, turn.end_s)]
            )


def _orders(recording: LongRecording, rng: random.Random) -> Iterator[LongQuestion]:
    turns = recording.turns
    counts = Counter(turn.line.text for turn in turns)
    turns = [turn for turn in turns if counts[turn.line.text] == 1]
    for _ in range(20 * (len(turns) > 1)):
        first, second = sorted(rng.sample(turns, 2), key=lambda turn: turn.start_s)
        times = [(turn.start_s, turn.end_s) for turn in (first, second)]
        question = "Which of these sentences is said first?"
        yield _asked(rng, "order", question, first.line.text, [second.line.text], times)


def _counts(recording: LongRecording, rng: random.Random) -> Iterator[LongQuestion]:
    places = _places_of_words(recording)
    candidates = [word for word, times in places.items() if len(times) <= _MAX_COUNT]
    for _ in range(20 * bool(candidates)):
        word = rng.choice(candidates)
        right = _NUMBERS[len(places[word])]
        wrong = [number for number in _NUMBERS if number != right]
        yield _asked(rng, "count", f'How often is the word "{word}" said?', right, wrong, places[word])


def _absences(recording: LongRecording, rng: random.Random) -> Iterator[LongQuestion]:
    times: dict[str, list[tuple[float, float]]] = {}
    for start_s, scene in recording.scenes:
        times.setdefault(scene.environment, []).append((start_s, start_s + scene.duration_s))
    labels = sorted({each.label for each in list_recordings()})
    for number in range(20):
        present = [label for label in labels if label in times]
        absent = [label for label in labels if label not in times]
        pool, right = (present, "yes") if number % 2 else (absent, "no")
        if pool:
            label = rng.choice(pool)
            wrong = "no" if right == "yes" else "yes"
            yield _asked(rng, "absence", f"Is {label} in the background?", right, [wrong], times.get(label, []))


def _pairs(recording: LongRecording, rng: random.Random) -> Iterator[LongQuestion]:
    places = {word: times[0] for word, times in _places_of_words(recording).items() if len(times) == 1}
    for _ in range(40 * (len(places) > 1)):
        one, other = rng.sample(sorted(places), 2)
        if abs(places[one][0] - places[other][0]) < 30:
            continue
        is_before = places[one][0] < places[other][0]
        right, wrong = ("yes", "no") if is_before else ("no", "yes")
        question = f'Is "{one}" said before "{other}"?'
        yield _asked(rng, "two_windows", question, right, [wrong], [places[one], places[other]])


def _places_of_words(recording: LongRecording) -> Mapping[str, list[tuple[float, float]]]:
    """Return the times of each long word, once per occurrence; words with a plural in the recording are left out."""
    places: dict[str, list[tuple[float, float]]] = {}
    for turn in recording.turns:
        for word in words(turn.line.text):
            places.setdefault(word, []).append((turn.start_s, turn.end_s))
    return {
        word: times
        for word, times in places.items()
        if len(word) >= _MIN_LETTERS and word.isalpha() and f"{word}s" not in places and not word.endswith("s")
    }


def _asked(
    rng: random.Random,
    kind: str,
    question: str,
    answer: str,
    wrong: Sequence[str],
    times: Sequence[tuple[float, float]],
) -> LongQuestion:
    choices = [answer, *wrong]
    if set(choices) != {"yes", "no"}:
        rng.shuffle(choices)
    else:
        choices = ["yes", "no"]
    return LongQuestion(kind, Truth(question, answer, tuple(choices)), tuple(times))


_KINDS: Mapping[str, Callable[[LongRecording, random.Random], Iterator[LongQuestion]]] = {
    "needle": _needles,
    "order": _orders,
    "count": _counts,
    "absence": _absences,
    "two_windows": _pairs,
}
"""Every kind of question, with its draw."""

KINDS = tuple(_KINDS)

SUITE = Suite(
    "recordings of 1 to 60 minutes of held-out scenes, through a running service",
    lambda request: [],
    split="test",
    is_recordings=True,
)
