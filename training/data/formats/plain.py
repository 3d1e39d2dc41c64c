"""A JSON list of our own."""

from __future__ import annotations

from training.data.formats.data_format import DataFormat
from training.data.formats.rows import Row
from training.data.formats.types import Example


def read(row: Row) -> Example:
    """Read our own list, such as `tests/assets/clips/truth.json`; without `answer`, the answer is ""."""
    return read_own(row, "file")


def read_own(row: Row, audio_field: str) -> Example:
    """Return the example of a row with our own fields."""
    choices = row.choices("choices")
    question = row.question("question")
    row.check(question, choices, question_field="question", choices_field="choices")
    return Example(
        id=row.id(),
        audio=row.audio(audio_field, row.text(audio_field)),
        question=question,
        answer="" if row.fields.get("answer") is None else row.answer("answer", choices),
        choices=choices,
        category=row.optional_text("category"),
        source=row.source,
        **row.perception(),
    )


FORMAT = DataFormat("a JSON list of objects with file and question", read, ("file",))
