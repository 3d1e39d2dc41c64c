"""PAQA: LLaMA-Factory's alpaca columns with `audios`."""

from __future__ import annotations

from training.data.formats.data_format import DataFormat
from training.data.formats.instruction import read_instruction
from training.data.formats.rows import Row
from training.data.formats.types import Example


def read(row: Row) -> Example:
    """Read PAQA: LLaMA-Factory's alpaca columns with `audios`, and the truth fields of `hyper data export`.

    Source: `datasets/multispeaker_choice_part1_sft.jsonl` of github.com/JOY-SWang/HyPeR (at f7c95ac). Choices are
    inside `instruction` as "(a) x (b) y". A RESPONSE may be a sentence with the ending "The answer is B.".
    """
    instruction = "\n".join(filter(None, (row.text("instruction"), row.optional_text("input"))))
    row.present("output")
    return read_instruction(row, "instruction", instruction, "output", row.value("output", str, "text") or "")


FORMAT = DataFormat(
    "PAQA and LLaMA-Factory's alpaca columns", read, ("instruction",), is_in_file_names=True, has_suite=True
)
