"""Suites of scenes of held-out voices and recordings. Every draw has a fixed seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from training.data.clips import SEED_STRIDE
from training.data.hard_sets import ASKED_KIND, HARD_SETS, SNR_LEVELS_DB, builder_for
from training.data.questions import KINDS, SceneExample, draw_example, possible_kinds, truth_of
from training.data.scenes import SceneBuilder
from training.data.sources.voices import Bank, Split
from training.evaluation.suites.item import Item, Suite, SuiteRequest

MAX_SWAPPED = 500
"""Maximum number of questions repeated about another clip."""

DEFAULT_ITEMS = 1_400

_SPLITS: Mapping[str, Split] = {"validation": "validation"}
"""Split of the suites without test voices; only `validation` may be used for choosing settings."""

_DESCRIPTIONS: Mapping[str, str] = {
    "held-out": "scenes of voices and recordings never used for training or tuning",
    "validation": "scenes for model selection",
    **{name: "hard scenes" for name in HARD_SETS},
}


def scene_items(suite: str, bank: Bank, sounds_folder: Path, *, num_items: int) -> list[Item]:
    """Draw a suite of scenes.

    `held-out` and `validation` have every part; hard sets (`hard_sets.HARD_SETS`) have only `main`.
    """
    split = _SPLITS.get(suite, "test")
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
        # Each level has the same seeds and so the same scenes.
        builder = builder_for(f"snr-{level_db}", bank, sounds_folder, split)
        items += draw_items(builder, num_items=num_more, first_seed=first_seed + 7_000_000, part=f"snr_{level_db}")
    return items + swapped([item for item in main if item.truth.choices][:MAX_SWAPPED])


def draw_items(
    builder: SceneBuilder, *, num_items: int, first_seed: int, part: str = "main", kind: str | None = None
) -> list[Item]:
    """Draw items from consecutive seeds, each of the rarest possible kind so far.

    Args:
        kind: Draw only this kind, from suitable scenes.
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
    """Return the item of a scene's example, with its complete truth."""
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
    """Combine each question with the clip of the item half the list away, never its own."""
    shift = max(1, len(items) // 2)
    return [
        replace(
            item,
            id=f"swapped/{item.id.rpartition('/')[2]}",
            part="swapped",
            # The truth is about the question's own clip.
            truth=replace(item.truth, environment=None, num_speakers=None, transcript=None),
            clip=items[(place + shift) % len(items)].clip,
        )
        for place, item in enumerate(items)
    ]


def suite_of_scenes(name: str) -> Suite:
    """Return the suite of scenes of this name."""
    split = _SPLITS.get(name, "test")

    def items(request: SuiteRequest) -> list[Item]:
        num_items = request.num_items or DEFAULT_ITEMS
        return scene_items(name, request.open_bank(split), request.sounds_folder, num_items=num_items)

    return Suite(_DESCRIPTIONS[name], items, split=split)


SUITES = {name: suite_of_scenes(name) for name in _DESCRIPTIONS}
