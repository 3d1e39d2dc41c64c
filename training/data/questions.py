"""Draw examples about a scene: a question of one kind, its choices and the strict gold trace.

Each answer and each perception section follow from the scene's truth. Wrong choices share slot, class or clip with the
right answer, so their form gives no clue. This module depends on no audio, token or model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hyper_model.trace import Speaker, Trace
from training.data.scenes import Scene
from training.data.sources import recordings as sounds
from training.data.sources.open_text import content_words
from training.data.sources.sentences import SLOTS, Line, draw_line, line_from_text
from training.data.truth import Truth

Wordings = Mapping[str, Sequence[str]]
"""Ways to ask each kind of question."""

NUMBER_WORDS = ("nobody", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class SceneExample:
    """One data-set row: scene, question, gold answer and gold trace."""

    scene: Scene
    kind: str
    question: str
    choices: tuple[str, ...]
    answer: str
    """The gold answer; with choices, exactly one of them."""
    trace: Trace


@dataclass(frozen=True)
class _Item:
    question: str
    answer: str
    wrong: tuple[str, ...]
    """Wrong choices; empty if the kind is always an open question."""
    planning: str
    reasoning: str


_QUESTIONS: dict[str, tuple[str, ...]] = {
    "environment": (
        "What is in the background?",
        "What sound is in the background?",
        "Which background sound can be heard?",
        "What is that noise?",
        "What environment is this?",
    ),
    "present": (
        "Is there {x} in the background?",
        "Can you hear {x}?",
        "Does the clip contain {x}?",
        "Is {x} audible?",
    ),
    "count": (
        "How many people speak?",
        "How many speakers are there?",
        "How many different voices can be heard?",
        "How many people are talking?",
    ),
    "first": ("Who speaks first?", "Is the first speaker a woman or a man?", "Which voice starts?"),
    "says": (
        "What does speaker {n} say?",
        "What does the {nth} speaker say first?",
        "Which sentence does speaker {n} say?",
    ),
    "word": (
        "Which of these words is said?",
        "Which word can be heard?",
        "Which of the words occurs?",
    ),
    "last": ("What is said last?", "Which sentence comes last?", "How does the conversation end?"),
    "order": ("What is said first?", "Which sentence comes first?", "How does the conversation start?"),
    "source": (
        'Does a speaker or the background say "{x}"?',
        'Where does "{x}" come from, a speaker or the background?',
        'Who says "{x}", a speaker or the background?',
    ),
}
_OF_A_SPEAKER = (
    "According to the speaker, {q}",
    "According to what a speaker says, {q}",
    "By the speaker's words and not the background's, {q}",
)
"""Wordings of a question with different answers in a speaker's line and in the background."""

_ORDINALS = {"S1": "first", "S2": "second", "S3": "third", "S4": "fourth", "S5": "fifth", "S6": "sixth"}


def environment_text(scene: Scene) -> str:
    """Return the text of the ENV section."""
    return scene.environment


def describe_people(scene: Scene) -> str:
    """Return a phrase like "two women and one man speak"."""
    if not scene.speakers:
        return "nobody speaks"
    women = sum(s.sex == "woman" for s in scene.speakers)
    men = len(scene.speakers) - women
    parts = []
    if women:
        parts.append(f"{NUMBER_WORDS[women]} {'woman' if women == 1 else 'women'}")
    if men:
        parts.append(f"{NUMBER_WORDS[men]} {'man' if men == 1 else 'men'}")
    return f"{' and '.join(parts)} {'speaks' if len(scene.speakers) == 1 else 'speak'}"


def _ask_environment(scene: Scene, rng: random.Random, wordings: Wordings) -> _Item:
    wrong = [x for x in (*sounds.labels(), sounds.QUIET, sounds.BACKGROUND_SPEECH) if x != scene.environment]
    return _Item(
        rng.choice(wordings["environment"]),
        scene.environment,
        tuple(rng.sample(wrong, 4)),
        "name the background",
        f"the background is {scene.environment}",
    )


def _ask_present(scene: Scene, rng: random.Random, wordings: Wordings) -> _Item:
    labels = [x for x in (*sounds.labels(), sounds.BACKGROUND_SPEECH)]
    is_there = scene.environment in labels and rng.random() < 0.5
    thing = scene.environment if is_there else rng.choice([x for x in labels if x != scene.environment])
    reasoning = f"the background is {scene.environment}" + ("" if is_there else f", not {thing}")
    return _Item(
        rng.choice(wordings["present"]).format(x=thing),
        "yes" if is_there else "no",
        ("no" if is_there else "yes",),
        f"listen for {thing}",
        reasoning,
    )


