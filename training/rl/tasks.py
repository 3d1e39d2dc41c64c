"""What Stage II asks: prompts with clips and what is known about them, drawn from scenes or from a data set.

Task number i is the same whenever it is drawn. Knows nothing of rollouts, models or rewards' values.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from hyper_model.trace import TraceTokenizer, build_prompt
from training.data.examples import Example, Order, read_clip
from training.data.questions import draw_example, truth_of
from training.data.scenes import SceneBuilder
from training.data.sources.downloads import MissingDataError
from training.data.truth import Truth
from training.rl.rollout import Prompt

_FIRST_SEED = 5_000_000
"""First seed of Stage II's scenes, beyond those of the clips of Stage I."""
_SEED_STRIDE, _NUM_SEEDS = 100_000, 40
"""Scenes of one run's seed, and how many seeds there is room for before those of exported sets."""


@dataclass(frozen=True, eq=False)
class Task:
    """One prompt and what its completions are scored by."""

    prompt: Prompt
    truth: Truth


class Tasks(Protocol):
    """Draws tasks by number."""

    def draw(self, number: int) -> Task:
        """Returns a task."""
        ...


class SceneTasks:
    """Draws scenes that nobody has asked about before, mixed when they are needed.

    Args:
        seed: Other scenes for each; runs of seeds 0 to 39 have none in common.
    """

    def __init__(self, builder: SceneBuilder, tokenizer: TraceTokenizer, *, seed: int) -> None:
        self.builder, self.tokenizer = builder, tokenizer
        self.first_seed = _FIRST_SEED + seed % _NUM_SEEDS * _SEED_STRIDE

    def draw(self, number: int) -> Task:
        """Mixes a scene and asks one question about it."""
        seed = self.first_seed + number
        scene, samples_S = self.builder.draw(seed)
        example = draw_example(scene, random.Random(seed))
        token_ids = build_prompt(self.tokenizer, example.question, example.choices)
        return Task(Prompt(token_ids, samples_S, example.choices), truth_of(example))


class ExampleTasks:
    """Draws from a data set, in another order each time round; clips are decoded when they are needed."""

    def __init__(self, examples: Sequence[Example], tokenizer: TraceTokenizer, *, seed: int) -> None:
        if not examples:
            raise MissingDataError("no example to train on")
        self.examples, self.tokenizer = examples, tokenizer
        self.order = Order(len(examples), str(seed))

    def draw(self, number: int) -> Task:
        """Decodes a row's clip.

        Raises:
            HyperError: It cannot be read; the message names file and row.
        """
        example = self.examples[self.order[number]]
        token_ids = build_prompt(self.tokenizer, example.question, example.choices)
        return Task(Prompt(token_ids, read_clip(example).samples_S, example.choices), example.truth)
