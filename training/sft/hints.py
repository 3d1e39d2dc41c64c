"""Draw contexts as users and recognisers supply them: absent, right, partly wrong, of another clip, or a list of words.

A decoder has to use a context as far as it fits the sound, and to distrust it otherwise. Its own transcript stays the
true one in training. This module depends on no model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from training.text_metrics import words

_KINDS, _WEIGHTS = ("right", "slightly wrong", "wrong", "foreign", "words"), (30, 35, 15, 12, 8)
_SLIGHT, _STRONG = 0.08, 0.35
_NUM_WORDS = (3, 8)


def draw_hint(transcript: str, other: str, rng: random.Random) -> str:
    """Return a context for a clip.

    Args:
        transcript: True transcript of the clip; a clip without speech has none.
        other: Transcript of another clip, the source of wrong words.
    """
    own, foreign = words(transcript), words(other)
    match rng.choices(_KINDS, _WEIGHTS)[0]:
        case "right":
            return transcript
        case "slightly wrong":
            return " ".join(_misheard(own, foreign, _SLIGHT, rng))
        case "wrong":
            return " ".join(_misheard(own, foreign, _STRONG, rng))
        case "foreign":
            return other
        case _:
            found = sorted({*own, *foreign})
            return ", ".join(rng.sample(found, min(len(found), rng.randint(*_NUM_WORDS))))


def _misheard(own: Sequence[str], foreign: Sequence[str], share: float, rng: random.Random) -> list[str]:
    """Return words with a share of them replaced, left out or doubled."""
    found: list[str] = []
    for word in own:
        if rng.random() >= share:
            found.append(word)
            continue
        match rng.randrange(4):
            case 0:
                continue
            case 1:
                found += [word, word]
            case _:
                # A recogniser confuses words of similar beginning and length.
                near = sorted(foreign, key=lambda one: (one[:1] != word[:1], abs(len(one) - len(word)), one))
                found.append(rng.choice(near[:3]) if near else word)
    return found
