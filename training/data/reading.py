"""Draw questions in many wordings about scenes, with and without audio.

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

from hyper_model.trace import Trace
from training.data.questions import (
    NUMBER_WORDS,
    SceneExample,
    describe_people,
    draw_example,
    perception,
    possible_kinds,
)
from training.data.scenes import Scene
from training.data.sources import recordings as sounds
from training.data.sources.open_text import content_words
from training.data.sources.sentences import SLOTS, draw_line, vocabulary
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
    "transcript": {"transcript"},
    "about": {"speakers", "transcript", "environment"},
    "women": {"speakers"},
}
# Kinds of this module; the others are those of `questions`. Weights are higher for kinds learned least from clips.
_WEIGHTS = {"free": 5, "count": 2, "last": 2, "who": 2}
NOT_SAID = "it is not said"
"""Answer to a question without an answer in the clip."""
_NONE_OF_THESE = ("none of these", "none of them", "something else")
_NONE_OFFERED_SHARE, _NONE_RIGHT_SHARE = 0.12, 0.04
_WITH_NONE = frozenset({"free", "word", "environment", "says", "order", "last", "after"})
_MISHEARD_SHARE, _MISHEARD_WORDS = 0.5, (0.05, 0.35)
"""Share of reading examples with wrong words in their perception, and the share of these words."""


@dataclass(frozen=True)
class _Asked:
    question: str
    answer: str
    wrong: tuple[str, ...]
    planning: str
    reasoning: str


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
        if rng.random() < _MISHEARD_SHARE:
            trace = mishear(trace, rng)
        return replace(example, trace=trace)


def mishear(trace: Trace, rng: random.Random) -> Trace:
    """Replace words of a perception as a model with word errors writes them; the answer stays correct.

    A replaced word is misspelled, dropped, or another word with the same first letter.
    """
    share = rng.uniform(*_MISHEARD_WORDS)
    heard: dict[str, str] = {}

    def of_text(text: str) -> str:
        if text not in heard:
            written = (_misheard_word(word, rng) if rng.random() < share else word for word in text.split())
            heard[text] = " ".join(filter(None, written)) or text
        return heard[text]

    # A line has the same wrong words in SPEAKER and in ASR.
    speakers = tuple(replace(who, quotes=tuple(map(of_text, who.quotes))) for who in trace.speakers)
    transcript = None if trace.transcript is None else ". ".join(map(of_text, trace.transcript.split(". ")))
    return replace(trace, speakers=speakers, transcript=transcript)


def _misheard_word(word: str, rng: random.Random) -> str:
    way = rng.random()
    if way < 0.15:
        return ""
    if way < 0.55 and len(word) > 3:
        place = rng.randrange(1, len(word) - 1)
        return word[:place] + rng.choice(("", rng.choice("aeiourstnl"))) + word[place + 1 :]
    alike = _words_by_letter().get(word[0].lower(), ())
    return rng.choice(alike) if alike else word


@lru_cache(maxsize=1)
def _words_by_letter() -> Mapping[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    for word in sorted(vocabulary()):
        found.setdefault(word[0].lower(), []).append(word)
    return found


def ask(
    scene: Scene,
    rng: random.Random,
    found: Mapping[str, Sequence[str]],
    *,
    kind: str | None = None,
    held_out: bool = False,
) -> SceneExample:
    """Draw a question about a scene, with the whole trace.

    Args:
        found: The wordings of each kind (`wordings`).
        kind: One of `askable(scene)`; None draws one.
        held_out: True for the forms of choices in evaluation.
    """
    own = _own_kinds(scene, found)
    if kind is None:
        kinds = askable(scene, found)
        kind = rng.choices(kinds, [_WEIGHTS.get(each, 1) for each in kinds])[0]
    if kind in own:
        item = _ASK[kind](scene, rng, found)
        assert item is not None
    else:
        drawn = draw_example(scene, rng, kind=kind, with_choices=True, wordings=found)
        wrong = tuple(c for c in drawn.choices if c != drawn.answer)
        item = _Asked(drawn.question, drawn.answer, wrong, drawn.trace.planning or "", drawn.trace.reasoning or "")
    question = _frame(item.question, rng, found["frames"])
    return _with_choices(scene, kind, replace(item, question=question), rng, held_out=held_out)


def askable(scene: Scene, found: Mapping[str, Sequence[str]]) -> list[str]:
    """List the kinds of question with an unambiguous answer in this scene, the kinds of this module included."""
    kinds = [kind for kind in possible_kinds(scene) if kind != "source" or scene.background_line]
    return kinds + _own_kinds(scene, found)


def _own_kinds(scene: Scene, found: Mapping[str, Sequence[str]]) -> list[str]:
    return [kind for kind, item in _ASK.items() if item(scene, random.Random(0), found) is not None]


def _with_choices(
    scene: Scene, kind: str, asked: _Asked, rng: random.Random, *, held_out: bool = False
) -> SceneExample:
    """Vary the form of the answers, and offer them as choices in most questions."""
    wrong = [text for text in dict.fromkeys(asked.wrong) if text.lower() != asked.answer.lower()]
    offered = [asked.answer, *wrong[: rng.randint(1, _MAX_CHOICES - 1)]]
    is_none = False
    if kind in _WITH_NONE and len(offered) > 2 and rng.random() < _NONE_OFFERED_SHARE + _NONE_RIGHT_SHARE:
        # The right answer is left out, or the choice is wrong.
        is_none = rng.random() < _NONE_RIGHT_SHARE / (_NONE_OFFERED_SHARE + _NONE_RIGHT_SHARE)
        none = rng.choice(_NONE_OF_THESE)
        offered = [none, *offered[1:]] if is_none else [*offered, none]
    dressed = dress(offered, kind, rng, held_out=held_out)
    answer, choices = dressed[0], tuple(dressed)
    must_show = kind in ("word", "absent") or is_none
    if len(set(choices)) < len(choices) or len(choices) < 2 or not (must_show or rng.random() < _CHOICES_SHARE):
        answer, choices = asked.answer, ()
    choices = tuple(rng.sample(choices, len(choices)))
    trace = replace(
        perception(scene),
        planning=asked.planning,
        reasoning=asked.reasoning,
        summary=asked.answer,
        response=answer,
        final_answer=answer,
    )
    return SceneExample(scene, kind, asked.question, choices, answer, trace)


_FORMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "count": (("{d}",), ("{w} people", "one person"), ("{d} people", "1 person"), ("just {w}", "just one")),
    "sex": (("{}",), ("the {}",), ("a {}'s voice",), ("it is a {}",), ("that was the {}",)),
    "who": (("{}",), ("number {}",), ("S{}",), ("person {}",), ("the speaker number {}",)),
    "yes": (("yes, it is", "no, it is not"), ("true", "false"), ("yes indeed", "not at all")),
    "marks": (("{}.",), ('"{}"',)),
}
"""Forms of choices in training, per sort of answer."""
_HELD_OUT_FORMS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "count": (("exactly {w}", "exactly one"), ("{w} of them", "one of them"), ("{d} voices", "1 voice")),
    "sex": (("some {}",), ("the voice of a {}",), ("another {}",)),
    "who": (("voice {}",), ("speaker no. {}",), ("No. {}",)),
    "yes": (("that is so", "that is not so"), ("right", "wrong"), ("it does", "it does not")),
    "marks": (("- {}",), ("'{}'",), ("{}!",)),
}
"""Forms of choices in evaluation only."""


def dress(texts: Sequence[str], kind: str, rng: random.Random, *, held_out: bool = False) -> list[str]:
    """Write all texts in one drawn form; different texts stay different.

    Args:
        held_out: True for the forms of evaluation, always applied where the kind of question has some.
    """
    forms = _HELD_OUT_FORMS if held_out else _FORMS
    dressed = list(texts)
    is_always = 1.0 if held_out else 0.0
    if kind == "count" and rng.random() < max(0.5, is_always):
        form = rng.choice(forms["count"])
        dressed = [_number(text, form) for text in dressed]
    elif kind in ("first", "sex") and rng.random() < max(0.5, is_always):
        (form,) = rng.choice(forms["sex"])
        dressed = [form.format(text.removeprefix("a ")) for text in dressed]
    elif kind == "who" and rng.random() < max(0.5, is_always):
        (form,) = rng.choice(forms["who"])
        dressed = [form.format(text.removeprefix("speaker ")) for text in dressed]
    elif kind in ("mentioned", "present") and rng.random() < max(0.4, is_always):
        yes, no = rng.choice(forms["yes"])
        dressed = [yes if text == "yes" else no for text in dressed]
    if rng.random() < 0.3:
        dressed = [text[:1].upper() + text[1:] for text in dressed]
    style = rng.random()
    if held_out:
        (mark,) = rng.choice((("{}",), *forms["marks"]))
        return [mark.format(text) for text in dressed]
    if style < 0.22:
        (mark,) = forms["marks"][0 if style < 0.15 else 1]
        return [mark.format(text) for text in dressed]
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
    word = rng.choice(words)
    reasoning = next((f"{t.speaker} says {t.line.text}" for t in scene.turns if word in t.line.text), "")
    reasoning = reasoning if is_said and reasoning else f"nobody says {word}"
    question = rng.choice(found["mentioned"]).format(x=word)
    return _Asked(question, answer, (wrong,), f"look for {word}", reasoning)


def _ask_absent(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    spoken_words, absent = [*dict.fromkeys(_said_words(scene))], _absent_words(scene, rng, 1)
    if len(spoken_words) < 2 or not absent:
        return None
    wrong = rng.sample(spoken_words, min(len(spoken_words), _MAX_CHOICES - 1))
    reasoning = f"nobody says {absent[0]}"
    return _Asked(rng.choice(found["absent"]), absent[0], tuple(wrong), "look for each word", reasoning)


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
    question = rng.choice(found["who"]).format(x=named[0])
    return _Asked(question, f"speaker {named[1][1:]}", tuple(wrong), "find the sentence", f"{named[1]} says it")


def _ask_sex(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    named = _turn_to_name(scene, rng)
    if named is None:
        return None
    sex = next(speaker.sex for speaker in scene.speakers if speaker.id == named[1])
    other = "man" if sex == "woman" else "woman"
    question = rng.choice(found["sex"]).format(x=named[0])
    return _Asked(question, f"a {sex}", (f"a {other}",), "find the sentence", f"{named[1]} says it, a {sex}")


def _ask_after(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    texts = [turn.line.text for turn in scene.turns]
    places = [i for i, text in enumerate(texts[:-1]) if texts.count(text) == 1 and text != texts[i + 1]]
    if not places:
        return None
    place = rng.choice(places)
    wrong = [text for text in texts if text not in (texts[place], texts[place + 1])] + [*scene.other_lines]
    question = rng.choice(found["after"]).format(x=texts[place])
    reasoning = f"{scene.turns[place + 1].speaker} speaks next"
    return _Asked(question, texts[place + 1], tuple(wrong), "find the sentence and the next one", reasoning)


def _ask_transcript(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    if not scene.turns:
        return None
    question = rng.choice(found["transcript"])
    return _Asked(question, scene.transcript, scene.other_lines, "write down the words", describe_people(scene))


def describe(scene: Scene) -> str:
    """Return one sentence about people, first words and background."""
    people = describe_people(scene)
    start = f'{people}: "{scene.turns[0].line.text}"' if scene.turns else people
    quiet = scene.environment == sounds.QUIET
    return start + (", and nothing else is heard" if quiet else f", with {scene.environment} in the background")


def _ask_about(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    reasoning = f"{describe_people(scene)}, the background is {scene.environment}"
    return _Asked(rng.choice(found["about"]), describe(scene), (), "put the perception together", reasoning)


def _ask_women(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    if not scene.speakers:
        return None
    sex, plural = rng.choice((("woman", "women"), ("man", "men")))
    number = sum(speaker.sex == sex for speaker in scene.speakers)
    answer = "none" if number == 0 else NUMBER_WORDS[number]
    wrong = [word for word in ("none", *NUMBER_WORDS[1:5]) if word != answer]
    rng.shuffle(wrong)
    question = rng.choice(found["women"]).format(x=sex, xs=plural)
    return _Asked(question, answer, tuple(wrong), f"count the {plural}", describe_people(scene))


def _ask_unknown(scene: Scene, rng: random.Random, found: Mapping[str, Sequence[str]]) -> _Asked | None:
    """Ask about a sentence nobody says."""
    asked = {question.question for turn in scene.turns for question in turn.line.questions}
    text = f"{scene.transcript} {scene.background_line or ''}"
    for _ in range(8):
        questions = draw_line(rng).questions
        chosen = rng.choice(questions) if questions else None
        if chosen is None or chosen.question in asked or chosen.answer in text:
            continue
        wrong = [word for word in SLOTS[chosen.slot] if word not in text]
        wrong = rng.sample(wrong, min(4, len(wrong)))
        return _Asked(chosen.question, NOT_SAID, tuple(wrong), "find the sentence about it", "nobody speaks about it")
    return None


_ASK: dict[str, Callable[[Scene, random.Random, Mapping[str, Sequence[str]]], _Asked | None]] = {
    "mentioned": _ask_mentioned,
    "absent": _ask_absent,
    "who": _ask_who,
    "sex": _ask_sex,
    "after": _ask_after,
    "transcript": _ask_transcript,
    "about": _ask_about,
    "women": _ask_women,
    "unknown": _ask_unknown,
}
