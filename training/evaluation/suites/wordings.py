"""Suites on the wording of questions: `wordings` and `agreement`, over scenes of held-out voices and recordings.

`wordings` asks in words, and offers choices in forms, that are excluded from training (`training/data/reading.py`). Its
part `trained` asks the same kinds about the same scenes in trained words. `agreement` asks five questions about each
clip; its figure compares the five transcripts.
"""

from __future__ import annotations

import random
from dataclasses import replace

from training.data.clips import SEED_STRIDE
from training.data.reading import ask, askable, is_held_out, wordings
from training.data.scenes import SceneBuilder
from training.evaluation.suites.item import Item, Suite, SuiteRequest
from training.evaluation.suites.scenes import item_of

_DEFAULT_WORDINGS, _DEFAULT_AGREEMENT = 400, 200
_QUESTIONS_PER_CLIP = 5
_WORDINGS_OFFSET, _AGREEMENT_OFFSET = 8_000_000, 9_000_000
"""First seeds after a split's first; no other suite has these scenes."""
_MAX_DRAWS = 40


def wordings_items(request: SuiteRequest) -> list[Item]:
    """Draw questions with choices in held-out wordings, each with its counterpart in trained wordings."""
    builder = SceneBuilder(request.open_bank("test"), request.sounds_folder, "test")
    held_out, trained = wordings(held_out=True), wordings()
    # Kinds without a held-out wording would ask in a trained one.
    kinds = {kind for kind, texts in held_out.items() if kind != "frames" and is_held_out(texts[0])}
    wanted = request.num_items or _DEFAULT_WORDINGS
    asked: dict[str, int] = dict.fromkeys(sorted(kinds), 0)
    items: list[Item] = []
    counterparts: list[Item] = []
    seed = SEED_STRIDE["test"] + _WORDINGS_OFFSET
    while len(items) < wanted:
        scene, samples_S = builder.draw(seed)
        possible = [kind for kind in askable(scene, held_out) if kind in kinds]
        kind = min(possible, key=lambda each: asked[each])
        pair: list[Item] = []
        for part, found in (("main", held_out), ("trained", trained)):
            for attempt in range(_MAX_DRAWS):
                rng = random.Random(f"{part}/{seed}/{attempt}")
                example = ask(scene, rng, found, kind=kind, held_out=part == "main")
                if example.choices:
                    pair.append(item_of(example, samples_S, part=part))
                    break
        asked[kind] += 1
        if len(pair) == 2:
            items.append(pair[0])
            counterparts.append(pair[1])
        seed += 1
    return items + counterparts


def agreement_items(request: SuiteRequest) -> list[Item]:
    """Draw five questions about each clip, with and without choices."""
    builder = SceneBuilder(request.open_bank("test"), request.sounds_folder, "test", num_speakers=(1, 2, 3))
    found = wordings(held_out=True)
    items: list[Item] = []
    seed = SEED_STRIDE["test"] + _AGREEMENT_OFFSET
    while len(items) < (request.num_items or _DEFAULT_AGREEMENT):
        scene, samples_S = builder.draw(seed)
        for number in range(_QUESTIONS_PER_CLIP):
            example = ask(scene, random.Random(f"agreement/{seed}/{number}"), found, held_out=True)
            item = item_of(example, samples_S)
            groups = {**item.groups, "clip": str(seed)}
            items.append(replace(item, id=f"{item.id}/{number}", groups=groups))
        seed += 1
    return items


SUITES = {
    "wordings": Suite("questions in wordings and forms of choices excluded from training", wordings_items, "test"),
    "agreement": Suite("five questions about each clip; compares the transcripts", agreement_items, "test"),
}
