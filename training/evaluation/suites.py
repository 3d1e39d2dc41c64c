"""Gathers what an evaluation asks: scenes of held-out voices and recordings, recorded human clips, people's data sets.

An item is one question about one clip with all that is known to be true; whoever answers sees only question, choices
and sound. A suite's items come in parts, each of which some figures are about: `main`; `one_voice`, in which one voice
speaks four turns; `speech_free`; `snr_20` to `snr_0`, the same scenes at five levels of their background; `swapped`,
questions of `main` asked of other items' clips, which a model that listens answers by chance.

Every draw has a fixed seed. Knows nothing of models or of figures.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hyper_model.audio import WINDOW_S, Waveform, decode, require_single_window
from hyper_model.errors import HyperError
from training.data.clips import SEED_STRIDE
from training.data.examples import Example, ExampleError, Format, read_examples
from training.data.hard_sets import ASKED_KIND, HARD_SETS, SNR_LEVELS_DB, builder_for
from training.data.questions import KINDS, SceneExample, draw_example, possible_kinds, truth_of
from training.data.scenes import SceneBuilder
from training.data.sources.voices import Bank, Split
from training.data.truth import Truth

MAX_SWAPPED = 500
"""Questions that are asked again of another clip."""

DATA_SUITES: tuple[Format, ...] = ("paqa", "mmau", "mmar")
"""Suites that read a data set's own file."""

HUMAN_FOLDER = Path("/usr/share/pocketsphinx/test/data")
"""Where Debian's `pocketsphinx-testdata` puts its clips; they are for testing and never trained on."""

_HUMAN_LISTS = ("librivox/transcription", "cards/cards.transcription")
_HUMAN_LINE = re.compile(r"<s>\s*(.*?)\s*</s>\s*\((\S+)\)")


@dataclass(frozen=True, eq=False)
class Item:
    """One question about one clip, and the truth.

    Attributes:
        id: The same in every run that asks this of this clip.
        clip: The sound, float32 [S], or the file that holds it.
        voice, background: What the item shares with others of its cluster: the first speaker's voice, and the original
            recording of the background; the clip for both where nothing is known of them.
        groups: What figures are broken down by, such as {"kind": "count", "class": "water", "people": "2"}.
        is_recorded: Whether the background is a recording.
        num_turns: None where that is not known.
    """

    id: str
    part: str
    truth: Truth
    clip: np.ndarray | Path
    voice: str
    background: str
    groups: Mapping[str, str] = field(default_factory=dict[str, str])
    is_recorded: bool = False
    num_turns: int | None = None

    def load(self, *, cuts_long: bool = False) -> np.ndarray:
        """Returns the samples, float32 [S] at 16 kHz.

        Args:
            cuts_long: Take the beginning of a clip that is longer than one window; else such a clip is refused.

        Raises:
            HyperError: The file cannot be read or decoded, or the clip is too long.
        """
        if isinstance(self.clip, np.ndarray):
            return self.clip
        try:
            data = self.clip.read_bytes()
        except OSError as error:
            raise HyperError(f"{self.clip}: {error.strerror or error}") from error
        waveform = decode(data)
        if cuts_long:
            return waveform.slice(0, min(waveform.duration_s, WINDOW_S)).samples_S
        require_single_window(waveform)
        return waveform.samples_S

    def digest(self) -> str:
        """Returns what tells whether two runs asked the same: a sum of question, choices, answer and sound.

        Of a file it takes the name: the data set's own id and name stand for its sound.
        """
        truth = self.truth
        sound = Waveform(self.clip).sha256 if isinstance(self.clip, np.ndarray) else self.clip.name
        return hashlib.sha256(repr((truth.question, truth.choices, truth.answer, sound)).encode()).hexdigest()[:16]


def is_scene_suite(name: str) -> bool:
    """Tells whether a suite is drawn from voices and recordings."""
    return name in ("held-out", "validation", *HARD_SETS)


def split_of(suite: str) -> Split:
    """Returns whose voices a suite of scenes hears: only `validation` may be used to choose anything."""
    return "validation" if suite == "validation" else "test"


