"""Draw scenes without audio: speakers, lines and background only.

The conclusions of a trace follow from its own transcript. The model can learn them from scenes without audio, in any
number and without a synthesizer. This module depends on no audio, token or model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from training.data.questions import SceneExample, draw_example, possible_kinds
from training.data.scenes import NUM_OTHER_LINES, NUM_SPEAKERS, NUM_TURNS, Scene, SceneSpeaker, Turn
from training.data.sources import recordings as sounds
from training.data.sources.sentences import SLOTS, Line, draw_line, line_from_text

# These kinds depend on the transcript; clips alone taught them least (docs/LOG.md).
_KIND_WEIGHTS = {"free": 4, "word": 2, "source": 2}
_OPEN_SHARES = (0.0, 0.5)
_SEXES: tuple[Literal["woman", "man"], ...] = ("woman", "man")
_QUIET_SHARE, _BACKGROUND_SPEECH_SHARE = 0.1, 0.3
_CONTRADICTING_SHARE = 0.8


@dataclass(frozen=True)
class SceneWriter:
    """Source of examples about scenes without audio.

    Attributes:
        open_texts: Open text of training voices; if empty, all lines come from sentence patterns.
        held_out: Evaluation lines, excluded from training.
    """

    open_texts: Sequence[str]
    held_out: Collection[str]

    def draw(self, rng: random.Random) -> SceneExample:
        """Draw an example; its scene has seed -1, no recording and zero times."""
        scene = self._draw_scene(rng)
        kinds = possible_kinds(scene)
        return draw_example(scene, rng, kind=rng.choices(kinds, [_KIND_WEIGHTS.get(kind, 1) for kind in kinds])[0])

    def _draw_scene(self, rng: random.Random) -> Scene:
        speakers = tuple(
            SceneSpeaker(f"S{i + 1}", "unheard", rng.choice(_SEXES)) for i in range(rng.choices(*NUM_SPEAKERS)[0])
        )
        lines = self._draw_lines(rng, len(speakers))
        turns = tuple(
            Turn(speaker, line, 0.0, 0.0) for speaker, line in zip(_order(rng, speakers, lines), lines, strict=True)
        )
        environment, contradicted, background_line = self._draw_background(rng, lines)
        used_texts = {*(line.text for line in lines), background_line}
        return Scene(
            seed=-1,
            split="train",
            environment=environment,
            recording=None,
            snr_db=None,
            speakers=speakers,
            turns=turns,
            background_line=background_line,
            has_overlap=False,
            duration_s=0.0,
            other_lines=tuple(text for text in self._draw_open(rng, NUM_OTHER_LINES) if text not in used_texts),
            contradicted=contradicted,
        )

    def _draw_lines(self, rng: random.Random, num_speakers: int) -> list[Line]:
        if not num_speakers:
            return []
        num_turns = rng.choices(*NUM_TURNS[num_speakers])[0]
        open_share = rng.choice(_OPEN_SHARES) if self.open_texts else 0.0
        lines: dict[str, Line] = {}
        while len(lines) < num_turns:
            line = line_from_text(rng.choice(self.open_texts)) if rng.random() < open_share else draw_line(rng)
            if line.text not in self.held_out:
                lines[line.text] = line
        return list(lines.values())

    def _draw_open(self, rng: random.Random, count: int) -> list[str]:
        return [*dict.fromkeys(rng.choice(self.open_texts) for _ in range(count))] if self.open_texts else []

    def _draw_background(self, rng: random.Random, lines: Sequence[Line]) -> tuple[str, str | None, str | None]:
        """Draw a background.

        Returns:
            Its class, the contradicted question or None, and its line or None.
        """
        if rng.random() < _QUIET_SHARE:
            return sounds.QUIET, None, None
        if not lines or rng.random() >= _BACKGROUND_SPEECH_SHARE:
            return rng.choice(sounds.labels()), None, None
        if rng.random() < _CONTRADICTING_SHARE and (contradiction := self._contradict(rng, lines)):
            return sounds.BACKGROUND_SPEECH, *contradiction
        while True:
            text = draw_line(rng).text
            if text not in self.held_out and all(text != line.text for line in lines):
                return sounds.BACKGROUND_SPEECH, None, text

    def _contradict(self, rng: random.Random, lines: Sequence[Line]) -> tuple[str, str] | None:
        """Return a question answered by one of the lines, and the same line with another answer."""
        candidates = [(line, question) for line in lines for question in line.questions]
        if len({question.question for _, question in candidates}) < len(candidates):
            return None
        rng.shuffle(candidates)
        for line, question in candidates:
            word = rng.choice([word for word in SLOTS[question.slot] if word != question.answer])
            text = re.sub(rf"\b{re.escape(question.answer)}\b", word, line.text, count=1)
            others = {q.question: q.answer for q in line_from_text(text).questions}
            if others.get(question.question, question.answer) != question.answer and text not in self.held_out:
                return question.question, text
        return None


def _order(rng: random.Random, speakers: Sequence[SceneSpeaker], lines: Sequence[Line]) -> list[str]:
    """Assign a speaker to each line, at least one line per speaker, numbered by first speech."""
    names = [speaker.id for speaker in speakers]
    drawn = names + [rng.choice(names) for _ in range(len(lines) - len(names))]
    rng.shuffle(drawn)
    numbered = {name: speakers[i].id for i, name in enumerate(dict.fromkeys(drawn))}
    return [numbered[name] for name in drawn]
