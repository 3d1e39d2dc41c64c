"""Measures a checkpoint on scenes of held-out voices and recordings, through vLLM and the service's prompt and parser.

Every figure is over all items it is defined on, with a 95 % bootstrap interval of fixed seed. Items are not
independent: a few voices and recordings make them all, so whole voices or recordings are resampled, not items.
`swapped_clip_accuracy` asks each question of another item's clip: a model that listens falls to chance.
Knows nothing of how scenes sound or of training.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hyper_model.checkpoint import Checkpoint
from hyper_model.pause import GateSettings
from hyper_model.trace import build_prompt
from hyper_model.trace_parser import ParsedTrace, TraceFormat
from training import sounds
from training.clips import SEED_STRIDE
from training.questions import KINDS, SceneExample, chance_accuracy, draw_example, possible_kinds
from training.rewards import Truth, Weights, accuracy, edit_distance, reward, words
from training.rollout import Prompt, VllmBackend
from training.scenes import SceneBuilder
from training.voices import Bank, Split

NUM_BOOTSTRAP = 1_000
MAX_SWAPPED = 500
"""Questions that are asked again of another clip."""


@dataclass(frozen=True, eq=False)
class Item:
    """An example and its clip, float32 [S]."""

    example: SceneExample
    samples_S: np.ndarray  # noqa: N815  # the axis suffix


@dataclass(frozen=True)
class Judged:
    """One item's outcomes; None where a figure does not apply to it."""

    is_right: bool | None
    free_is_right: bool | None
    environment_is_right: bool
    count_is_right: bool | None
    word_errors: int
    num_words: int
    is_strict: bool
    is_silent: bool | None
    """In a clip without speech: whether no word and no speaker was named."""

    is_consistent: bool
    """Whether the conclusion of the trace names what it then answers, and takes no background sound for words."""

    fidelity: float | None
    """How well the quotes of the speakers are backed by the trace's own transcript."""

    reward: float
    """What Stage II would give for it, with the weights that it begins with."""

    num_pauses: int = 0
    is_aborted: bool = False


def draw_items(builder: SceneBuilder, *, num_items: int, first_seed: int) -> list[Item]:
    """Draw items from consecutive seeds, each asking the least asked kind that its scene can answer."""
    asked: dict[str, int] = dict.fromkeys(KINDS, 0)
    items: list[Item] = []
    for seed in range(first_seed, first_seed + num_items):
        scene, samples_S = builder.draw(seed)
        kind = min(possible_kinds(scene), key=lambda k: asked[k])
        asked[kind] += 1
        items.append(Item(draw_example(scene, random.Random(seed), kind=kind), samples_S))
    return items


def truth_of(example: SceneExample) -> Truth:
    """Return what is known about an example: everything, since its scene was made."""
    scene = example.scene
    return Truth(
        example.question,
        example.answer,
        example.choices,
        environment=scene.environment,
        num_speakers=len(scene.speakers),
        transcript=scene.transcript,
    )


def judge(example: SceneExample, parsed: ParsedTrace, choice_scores: Sequence[float]) -> Judged:
    """Compare one completion with the scene's truth."""
    scene, trace, truth = example.scene, parsed.trace, truth_of(example)
    reference, heard = words(scene.transcript), words(trace.transcript or "")
    num_people = len(scene.speakers)
    worth = reward(parsed, truth, Weights())
    return Judged(
        is_right=int(np.argmax(choice_scores)) == example.answer_index if example.choices else None,
        free_is_right=None if example.choices else accuracy(parsed, truth) == 1,
        environment_is_right=(trace.environment or "").strip().lower() == scene.environment,
        count_is_right=len(trace.speakers) == num_people if num_people else None,
        word_errors=edit_distance(reference, heard),
        num_words=len(reference),
        is_strict=parsed.format is TraceFormat.STRICT,
        is_silent=None if num_people else not trace.speakers and not heard,
        is_consistent=worth.alignment * worth.background_gate == 1,
        fidelity=worth.fidelity if num_people else None,
        reward=worth.total,
    )


