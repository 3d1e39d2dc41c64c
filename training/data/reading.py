"""Draw questions in many wordings about scenes without audio, to teach a decoder reading.

`wordings.json` has the wordings of each kind of question. A fifth of them, chosen by a hash of their text, is never
trained. Choices come in several forms: with capitals, full stops, quotes, articles or digits, equal for all choices of
a question. This module depends on no audio, token or model.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from training.data.questions import NUMBER_WORDS, SceneExample, draw_example, perception, possible_kinds
from training.data.scenes import Scene
from training.data.sources.open_text import content_words
from training.data.sources.sentences import vocabulary
from training.data.text_scenes import SceneWriter

_FILE = Path(__file__).with_name("wordings.json")
_HELD_OUT_FIFTH = 0
_CHOICES_SHARE = 0.75
_MAX_CHOICES = 5
_DROPPED_SHARE = {"speakers": 0.2, "transcript": 0.4, "environment": 0.15}
"""Share of examples without a part of the trace, if the question does not need it."""
_NEEDS = {
    "environment": {"environment"},
    "present": {"environment"},
    "count": {"speakers"},
    "first": {"speakers"},
    "says": {"speakers"},
    "who": {"speakers"},
    "sex": {"speakers"},
    "source": {"speakers", "transcript", "environment"},
    "order": {"transcript"},
    "last": {"transcript"},
    "after": {"transcript"},
}
# Kinds of this module; the others are those of `questions`. Weights are higher for kinds learned least from clips.
_WEIGHTS = {"free": 5, "count": 2, "last": 2, "who": 2}


@dataclass(frozen=True)
class _Asked:
    question: str
    answer: str
    wrong: tuple[str, ...]


def is_held_out(wording: str) -> bool:
    """Return True for a wording of the evaluation's fifth."""
    return hashlib.sha256(wording.encode()).digest()[0] % 5 == _HELD_OUT_FIFTH


@lru_cache(maxsize=1)
def _all_wordings() -> Mapping[str, tuple[str, ...]]:
    return {kind: tuple(found) for kind, found in json.loads(_FILE.read_text(encoding="utf-8")).items()}


@lru_cache(maxsize=2)
def wordings(*, held_out: bool = False) -> Mapping[str, tuple[str, ...]]:
    """Return the wordings of each kind of question: the trained ones, or the held-out fifth.

    `frames` has sentences around a question, and `anything` has questions for any clip; both are in both sets.
    """
    return {
        kind: found if kind == "frames" else tuple(w for w in found if is_held_out(w) == held_out) or found[:1]
        for kind, found in _all_wordings().items()
    }


@dataclass(frozen=True, eq=False)
class Reader:
    """Source of questions about scenes without audio.

    Attributes:
        scenes: Source of the scenes.
        held_out: True for the held-out wordings.
    """

    scenes: SceneWriter
    held_out: bool = False

    def draw(self, rng: random.Random) -> SceneExample:
        """Draw a question with or without choices, and its trace.

        The trace has perception, RESPONSE and FINAL_ANSWER; parts unnecessary for the question are sometimes missing.
        """
        scene = self.scenes.draw(rng).scene
        example = ask(scene, rng, wordings(held_out=self.held_out))
        trace = replace(example.trace, planning=None, reasoning=None, summary=None, reflection=None)
        for part, share in _DROPPED_SHARE.items():
            is_needed = part in _NEEDS.get(example.kind, ())
            if not is_needed and rng.random() < share:
                is_last = (part == "transcript" and not trace.speakers) or (
                    part == "speakers" and trace.transcript is None
                )
                trace = trace if is_last else replace(trace, **{part: () if part == "speakers" else None})
        return replace(example, trace=trace)


