"""The row type of every data set format, and its error."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyper_model.errors import HyperError
from training.data.truth import Truth


@dataclass(frozen=True)
class Example:
    """One row of a data set: a clip, a question about it, and the truth.

    Attributes:
        id: The data set's own; else the file's stem and the row's number.
        audio: Path of the clip; reading a data set does not open it.
        answer: With choices, exactly one of them; "" if a plain list has no answer.
        completion: The gold trace in the data set's spelling, or None.
        category: Key of the accuracy tables, such as "speech/Semantic Layer".
        difficulty: The data set's grade, such as "easy", or None.
        environment, transcript, num_speakers: None if unknown to the data set; an empty transcript means no speech.
        source: File and line, or file and item, for messages.
    """

    id: str
    audio: Path
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    completion: str | None = None
    category: str | None = None
    difficulty: str | None = None
    environment: str | None = None
    transcript: str | None = None
    num_speakers: int | None = None
    source: str = ""

    @property
    def truth(self) -> Truth:
        """Return the truth for scoring completions."""
        return Truth(
            self.question,
            self.answer,
            self.choices,
            environment=self.environment,
            num_speakers=self.num_speakers,
            transcript=self.transcript,
        )


class ExampleError(HyperError):
    """A row of a data set, or the whole file, is unusable.

    Attributes:
        source: File and line, or file and item.
        field: The field at fault; None for a whole row or file.
    """

    def __init__(self, source: str, problem: str, *, field: str | None = None, received: str | None = None) -> None:
        place = source if field is None else f"{source}, field {field!r}"
        super().__init__(f"{place}: {problem}" + ("" if received is None else f", received {received}"))
        self.source = source
        self.field = field
