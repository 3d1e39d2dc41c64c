"""Suites of a data set's file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from hyper_model.errors import HyperError
from training.data.examples import Example, ExampleError, read_examples
from training.data.formats import FORMATS
from training.evaluation.suites.item import Item, Suite, SuiteRequest


def data_items(
    path: Path, *, format: str | None = None, audio_root: Path | None = None, num_items: int | None = None
) -> tuple[list[Item], list[ExampleError]]:
    """Read a data set in any format of `hyper data check`.

    Args:
        num_items: Take only the first items; None takes all.

    Returns:
        The items, and the errors of the left-out rows.

    Raises:
        ExampleError: The file cannot be read as rows, or no row is usable.
    """
    faults: list[ExampleError] = []
    examples = read_examples(path, format=format, audio_root=audio_root, on_fault=faults.append)
    items = list(islice(_items_of(examples, faults.append), num_items))
    if not items:
        raise ExampleError(str(path), "no row can be asked", received=f"{len(faults)} bad rows")
    return items, faults


def _items_of(examples: Iterator[Example], on_fault: Callable[[ExampleError], None]) -> Iterator[Item]:
    seen: dict[str, int] = {}
    for example in examples:
        if example.choices and not example.answer:
            on_fault(ExampleError(example.source, "has choices and does not say which is right", field="answer"))
            continue
        # Some data sets use an id twice.
        seen[example.id] = seen.get(example.id, 0) + 1
        number = f"#{seen[example.id]}" if seen[example.id] > 1 else ""
        groups = {"category": example.category, "difficulty": example.difficulty}
        if example.category and "/" in example.category:
            groups["task"] = example.category.partition("/")[0]
        if example.num_speakers is not None:
            groups["people"] = str(example.num_speakers)
        yield Item(
            id=f"main/{example.id}{number}",
            part="main",
            truth=example.truth,
            clip=example.audio,
            voice=os.fspath(example.audio),
            background=os.fspath(example.audio),
            groups={name: text for name, text in groups.items() if text},
        )


def suite_of_format(format: str | None) -> Suite:
    """Return the suite of a file in one format; None detects the format."""

    def items(request: SuiteRequest) -> list[Item]:
        if request.data is None:
            raise HyperError(f"--suite {format or 'own'} needs a data set: set --data")
        found, faults = data_items(
            request.data, format=format, audio_root=request.audio_root, num_items=request.num_items
        )
        request.on_faults(faults)
        return found

    description = "a data set's file, see --data" if format is None else f"{FORMATS[format].description}, see --data"
    return Suite(description, items, reads_file=True)


SUITES = {name: suite_of_format(name) for name, each in FORMATS.items() if each.has_suite} | {
    "own": suite_of_format(None)
}
"""Suites of the formats with `has_suite`, and `own`, a file of any format."""
