"""The truth of a question: its gold answer and the facts of its clip for rewards and figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Truth:
    """A question's gold answer and the known facts of its clip.

    Attributes:
        answer: With choices, exactly one of them.
        accepted: Answers to a question without choices, for the rule of containment; empty without such a rule.
        environment, num_speakers, transcript: None if unknown to the data set; an empty transcript means no speech.
    """

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    environment: str | None = None
    num_speakers: int | None = None
    transcript: str | None = None
    accepted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.choices and self.answer not in self.choices:
            raise ValueError(f"the answer {self.answer!r} is none of the choices")
