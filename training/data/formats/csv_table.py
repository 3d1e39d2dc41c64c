"""A CSV table of our own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from training.data.formats.data_format import DataFormat
from training.data.formats.plain import read_own
from training.data.formats.rows import CSV_COLUMNS, Row
from training.data.formats.types import Example


def read(row: Row) -> Example:
    """Read a table of our own: the columns `CSV_COLUMNS`, and optionally those of a plain list.

    An empty cell is an absent field; a clip without speech has `num_speakers` 0.
    """
    cells = cast("Mapping[str, str]", row.fields)
    fields: dict[str, object] = {name: text for name, text in cells.items() if text.strip() or name in CSV_COLUMNS}
    if "choices" in fields:
        fields["choices"] = cells["choices"].split("|")
    if "num_speakers" in fields:
        number = cells["num_speakers"].strip()
        if not re.fullmatch("[0-9]{1,6}", number):
            raise row.error("num_speakers", "is not a whole number from 0", number)
        fields["num_speakers"] = int(number)
    return read_own(replace(row, fields=fields), "audio")


FORMAT = DataFormat("CSV (columns audio, question, answer; optionally choices separated by |)", read, is_table=True)
