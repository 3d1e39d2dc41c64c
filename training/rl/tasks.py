"""Draw the tasks of Stage II from scenes or from a data set: prompts with clips and their truth.

Task number i is the same at every draw. This module depends on no rollout, model or reward value.
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
"""First scene seed of Stage II, beyond the clips of Stage I."""
_SEED_STRIDE, _NUM_SEEDS = 100_000, 40
"""Scenes per seed of a run, and the number of seeds available below those of exported sets."""


@dataclass(frozen=True, eq=False)
class Task:
    """One prompt and the truth to score its completions."""

    prompt: Prompt
    truth: Truth


class Tasks(Protocol):
    """A source of tasks by number."""

    def draw(self, number: int) -> Task:
        """Return a task."""
        ...


class SceneTasks:
    """Tasks from new scenes, mixed on demand.

    Args:
        seed: Runs with seeds 0 to 39 have no scene in common.
    """

    def __init__(self, builder: SceneBuilder, tokenizer: TraceTokenizer, *, seed: int) -> None:
        self.builder, self.tokenizer = builder, tokenizer
        self.first_seed = _FIRST_SEED + seed % _NUM_SEEDS * _SEED_STRIDE

    def draw(self, number: int) -> Task:
        """Mix a scene and draw one question about it."""
        seed = self.first_seed + number
        scene, samples_S = self.builder.draw(seed)
        example = draw_example(scene, random.Random(seed))
        token_ids = build_prompt(self.tokenizer, example.question, example.choices)
        return Task(Prompt(token_ids, samples_S, example.choices), truth_of(example))


class ExampleTasks:
    """Tasks from a data set, in a new order in each epoch; clips are decoded on demand."""

    def __init__(self, examples: Sequence[Example], tokenizer: TraceTokenizer, *, seed: int) -> None:
        if not examples:
            raise MissingDataError("no example to train on")
        self.examples, self.tokenizer = examples, tokenizer
        self.order = Order(len(examples), str(seed))

    def draw(self, number: int) -> Task:
        """Decode the clip of a row.

        Raises:
            HyperError: The clip is unreadable; the message names file and row.
        """
        example = self.examples[self.order[number]]
        token_ids = build_prompt(self.tokenizer, example.question, example.choices)
        return Task(Prompt(token_ids, read_clip(example).samples_S, example.choices), example.truth)
