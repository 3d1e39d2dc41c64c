"""The suite of sound around speech: silence before, between and behind it, joined clips, and very short ones.

Each clip has lines of one held-out voice. The parts contain the same clips with silence or one after another, so that
their figures are about one set of words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hyper_model.audio import SAMPLE_RATE_HZ, WINDOW_S
from training.data.clips import SEED_STRIDE
from training.data.sources.voices import Bank
from training.data.truth import Truth
from training.evaluation.suites.item import Item, Suite, SuiteRequest

SILENCES_S = (1, 3, 8)
SHORT_MS = (100, 200, 300)
JOINS = (2, 3)
PARTS: tuple[str, ...] = (
    *(f"{place}_{seconds}s" for place in ("before", "between", "behind") for seconds in SILENCES_S),
    *(f"joined_{num}" for num in JOINS),
)
"""Parts with the words of `main`; the parts `short_N` have pieces of N ms of them."""

DEFAULT_ITEMS = 60

_QUESTION = "How many people speak?"
_NUMBERS = ("one", "two", "three")
_ROOM_DBFS = -65.0
_MAX_LINES = 3


@dataclass(frozen=True, eq=False)
class _Clip:
    voice: str
    text: str
    samples_S: np.ndarray  # noqa: N815


def around_speech_items(bank: Bank, *, num_items: int) -> list[Item]:
    """Draw clips of held-out voices, and lay silence and other clips around them."""
    first_seed = SEED_STRIDE["test"] + 8_000_000
    clips = [_draw(bank, first_seed + number) for number in range(num_items)]
    items: list[Item] = []
    for number, clip in enumerate(clips):
        rng = np.random.default_rng(first_seed + number)
        others = [clips[(number + step) % len(clips)] for step in range(max(JOINS))]
        items.append(_item("main", number, [clip], clip.samples_S))
        for seconds in SILENCES_S:
            # Half of the silences are digital, half are those of a quiet room.
            silence_S = _room(rng, seconds) if number % 2 else np.zeros(seconds * SAMPLE_RATE_HZ, np.float32)
            pair = others[:2]
            items += [
                _item(f"before_{seconds}s", number, [clip], np.concatenate([silence_S, clip.samples_S])),
                _item(
                    f"between_{seconds}s",
                    number,
                    pair,
                    np.concatenate([pair[0].samples_S, silence_S, pair[1].samples_S]),
                ),
                _item(f"behind_{seconds}s", number, [clip], np.concatenate([clip.samples_S, silence_S])),
            ]
        for num in JOINS:
            joined = others[:num]
            items.append(_item(f"joined_{num}", number, joined, np.concatenate([each.samples_S for each in joined])))
        for milliseconds in SHORT_MS:
            length = milliseconds * SAMPLE_RATE_HZ // 1000
            start = int(rng.integers(0, len(clip.samples_S) - length))
            piece_S = clip.samples_S[start : start + length]
            items.append(_item(f"short_{milliseconds}", number, [], piece_S, voice=clip.voice))
    return [item for item in items if len(item.load()) <= WINDOW_S * SAMPLE_RATE_HZ]


def _draw(bank: Bank, seed: int) -> _Clip:
    """Draw one to three lines of one voice, with pauses between them and the noise of a quiet room."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    voice = draw.choice(sorted(each.name for each in bank.voices("test")))
    lines = bank.utterances[voice]
    parts: list[np.ndarray] = [np.zeros(draw.randint(2_000, 5_000), np.float32)]
    texts: list[str] = []
    for utterance, path in draw.sample(lines, min(draw.randint(1, _MAX_LINES), len(lines))):
        parts += [bank.samples(utterance, path), np.zeros(draw.randint(3_000, 8_000), np.float32)]
        texts.append(utterance.text)
    speech_S = np.concatenate(parts)
    return _Clip(voice, ". ".join(texts), speech_S + _room(rng, len(speech_S) / SAMPLE_RATE_HZ))


def _room(rng: np.random.Generator, seconds: float) -> np.ndarray:
    return rng.normal(0, 10 ** (_ROOM_DBFS / 20), round(seconds * SAMPLE_RATE_HZ)).astype(np.float32)


def _item(part: str, number: int, clips: Sequence[_Clip], samples_S: np.ndarray, voice: str = "") -> Item:
    voices = {clip.voice for clip in clips}
    choices, answer = (_NUMBERS, _NUMBERS[len(voices) - 1]) if clips else ((), "")
    truth = Truth(
        _QUESTION,
        answer,
        choices,
        num_speakers=len(voices) or None,
        transcript=". ".join(clip.text for clip in clips),
    )
    voice = voice or clips[0].voice
    return Item(f"{part}/{number}", part, truth, np.clip(samples_S, -1.0, 1.0), voice, voice)


def _items(request: SuiteRequest) -> list[Item]:
    return around_speech_items(request.open_bank("test"), num_items=request.num_items or DEFAULT_ITEMS)


SUITE = Suite("silence and joins around clips of held-out voices, and very short clips", _items, split="test")
