"""AVQA in the form of R1-AQA."""

from __future__ import annotations

from pathlib import Path

from training.data.formats.data_format import DataFormat
from training.data.formats.rows import Row
from training.data.formats.types import Example


def read(row: Row) -> Example:
    """Read AVQA in the form of R1-AQA; a number as answer is an index from 0.

    Source: the README and `src/dataset/dataset.py` of github.com/xiaomi-research/r1-aqa. The question stays unchanged,
    whereas R1-AQA replaces "video" by "audio" in its prompt. A lone `video_name` gets the suffix `.wav`.
    """
    choices_field = row.present("multi_choice", "choices")
    choices = row.choices(choices_field)
    question_field = row.present("question_text", "question")
    question = row.question(question_field)
    row.check(question, choices, question_field=question_field, choices_field=choices_field)
    audio_field = row.present("audio_path", "audio", "video_name")
    audio = row.text(audio_field)
    if audio_field == "video_name" and audio and not Path(audio).suffix:
        audio += ".wav"
    return Example(
        id=row.id(),
        audio=row.audio(audio_field, audio),
        question=question,
        answer=row.answer("answer", choices, is_index=True),
        choices=choices,
        category=row.optional_text("question_type"),
        source=row.source,
    )


FORMAT = DataFormat("R1-AQA's AVQA lines", read, ("multi_choice", "question_text", "video_name"), is_in_file_names=True)
