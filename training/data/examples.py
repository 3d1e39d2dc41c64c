"""Read data sets of any format in `training.data.formats` into one row type.

Rows come one at a time. A bad row gives an `ExampleError` with its place, and the caller decides about continuing.
Reading opens no audio; `read_clip` decodes the clip of one row.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from hyper_model.audio import Waveform, decode, require_single_window
from hyper_model.errors import HyperError
from training.data.formats import FORMATS, detect_format
from training.data.formats.rows import Row, read_rows, shown
from training.data.formats.types import Example, ExampleError


def read_clip(example: Example) -> Waveform:
    """Decode the clip of a row.

    Raises:
        HyperError: The clip is unreadable or longer than one window; the message names row and file.
    """
    try:
        waveform = decode(example.audio.read_bytes())
        require_single_window(waveform)
    except OSError as error:
        raise HyperError(f"{example.source}: {example.audio}: {error.strerror}") from error
    except HyperError as error:
        raise HyperError(f"{example.source}: {example.audio}: {error}") from error
    return waveform


class Order:
    """A shuffled order of items in each epoch; place p is always the same item."""

    def __init__(self, num_items: int, seed: str) -> None:
        self.num_items, self.seed, self.epoch = num_items, seed, -1
        self.order: list[int] = []

    def __getitem__(self, place: int) -> int:
        epoch, place = divmod(place, self.num_items)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, list(range(self.num_items))
            random.Random(f"{self.seed}/epoch/{epoch}").shuffle(self.order)
        return self.order[place]


@dataclass(frozen=True)
class Summary:
    """Counts of a data set.

    Attributes:
        bad_audio: Missing, empty and unreadable audio files in order of appearance, each once. Each entry has the cause
            and the place of the first row with this file.
        by_category: Rows of each category, in order of appearance, without rows of no category.
        faults: Errors of the unusable rows; these rows are counted nowhere else.
        warnings: Odd properties of decodable clips, such as silence or missing audio.
    """

    format: str
    num_examples: int
    num_with_choices: int
    bad_audio: tuple[str, ...]
    by_category: Mapping[str, int]
    faults: tuple[ExampleError, ...] = ()
    warnings: tuple[str, ...] = ()


def read_examples(
    path: str | Path,
    *,
    format: str | None = None,
    audio_root: str | Path | None = None,
    on_fault: Callable[[ExampleError], None] | None = None,
) -> Iterator[Example]:
    """Yield a data set's rows in order, each checked on the way.

    Args:
        format: A name of `FORMATS`; detected from the file's name and first row if None.
        audio_root: Start of relative audio paths; the file's own folder if None. Absolute paths stay unchanged.
        on_fault: Called with the error of each unusable row; published data sets have some. The row is left out.

    Raises:
        ExampleError: For a file that cannot be read as rows at all; without `on_fault`, at the first bad row.
    """
    found, rows = _open_rows(Path(path), format, audio_root)
    yield from _examples(found, rows, on_fault)


def check_examples(
    path: str | Path, *, format: str | None = None, audio_root: str | Path | None = None, decodes: bool = False
) -> Summary:
    """Read a whole data set and count its rows, its faults and its unusable audio files.

    Args:
        decodes: Also decode every clip, to find damaged and too long ones.

    Raises:
        ExampleError: The file cannot be read as rows.
    """
    found, rows = _open_rows(Path(path), format, audio_root)
    num_examples = num_with_choices = 0
    bad_audio: dict[Path, str | None] = {}
    warnings: list[str] = []
    categories: Counter[str] = Counter()
    faults: list[ExampleError] = []
    for example in _examples(found, rows, faults.append):
        num_examples += 1
        num_with_choices += bool(example.choices)
        if example.audio not in bad_audio:
            problem = audio_problem(example.audio)
            bad_audio[example.audio] = None if problem is None else f"{example.source}: {example.audio} {problem}"
            if problem is None and decodes:
                try:
                    warnings += _warnings_about(example, read_clip(example))
                except HyperError as error:
                    bad_audio[example.audio] = error.message
        if example.category is not None:
            categories[example.category] += 1
    bad = tuple(filter(None, bad_audio.values()))
    return Summary(found, num_examples, num_with_choices, bad, dict(categories), tuple(faults), tuple(warnings))


def _warnings_about(example: Example, waveform: Waveform) -> list[str]:
    texts = [warning.message for warning in waveform.warnings]
    if waveform.quality.silence_ratio == 1.0:
        texts.append("the clip is silent")
    return [f"{example.source}: {example.audio}: {text}" for text in texts]


def audio_problem(path: Path) -> str | None:
    """Return why an audio file cannot be opened as a clip; None if it can. Its content is not decoded."""
    # os.path, not Path.is_file: a name too long for the file system counts as missing.
    if os.path.isdir(path):
        return "is a folder"
    if not os.path.isfile(path):
        return "is missing"
    if not os.path.getsize(path):
        return "is empty"
    return None if os.access(path, os.R_OK) else "cannot be read: permission denied"


def _examples(found: str, rows: Iterable[Row], on_fault: Callable[[ExampleError], None] | None) -> Iterator[Example]:
    read = FORMATS[found].read
    for row in rows:
        try:
            example = read(row)
        except ExampleError as error:
            if on_fault is None:
                raise
            on_fault(error)
            continue
        yield example


def _open_rows(path: Path, format: str | None, audio_root: str | Path | None) -> tuple[str, Iterable[Row]]:
    """Return the format, detected from the first row if None, and all rows."""
    if format is not None and format not in FORMATS:
        raise ExampleError(str(path), f"the format is none of {', '.join(FORMATS)}", received=shown(format))
    is_table = None if format is None else FORMATS[format].is_table
    rows = read_rows(path, None if audio_root is None else Path(audio_root), is_table=is_table)
    first = next(rows, None)
    if first is None:
        raise ExampleError(str(path), "the file holds no rows")
    found = format or detect_format(first)
    return found, chain([first], rows)