def ask(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> SceneExample:
    """Draw a question of any kind about a scene.

    Args:
        found: The wordings of each kind (`wordings`).
    """
    kinds = [kind for kind in possible_kinds(scene) if kind != "source" or scene.background_line]
    own = [kind for kind, item in _ASK.items() if item(scene, random.Random(0), found) is not None]
    kinds += own
    kind = rng.choices(kinds, [_WEIGHTS.get(kind, 1) for kind in kinds])[0]
    if kind in own:
        item = _ASK[kind](scene, rng, found)
        assert item is not None
    else:
        drawn = draw_example(scene, rng, kind=kind, with_choices=True, wordings=found)
        item = _Asked(drawn.question, drawn.answer, tuple(c for c in drawn.choices if c != drawn.answer))
    question = _frame(item.question, rng, found["frames"])
    return _with_choices(scene, kind, replace(item, question=question), rng)


def _with_choices(scene: Scene, kind: str, asked: _Asked, rng: random.Random) -> SceneExample:
    """Vary the form of the answers, and offer them as choices in most questions."""
    wrong = [text for text in dict.fromkeys(asked.wrong) if text.lower() != asked.answer.lower()]
    dressed = dress([asked.answer, *wrong[: rng.randint(1, _MAX_CHOICES - 1)]], kind, rng)
    answer, choices = dressed[0], tuple(dressed)
    must_show = kind in ("word", "absent")
    if len(set(choices)) < len(choices) or len(choices) < 2 or not (must_show or rng.random() < _CHOICES_SHARE):
        answer, choices = asked.answer, ()
    choices = tuple(rng.sample(choices, len(choices)))
    trace = replace(perception(scene), response=answer, final_answer=answer)
    return SceneExample(scene, kind, asked.question, choices, answer, trace)


def dress(texts: Sequence[str], kind: str, rng: random.Random) -> list[str]:
    """Write all texts in one drawn form; different texts stay different."""
    dressed = list(texts)
    if kind == "count" and rng.random() < 0.5:
        forms = rng.choice(
            (("{d}",), ("{w} people", "one person"), ("{d} people", "1 person"), ("just {w}", "just one"))
        )
        dressed = [_number(text, forms) for text in dressed]
    elif kind in ("first", "sex") and rng.random() < 0.5:
        form = rng.choice(("{}", "the {}", "a {}'s voice", "it is a {}", "that was the {}"))
        dressed = [form.format(text.removeprefix("a ")) for text in dressed]
    elif kind == "who" and rng.random() < 0.5:
        form = rng.choice(("{}", "number {}", "S{}", "person {}", "the speaker number {}"))
        dressed = [form.format(text.removeprefix("speaker ")) for text in dressed]
    elif kind in ("mentioned", "present") and rng.random() < 0.4:
        yes, no = rng.choice((("yes, it is", "no, it is not"), ("true", "false"), ("yes indeed", "not at all")))
        dressed = [yes if text == "yes" else no for text in dressed]
    if rng.random() < 0.3:
        dressed = [text[:1].upper() + text[1:] for text in dressed]
    style = rng.random()
    if style < 0.15:
        return [f"{text}." for text in dressed]
    if style < 0.22:
        return [f'"{text}"' for text in dressed]
    return dressed


def _number(text: str, forms: Sequence[str]) -> str:
    value = NUMBER_WORDS.index(text)
    if value == 1 and len(forms) > 1:
        return forms[1]
    return forms[0].format(d=value, w="no" if value == 0 and " people" in forms[0] else text)


def _frame(question: str, rng: random.Random, frames: Sequence[str]) -> str:
    is_plain = question[:1].isalpha() and not question.startswith("I ")
    return rng.choice(frames).format(q=question, l=question[0].lower() + question[1:] if is_plain else question)


def _said_words(scene: Scene) -> list[str]:
    return [w for turn in scene.turns for w in content_words(turn.line.text)]


def _absent_words(scene: Scene, rng: random.Random, count: int) -> list[str]:
    """Draw words of other lines, absent from this clip and its background."""
    audible = set(f"{scene.transcript} {scene.background_line or ''}".lower().replace(".", "").split())
    others = [w for line in scene.other_lines for w in content_words(line)]
    others += rng.sample(sorted(vocabulary()), 12)
    absent = [w for w in dict.fromkeys(others) if w.lower() not in audible and len(w) > 3]
    return rng.sample(absent, min(count, len(absent)))


def _ask_mentioned(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    spoken_words = _said_words(scene)
    is_said = rng.random() < 0.5
    words = spoken_words if is_said else _absent_words(scene, rng, 1)
    if not spoken_words or not words:
        return None
    answer, wrong = ("yes", "no") if is_said else ("no", "yes")
    return _Asked(rng.choice(found["mentioned"]).format(x=rng.choice(words)), answer, (wrong,))


def _ask_absent(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    spoken_words, absent = [*dict.fromkeys(_said_words(scene))], _absent_words(scene, rng, 1)
    if len(spoken_words) < 2 or not absent:
        return None
    wrong = rng.sample(spoken_words, min(len(spoken_words), _MAX_CHOICES - 1))
    return _Asked(rng.choice(found["absent"]), absent[0], tuple(wrong))


def _turn_to_name(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Draw (line, speaker's id) of a line with a single occurrence."""
    texts = [turn.line.text for turn in scene.turns]
    single = [turn for turn in scene.turns if texts.count(turn.line.text) == 1]
    turn = rng.choice(single) if single else None
    return None if turn is None else (turn.line.text, turn.speaker)


def _ask_who(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    named = _turn_to_name(scene, rng)
    if named is None or len(scene.speakers) < 2:
        return None
    wrong = [f"speaker {speaker.id[1:]}" for speaker in scene.speakers if speaker.id != named[1]]
    rng.shuffle(wrong)
    return _Asked(rng.choice(found["who"]).format(x=named[0]), f"speaker {named[1][1:]}", tuple(wrong))


def _ask_sex(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    named = _turn_to_name(scene, rng)
    if named is None:
        return None
    sex = next(speaker.sex for speaker in scene.speakers if speaker.id == named[1])
    other = "man" if sex == "woman" else "woman"
    return _Asked(rng.choice(found["sex"]).format(x=named[0]), f"a {sex}", (f"a {other}",))


def _ask_after(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    texts = [turn.line.text for turn in scene.turns]
    places = [i for i, text in enumerate(texts[:-1]) if texts.count(text) == 1 and text != texts[i + 1]]
    if not places:
        return None
    place = rng.choice(places)
    wrong = [text for text in texts if text not in (texts[place], texts[place + 1])] + [*scene.other_lines]
    return _Asked(rng.choice(found["after"]).format(x=texts[place]), texts[place + 1], tuple(wrong))


_ASK: dict[str, Callable[[Scene, random.Random, Mapping[str, Sequence[str]]], _Asked | None]] = {
    "mentioned": _ask_mentioned,
    "absent": _ask_absent,
    "who": _ask_who,
    "sex": _ask_sex,
    "after": _ask_after,
}
