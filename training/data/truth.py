"""What is known about a question and its clip: the gold answer and the facts that rewards and figures judge by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Truth:
    """Says what is known about a question: its gold answer, and of its clip what the data set tells.

    Attributes:
        answer: With choices, exactly one of them.
        environment, num_speakers, transcript: None where the data set does not say; "" is a clip without speech.
    """

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    environment: str | None = None
    num_speakers: int | None = None
    transcript: str | None = None

    def __post_init__(self) -> None:
        if self.choices and self.answer not in self.choices:
            raise ValueError(f"the answer {self.answer!r} is none of the choices")