def scene_items(suite: str, bank: Bank, sounds_folder: Path, *, num_items: int) -> list[Item]:
    """Draws a suite of scenes.

    `held-out` and `validation` have every part; hard sets (`hard_sets.HARD_SETS`) are `main` alone.
    """
    split = split_of(suite)
    first_seed = SEED_STRIDE[split]

    def draw(part: str, num: int, offset: int, **fields: Any) -> list[Item]:
        builder = SceneBuilder(bank, sounds_folder, split, **fields)
        return draw_items(builder, num_items=num, first_seed=first_seed + offset, part=part)

    if suite in HARD_SETS:
        builder = builder_for(suite, bank, sounds_folder, split)
        return draw_items(builder, num_items=num_items, first_seed=first_seed, kind=ASKED_KIND.get(suite))
    num_more = max(20, num_items // 10)
    main = draw("main", num_items, 0)
    items = main + draw("one_voice", num_more, 5_000_000, one_voice_turns=4)
    items += draw("speech_free", num_more, 6_000_000, num_speakers=0)
    for level_db in SNR_LEVELS_DB:
        # The same seeds at each level, so the same scenes.
        builder = builder_for(f"snr-{level_db}", bank, sounds_folder, split)
        items += draw_items(builder, num_items=num_more, first_seed=first_seed + 7_000_000, part=f"snr_{level_db}")
    return items + swapped([item for item in main if item.truth.choices][:MAX_SWAPPED])


def draw_items(
    builder: SceneBuilder, *, num_items: int, first_seed: int, part: str = "main", kind: str | None = None
) -> list[Item]:
    """Draws items from consecutive seeds, each asking the least asked kind that its scene can answer.

    Args:
        kind: Asks this kind alone, of the scenes that can answer it.
    """
    asked: dict[str, int] = dict.fromkeys(KINDS, 0)
    items: list[Item] = []
    seed = first_seed
    while len(items) < num_items:
        scene, samples_S = builder.draw(seed)
        kinds = possible_kinds(scene) if kind is None else [each for each in possible_kinds(scene) if each == kind]
        if kinds:
            chosen = min(kinds, key=lambda k: asked[k])
            asked[chosen] += 1
            example = draw_example(scene, random.Random(seed), kind=chosen)
            items.append(item_of(example, samples_S, part=part))
        seed += 1
    return items


def item_of(example: SceneExample, samples_S: np.ndarray, *, part: str = "main") -> Item:
    """Returns the item of a scene's example: its truth is known whole, since the scene was made."""
    scene = example.scene
    return Item(
        id=f"{part}/{scene.seed}",
        part=part,
        truth=truth_of(example),
        clip=samples_S,
        voice=scene.speakers[0].voice if scene.speakers else "nobody",
        background=scene.recording or scene.environment,
        groups={"kind": example.kind, "class": scene.environment, "people": str(len(scene.speakers))},
        is_recorded=scene.recording is not None,
        num_turns=len(scene.turns),
    )


def swapped(items: Sequence[Item]) -> list[Item]:
    """Asks each question of the clip of the item half the list away: never its own."""
    shift = max(1, len(items) // 2)
    return [
        replace(
            item,
            id=f"swapped/{item.id.rpartition('/')[2]}",
            part="swapped",
            # Nothing is true of the other clip but by chance.
            truth=replace(item.truth, environment=None, num_speakers=None, transcript=None),
            clip=items[(place + shift) % len(items)].clip,
        )
        for place, item in enumerate(items)
    ]


def data_items(
    path: Path, *, format: Format | None = None, audio_root: Path | None = None, num_items: int | None = None
) -> tuple[list[Item], list[ExampleError]]:
    """Reads a data set in any of the formats of `hyper data check`.

    Args:
        num_items: Take the first so many; None takes all.

    Returns:
        The items, and what is wrong with the rows that cannot be asked, which are left out.

    Raises:
        ExampleError: The file cannot be read as rows, or no row can be asked.
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


def human_items(folder: Path = HUMAN_FOLDER) -> list[Item]:
    """Returns the ten recorded clips of `pocketsphinx-testdata`, of known words and one speaker each.

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
