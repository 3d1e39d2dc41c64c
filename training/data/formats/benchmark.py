"""Rows of benchmarks with their choices in a separate field."""

from __future__ import annotations

from training.data.formats.rows import Row
from training.data.formats.types import Example


def read_benchmark(row: Row, audio_field: str, *category_fields: str) -> Example:
    """Return the example of a benchmark's row; its category joins the category fields with "/"."""
    row.present("choices")
    choices = row.choices("choices")
    question = row.question("question")
    row.check(question, choices, question_field="question", choices_field="choices")
    categories = [text for name in category_fields if (text := row.optional_text(name))]
    return Example(
        id=row.id(),
        audio=row.audio(audio_field, row.text(audio_field)),
        question=question,
        answer=row.answer("answer", choices),
        choices=choices,
        category="/".join(categories) or None,
        difficulty=row.optional_text("difficulty"),
        source=row.source,
    )