def _interval(
    values: Sequence[Any], clusters: Sequence[str], statistic: Callable[[Sequence[Any]], float]
) -> list[float]:
    """Bootstrap whole clusters (Field and Welsh 2007): what one voice or recording makes is drawn together."""
    members: defaultdict[str, list[Any]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        members[cluster].append(value)
    groups = list(members.values())
    if not groups:
        return [0.0, 0.0]
    rng = random.Random(0)
    draws = sorted(
        statistic([value for group in rng.choices(groups, k=len(groups)) for value in group])
        for _ in range(NUM_BOOTSTRAP)
    )
    return [round(draws[int(0.025 * NUM_BOOTSTRAP)], 4), round(draws[int(0.975 * NUM_BOOTSTRAP)], 4)]


def _voice(example: SceneExample) -> str:
    return example.scene.speakers[0].voice if example.scene.speakers else "nobody"


def _background(example: SceneExample) -> str:
    return example.scene.recording or example.scene.environment


def count_from_turns_accuracy(examples: Sequence[SceneExample]) -> float:
    """Return what counting turns alone could reach: the best fixed guess of the head count for each number of turns."""
    counts: defaultdict[int, Counter[int]] = defaultdict(Counter)
    for example in examples:
        if example.scene.speakers:
            counts[len(example.scene.turns)][len(example.scene.speakers)] += 1
    total = sum(counter.total() for counter in counts.values())
    return sum(max(counter.values()) for counter in counts.values()) / max(1, total)


def _mean(values: Sequence[Any]) -> float:
    return sum(values) / max(1, len(values))


def _word_error_rate(judged: Sequence[Any]) -> float:
    return sum(j.word_errors for j in judged) / max(1, sum(j.num_words for j in judged))


def make_prompts(backend: VllmBackend, items: Sequence[Item], clips: Sequence[np.ndarray]) -> list[Prompt]:
    """Make the prompt that asks every item of the clip at the same place of `clips`."""
    tokenizer = backend.checkpoint.tokenizer
    return [
        Prompt(build_prompt(tokenizer, i.example.question, i.example.choices), clip, i.example.choices)
        for i, clip in zip(items, clips, strict=True)
    ]


def ask(
    backend: VllmBackend,
    items: Sequence[Item],
    clips: Sequence[np.ndarray],
    *,
    gate: GateSettings | None = None,
    use_tqdm: bool,
) -> list[Judged]:
    """Ask every item of the clip at the same place of `clips`."""
    completions = backend.complete(make_prompts(backend, items, clips), gate=gate, use_tqdm=use_tqdm)
    judged: list[Judged] = []
    for item, completion in zip(items, completions, strict=True):
        parser = backend.parser()
        for token_id in completion.token_ids:
            parser.feed(token_id)
        parser.finish()
        verdict = judge(item.example, parser.result, completion.choice_scores)
        if completion.gate is not None:
            found = completion.gate
            verdict = replace(verdict, num_pauses=found.num_pauses, is_aborted=found.is_aborted)
        judged.append(verdict)
    return judged


def evaluate(
    checkpoint: Checkpoint,
    bank: Bank,
    sounds_folder: Path,
    *,
    split: Split,
    num_items: int,
    max_pauses: int | None = None,
    use_tqdm: bool = True,
) -> dict[str, Any]:
    """Run the whole suite; returns the figures, their intervals, and breakdowns by kind, class and head count.

    Args:
        max_pauses: Lowers the checkpoint's budget of pauses; None leaves it as it is.
    """
    first_seed = SEED_STRIDE[split]
    items = draw_items(SceneBuilder(bank, sounds_folder, split), num_items=num_items, first_seed=first_seed)
    one_voice = draw_items(
        SceneBuilder(bank, sounds_folder, split, one_voice_turns=4),
        num_items=max(20, num_items // 10),
        first_seed=first_seed + 5_000_000,
    )
    backend = VllmBackend(checkpoint)
    gate = backend.gate
    if gate is not None and max_pauses is not None:
        gate = gate.lowered(max_pauses) if max_pauses else None
    judged = ask(backend, items, [item.samples_S for item in items], gate=gate, use_tqdm=use_tqdm)
    shortcut = ask(backend, one_voice, [item.samples_S for item in one_voice], gate=gate, use_tqdm=use_tqdm)
    chosen = [item for item in items if item.example.choices]
    exchanged = chosen[:MAX_SWAPPED]
    swapped = ask(backend, exchanged, _other_clips(exchanged), gate=gate, use_tqdm=use_tqdm)

    def figure(
        pairs: Sequence[tuple[Item, Any]],
        cluster: Callable[[SceneExample], str],
        statistic: Callable[[Sequence[Any]], float] = _mean,
    ) -> tuple[float, list[float]]:
        defined = [(cluster(item.example), value) for item, value in pairs if value is not None]
        values = [value for _, value in defined]
        return round(statistic(values), 4), _interval(values, [name for name, _ in defined], statistic)

    whole = list(zip(items, judged, strict=True))
    recorded = [(i, j.environment_is_right) for i, j in whole if i.example.scene.recording is not None]
    figures = {
        "choice_accuracy": figure([(i, j.is_right) for i, j in whole], _voice),
        "environment_accuracy": figure([(i, j.environment_is_right) for i, j in whole], _background),
        "environment_accuracy_recorded": figure(recorded, _background),
        "speaker_count_accuracy": figure([(i, j.count_is_right) for i, j in whole], _voice),
        "one_voice_counted_as_one": figure(
            [(i, j.count_is_right) for i, j in zip(one_voice, shortcut, strict=True)], _voice
        ),
        "wer": figure([(i, j if j.num_words else None) for i, j in whole], _voice, _word_error_rate),
        "speech_free_is_silent_rate": figure([(i, j.is_silent) for i, j in whole], _background),
        "strict_format_rate": figure([(i, j.is_strict) for i, j in whole], _voice),
        "free_answer_accuracy": figure([(i, j.free_is_right) for i, j in whole], _voice),
        "consistency": figure([(i, j.is_consistent) for i, j in whole], _voice),
        "quote_fidelity": figure([(i, j.fidelity) for i, j in whole], _voice),
        "reward": figure([(i, j.reward) for i, j in whole], _voice),
        "pauses_per_sample": figure([(i, j.num_pauses) for i, j in whole], _voice),
        "aborted_rate": figure([(i, j.is_aborted) for i, j in whole], _voice),
        "swapped_clip_accuracy": figure([(i, j.is_right) for i, j in zip(exchanged, swapped, strict=True)], _voice),
    }
    result: dict[str, Any] = {name: value for name, (value, _) in figures.items()}
    result["interval_95"] = {name: interval for name, (_, interval) in figures.items()}
    result["chance_accuracy"] = round(chance_accuracy([item.example for item in items]), 4)
    result["count_from_turns_accuracy"] = round(count_from_turns_accuracy([item.example for item in items]), 4)
    result["num_items"] = len(items)
    result["num_choice_items"] = len(chosen)
    result["split"] = split
    result["choice_accuracy_by_kind"] = _by(items, judged, lambda e: e.kind, lambda j: j.is_right)
    result["environment_accuracy_by_class"] = _by(
        items, judged, lambda e: e.scene.environment, lambda j: j.environment_is_right
    )
    result["speaker_count_accuracy_by_count"] = _by(
        items, judged, lambda e: str(len(e.scene.speakers)), lambda j: j.count_is_right
    )
    result["num_environment_classes"] = len(sounds.labels()) + 2
    return result


def _other_clips(items: Sequence[Item]) -> list[np.ndarray]:
    """Give each item the clip of the item half the list away: never its own."""
    shift = max(1, len(items) // 2)
    return [items[(i + shift) % len(items)].samples_S for i in range(len(items))]


def _by(
    items: Sequence[Item],
    judged: Sequence[Judged],
    key: Callable[[SceneExample], str],
    outcome: Callable[[Judged], bool | None],
) -> dict[str, float]:
    groups: defaultdict[str, list[bool]] = defaultdict(list)
    for item, verdict in zip(items, judged, strict=True):
        value = outcome(verdict)
        if value is not None:
            groups[key(item.example)].append(value)
    return {name: round(_mean(values), 3) for name, values in sorted(groups.items())}
