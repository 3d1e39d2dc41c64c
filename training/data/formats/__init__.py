"""Data set formats: one module each, named in `FORMATS`.

A new format is one module with a `FORMAT` and one line here; the choices of the command line follow.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.data.formats import avqa, csv_table, mmar, mmau, paqa, plain, sharegpt
from training.data.formats.data_format import DataFormat
from training.data.formats.rows import Row

FORMATS: Mapping[str, DataFormat] = {
    "sharegpt": sharegpt.FORMAT,
    "paqa": paqa.FORMAT,
    "mmau": mmau.FORMAT,
    "avqa": avqa.FORMAT,
    "mmar": mmar.FORMAT,
    "csv": csv_table.FORMAT,
    "plain": plain.FORMAT,
}
"""Every format by its name; if a row has telling fields of two formats, the first format wins."""


def detect_format(row: Row) -> str:
    """Return a row's format by one of its own fields, else by the file's name, else by the audio field.

    Raises:
        ExampleError: The row fits no known format.
    """
    if row.is_csv:
        return next(name for name, each in FORMATS.items() if each.is_table)
    for name, each in FORMATS.items():
        if any(field in row.fields for field in each.telling_fields):
            return name
    stem = row.path.stem.lower()
    for name, each in FORMATS.items():
        if each.is_in_file_names and name in stem:
            return name
    if "question" in row.fields and ("audio_path" in row.fields or "audio" in row.fields):
        return "avqa"
    problem = f"the first row is of no known format; name one of {', '.join(FORMATS)}"
    raise row.error(None, problem, list(row.fields))
