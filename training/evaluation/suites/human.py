"""The suite of recorded human clips of Debian's `pocketsphinx-testdata`."""

from __future__ import annotations

import re
from pathlib import Path

from hyper_model.errors import HyperError
from training.data.truth import Truth
from training.evaluation.suites.item import Item, Suite

HUMAN_FOLDER = Path("/usr/share/pocketsphinx/test/data")
"""Folder of the clips of Debian's `pocketsphinx-testdata`; they are for testing only, never for training."""

_HUMAN_LISTS = ("librivox/transcription", "cards/cards.transcription")
_HUMAN_LINE = re.compile(r"<s>\s*(.*?)\s*</s>\s*\((\S+)\)")


def human_items(folder: Path = HUMAN_FOLDER) -> list[Item]:
    """Return the ten recorded clips of `pocketsphinx-testdata`, with known words and one speaker each.

    Five are read from a novel (LibriVox), five are names of playing cards. Their background is not annotated.

    Raises:
        HyperError: The package is not installed.
    """
    items: list[Item] = []
    for name in _HUMAN_LISTS:
        path = folder / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise HyperError(f"{path}: {error.strerror}: apt-get install pocketsphinx-testdata") from error
        for transcript, stem in (match.groups() for line in lines if (match := _HUMAN_LINE.fullmatch(line.strip()))):
            choices = ("one", "two", "three")
            items.append(
                Item(
                    id=f"main/{stem}",
                    part="main",
                    truth=Truth("How many people speak?", "one", choices, num_speakers=1, transcript=transcript),
                    clip=path.parent / f"{stem}.wav",
                    voice=stem,
                    background=stem,
                    groups={"kind": "count", "source": path.parent.name, "people": "1"},
                )
            )
    return items


SUITE = Suite(
    "ten recorded clips (needs apt-get install pocketsphinx-testdata)",
    lambda request: human_items()[: request.num_items],
)
