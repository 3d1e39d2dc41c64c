"""The description of a data set format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.data.formats.rows import Row
from training.data.formats.types import Example


@dataclass(frozen=True)
class DataFormat:
    """A data set format: its reader, and the signs of its files.

    Attributes:
        description: For `--help`: the format in a few words.
        read: Turn a row into an example.
        telling_fields: Fields of this format alone.
        is_in_file_names: True if files are named after the format.
        is_table: True if rows are lines of CSV instead of JSON objects.
        has_suite: True if `hyper eval --suite` has the format's name.
    """

    description: str
    read: Callable[[Row], Example]
    telling_fields: tuple[str, ...] = ()
    is_in_file_names: bool = False
    is_table: bool = False
    has_suite: bool = False
