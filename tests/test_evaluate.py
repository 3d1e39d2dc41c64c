"""What holds of the figures."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hyper_model.trace import render
from hyper_model.trace_parser import parse_text
from tests.training_data import write_bank, write_sounds
from training.evaluate import _interval, _mean, count_from_turns_accuracy, draw_items, judge
from training.questions import KINDS, draw_example
from training.scenes import SceneBuilder
from training.voices import Bank, trained_lines


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> SceneBuilder:
    folder = tmp_path_factory.mktemp("evaluate")
    return SceneBuilder(Bank(write_bank(folder / "bank")), write_sounds(folder / "sounds"), "test")


def test_the_gold_trace_is_judged_right_in_every_figure(builder: SceneBuilder) -> None:
    for seed in range(60):
        scene, _ = builder.draw(seed)
        example = draw_example(scene, random.Random(seed))
        scores = [0.0 if choice == example.answer else -9.0 for choice in example.choices]
        verdict = judge(example, parse_text(render(example.trace)), scores)
        assert verdict.is_right in (True, None)
        assert verdict.free_is_right in (True, None)
        assert verdict.environment_is_right
        assert verdict.count_is_right in (True, None)
        assert verdict.word_errors == 0
        assert verdict.is_strict
        assert verdict.is_consistent
        assert verdict.fidelity in (1.0, None)


def test_an_empty_completion_is_judged_wrong_and_not_dropped(builder: SceneBuilder) -> None:
    scene, _ = builder.draw(1)
    example = draw_example(scene, random.Random(0), kind="count", with_choices=False)
    verdict = judge(example, parse_text(""), [])
    assert verdict.free_is_right is False
    assert not verdict.environment_is_right
    assert not verdict.is_strict
    assert not verdict.is_consistent and not verdict.fidelity
    assert verdict.word_errors == verdict.num_words


def test_items_ask_every_kind_about_equally_often(builder: SceneBuilder) -> None:
    items = draw_items(builder, num_items=200, first_seed=0)
    counts = {kind: sum(item.example.kind == kind for item in items) for kind in KINDS}
    assert min(counts[kind] for kind in KINDS if kind != "source") >= 10
    assert len({item.example.scene.seed for item in items}) == 200


def test_intervals_draw_whole_clusters() -> None:
    values = [True] * 50 + [False] * 50
    one_each = _interval(values, [str(i) for i in range(100)], _mean)
    two = _interval(values, ["a"] * 50 + ["b"] * 50, _mean)
    assert one_each[0] > 0.3 and one_each[1] < 0.7
    assert two == [0.0, 1.0]


def test_counting_turns_alone_is_measured(builder: SceneBuilder) -> None:
    items = draw_items(builder, num_items=200, first_seed=0)
    assert 0.3 < count_from_turns_accuracy([item.example for item in items]) < 0.8


def test_lines_that_training_speaks_can_be_left_out(tmp_path: Path) -> None:
    folder = write_bank(tmp_path / "bank")
    texts = {u.text for utterances in Bank(folder).utterances.values() for u, _ in utterances}
    kept = frozenset(sorted(texts)[: len(texts) // 2])
    left = Bank(folder, without=kept)
    assert not kept & {u.text for utterances in left.utterances.values() for u, _ in utterances}
    assert trained_lines(seed=0) == trained_lines(seed=0)
