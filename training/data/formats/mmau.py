"""MMAU, the test of Sakshi et al. 2024."""

from __future__ import annotations

from training.data.formats.benchmark import read_benchmark
from training.data.formats.data_format import DataFormat
from training.data.formats.rows import Row
from training.data.formats.types import Example


def read(row: Row) -> Example:
    """Read MMAU, with the category "task/sub-category".

    Source: `mmau-test-mini.json` of github.com/Sakshi113/MMAU. The 9,000 questions of its test split have no published
    answers and are refused.
    """
    return read_benchmark(row, "audio_id", "task", "sub-category")


FORMAT = DataFormat("MMAU", read, ("audio_id",), is_in_file_names=True, has_suite=True)