def _ask_count(scene: Scene, rng: random.Random, wordings: Wordings) -> _Item:
    answer = NUMBER_WORDS[len(scene.speakers)]
    low = 0 if not scene.speakers or rng.random() < 0.2 else 1
    wrong = [word for word in NUMBER_WORDS[low:] if word != answer]
    rng.shuffle(wrong)
    return _Item(rng.choice(wordings["count"]), answer, tuple(wrong), "count the voices", describe_people(scene))


def _ask_first(scene: Scene, rng: random.Random, wordings: Wordings) -> _Item:
    sex = scene.speakers[0].sex
    return _Item(
        rng.choice(wordings["first"]),
        f"a {sex}",
        ("a man" if sex == "woman" else "a woman",),
        "find the first voice",
        f"S1 is a {sex}",
    )


def _other_lines(scene: Scene, rng: random.Random, answer: Line, count: int) -> list[str]:
    """Draw wrong lines: first others of the clip, then absent lines of the same sort as the answer."""
    wrong = [turn.line.text for turn in scene.turns if turn.line.text != answer.text]
    rng.shuffle(wrong)
    wrong = list(dict.fromkeys(wrong))[: rng.randint(0, 2)]
    if answer.is_open:
        wrong += rng.sample(scene.other_lines, len(scene.other_lines))
    while len(wrong) < count:
        text = draw_line(rng).text
        if text != answer.text and text not in wrong:
            wrong.append(text)
    return wrong[:count]


def _ask_says(scene: Scene, rng: random.Random, wordings: Wordings) -> _Item:
    speaker = rng.choice(scene.speakers)
    line = next(turn.line for turn in scene.turns if turn.speaker == speaker.id)
    answer = line.text
    # Other lines of the same speaker are right answers too, so wrong choices come from other people or are drawn.
    own = {turn.line.text for turn in scene.turns if turn.speaker == speaker.id}
    wrong = [text for text in _other_lines(scene, rng, line, 4) if text not in own]
    question = rng.choice(wordings["says"]).format(n=speaker.id[1:], nth=_ORDINALS[speaker.id])
    return _Item(question, answer, tuple(wrong), f"find what {speaker.id} says", f"{speaker.id} says {answer}")


def _heard_words(scene: Scene) -> set[str]:
    """Return every word of the clip in lower case, background included; none of them can be a wrong choice."""
    return set(f"{scene.transcript} {scene.background_line or ''}".lower().replace(".", "").split())


def _askable_words(scene: Scene) -> list[tuple[str, str, tuple[str, ...]]]:
    """List (speaker, word, wrong words) for the question kind `word`.

    Wrong words for a pattern's slot come from the same slot; those for an open line come from other open lines.
    """
    audible = _heard_words(scene)
    absent = [w for line in scene.other_lines for w in content_words(line) if w.lower() not in audible]
    askable: list[tuple[str, str, tuple[str, ...]]] = []
    for turn in scene.turns:
        for slot_question in turn.line.questions:
            wrong = tuple(word for word in SLOTS[slot_question.slot] if word.lower() not in audible)
            askable.append((turn.speaker, slot_question.answer, wrong))
        if turn.line.is_open:
            for word in dict.fromkeys(content_words(turn.line.text)):
                # Both come from lines of one source, so frequency gives no clue; similar length removes another clue.
                wrong = tuple(dict.fromkeys(w for w in absent if abs(len(w) - len(word)) <= 3))
                if wrong:
                    askable.append((turn.speaker, word, wrong))
    return askable


def _ask_word(scene: Scene, rng: random.Random, wordings: Wordings) -> _Item:
    speaker, word, wrong = rng.choice(_askable_words(scene))
    return _Item(
        rng.choice(wordings["word"]),
        word,
        tuple(rng.sample(wrong, min(4, len(wrong)))),
        "look for the word",
        f"{speaker} says {word}",
    )


def _ask_end(kind: str) -> Callable[[Scene, random.Random, Wordings], _Item]:
    def ask(scene: Scene, rng: random.Random, wordings: Wordings) -> _Item:
        turn = scene.turns[-1 if kind == "last" else 0]
        wrong = _other_lines(scene, rng, turn.line, 4)
        place = "last" if kind == "last" else "first"
        return _Item(
            rng.choice(wordings[kind]),
            turn.line.text,
            tuple(wrong),
            f"find the {place} sentence",
            f"{turn.speaker} speaks {place}",
        )

    return ask


def _ask_source(scene: Scene, rng: random.Random, wordings: Wordings) -> _Item:
    is_background = scene.background_line is not None and rng.random() < 0.6
    line = scene.background_line if is_background else rng.choice(scene.turns).line.text
    who = "the background" if is_background else "a speaker"
    reasoning = "no speaker says it" if is_background else "the transcript has it"
    question = rng.choice(wordings["source"]).format(x=line)
    return _Item(question, who, ("a speaker" if is_background else "the background",), "find who says it", reasoning)


