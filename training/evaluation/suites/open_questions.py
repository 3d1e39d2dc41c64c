"""The suite `open`: hand-written questions without choices about scenes of held-out voices.

`open_questions.json` names each scene by its seed and gives accepted answers. A reply is right if it contains the words
of an accepted answer in order.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from hyper_model.errors import HyperError
from training.data.clips import SEED_STRIDE
from training.data.scenes import SceneBuilder
from training.data.truth import Truth
from training.evaluation.suites.item import Item, Suite, SuiteRequest

_FILE = Path(__file__).with_name("open_questions.json")
FIRST_SEED = SEED_STRIDE["test"] + 9_500_000


def open_items(request: SuiteRequest) -> list[Item]:
    """Read the questions and draw their scenes.

    Raises:
        HyperError: A scene has another transcript than the file, so the voices of the bank are others.
    """
    builder = SceneBuilder(request.open_bank("test"), request.sounds_folder, "test", num_speakers=(1, 2, 3))
    items: list[Item] = []
    rows: list[dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))["scenes"]
    for row in islice(rows, request.num_items):
        scene, samples_S = builder.draw(FIRST_SEED + row["scene"])
        if scene.transcript != row["transcript"]:
            raise HyperError(
                f"scene {row['scene']} of the suite open has transcript {scene.transcript!r}; its questions are about "
                f"{row['transcript']!r}. Other voices give other scenes: build the bank with the pinned packages"
            )
        for number, (question, accepted) in enumerate(row["questions"]):
            item = Item(
                id=f"main/{row['scene']}/{number}",
                part="main",
                truth=Truth(
                    question,
                    accepted[0],
                    accepted=tuple(accepted),
                    environment=scene.environment,
                    num_speakers=len(scene.speakers),
                    transcript=scene.transcript,
                ),
                clip=samples_S,
                voice=scene.speakers[0].voice if scene.speakers else "nobody",
                background=scene.recording or scene.environment,
                groups={"class": scene.environment, "people": str(len(scene.speakers))},
                is_recorded=scene.recording is not None,
                num_turns=len(scene.turns),
            )
            items.append(item)
    return items


SUITE = Suite("hand-written questions without choices about held-out scenes", open_items, "test")
