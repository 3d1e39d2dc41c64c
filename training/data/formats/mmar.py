"""MMAR, the test of Ma et al. 2025."""

from __future__ import annotations

from training.data.formats.benchmark import read_benchmark
from training.data.formats.data_format import DataFormat
from training.data.formats.rows import Row
from training.data.formats.types import Example


def read(row: Row) -> Example:
    """Read MMAR, with the category "modality/category".

    Source: `MMAR-meta.json` of huggingface.co/datasets/BoJack/MMAR, by the description of other loaders.
    """
    return read_benchmark(row, "audio_path", "modality", "category")


FORMAT = DataFormat("MMAR", read, ("modality",), is_in_file_names=True, has_suite=True)
