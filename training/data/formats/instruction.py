"""Rows with the choices inside an instruction's text."""

from __future__ import annotations

from pathlib import Path

from training.data.formats.choices import split_question
from training.data.formats.rows import Row
from training.data.formats.types import Example


def read_instruction(
    row: Row, question_field: str, instruction: str, answer_field: str, output: str, audio: Path | None = None
) -> Example:
    """Return the example of an instruction with choices in its text, and of its gold output.

    Args:
        audio: The clip, if the instruction itself has it; otherwise the row's only one.
    """
    question, choices = split_question(row.without_marks(question_field, instruction))
    row.check(question, choices, question_field=question_field, choices_field=question_field)
    answer, completion = row.gold(answer_field, output, choices)
    return Example(
        id=row.id(),
        audio=row.only_audio() if audio is None else audio,
        question=question,
        answer=answer,
        choices=choices,
        completion=completion,
        category=row.optional_text("category"),
        source=row.source,
        **row.perception(),
    )