def _ask_content(scene: Scene, rng: random.Random, wordings: Wordings) -> _Item:
    candidates = [(t, q) for t in scene.turns for q in t.line.questions]
    contradicted = [(t, q) for t, q in candidates if q.question == scene.contradicted]
    turn, chosen = rng.choice(contradicted or candidates)
    audible = _heard_words(scene)
    absent = [word for word in SLOTS[chosen.slot] if word.lower() not in audible]
    wrong = rng.sample(absent, min(4, len(absent)))
    question = chosen.question
    if contradicted and scene.background_line is not None:
        # The background's answer is the wrong choice for a model without separation of speaker and background.
        background = line_from_text(scene.background_line)
        wrong = [q.answer for q in background.questions if q.question == chosen.question] + wrong[:3]
        question = rng.choice(_OF_A_SPEAKER).format(q=question[0].lower() + question[1:])
    return _Item(
        question,
        chosen.answer,
        tuple(wrong),
        "find the sentence about it",
        f"{turn.speaker} says {turn.line.text}",
    )


_ASK: dict[str, Callable[[Scene, random.Random, Wordings], _Item]] = {
    "environment": _ask_environment,
    "present": _ask_present,
    "count": _ask_count,
    "first": _ask_first,
    "says": _ask_says,
    "word": _ask_word,
    "order": _ask_end("order"),
    "last": _ask_end("last"),
    "source": _ask_source,
    "free": _ask_content,
}
KINDS = tuple(_ASK)


def possible_kinds(scene: Scene) -> list[str]:
    """List the kinds of question with an unambiguous answer in this scene."""
    kinds = ["environment", "present", "count"]
    if scene.turns:
        kinds += ["first", "says"]
        if _askable_words(scene):
            kinds.append("word")
        questions = [q.question for turn in scene.turns for q in turn.line.questions]
        # A question with two answers in one clip is ambiguous.
        if questions and len(set(questions)) == len(questions):
            kinds.append("free")
        if len(scene.turns) > 1:
            kinds += ["order", "last"]
        if scene.background_line is not None:
            kinds.append("source")
    return kinds


def perception(scene: Scene) -> Trace:
    """Return the question-independent part of the trace."""
    speakers = tuple(
        Speaker(s.id, s.sex, tuple(turn.line.text for turn in scene.turns if turn.speaker == s.id))
        for s in scene.speakers
    )
    return Trace(environment=environment_text(scene), speakers=speakers, transcript=scene.transcript)


def draw_example(
    scene: Scene,
    rng: random.Random,
    *,
    kind: str | None = None,
    with_choices: bool | None = None,
    wordings: Wordings | None = None,
) -> SceneExample:
    """Draw one example about a scene.

    Args:
        kind: one of `possible_kinds(scene)`; None draws one.
        with_choices: force or forbid choices. None draws: three of four examples have 2 to 5 choices.
        wordings: questions of each kind to draw from; None takes those of this module.
    """
    if kind is None:
        kind = rng.choice(possible_kinds(scene))
    item = _ASK[kind](scene, rng, wordings or _QUESTIONS)
    choices: tuple[str, ...] = ()
    ask_choices = rng.random() < 0.75 if with_choices is None else with_choices
    # "Which of these words" needs its choices.
    if item.wrong and (ask_choices or kind == "word"):
        count = rng.randint(1, min(4, len(item.wrong)))
        mixed = [item.answer, *item.wrong[:count]]
        rng.shuffle(mixed)
        choices = tuple(mixed)
    trace = replace(
        perception(scene),
        planning=item.planning,
        reasoning=item.reasoning,
        summary=item.answer,
        response=item.answer,
        # Give the words, not the letter. For the letter, a decoder of this size would have to find the choice equal to
        # its answer, then read the letter before it. It did not learn this in 2,200 steps (docs/LOG.md).
        final_answer=item.answer,
    )
    is_hard = scene.has_overlap or len(scene.speakers) > 2 or (scene.snr_db is not None and scene.snr_db < 5.0)
    if is_hard and item.wrong and rng.random() < 0.06:
        wrong = rng.choice([c for c in choices if c != item.answer] or list(item.wrong))
        trace = replace(trace, response=wrong, reflection=f"{wrong} is wrong, {item.reasoning}")
    return SceneExample(scene, kind, item.question, choices, item.answer, trace)


def truth_of(example: SceneExample) -> Truth:
    """Return the complete truth of a scene's example."""
    scene = example.scene
    return Truth(
        example.question,
        example.answer,
        example.choices,
        environment=scene.environment,
        num_speakers=len(scene.speakers),
        transcript=scene.transcript,
    )
