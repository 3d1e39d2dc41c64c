"""Scenes without audio: their truth is a scene's, and their perception sections are not targets."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper_model.trace import Section, render
from hyper_model.trace_parser import TraceFormat, parse_text
from tests.training_data import TinyRun, tiny_run, write_clips
from training.data.questions import SceneExample, possible_kinds
from training.data.sources.sentences import draw_line, line_from_text
from training.data.text_scenes import SceneWriter
from training.policy import IGNORED
from training.recipes import debug
from training.sft.trainer import ENCODER_WIDTH, ClipSequences, read_clips
from training.trainer import TrainingError

OPEN_TEXTS = tuple(f"the {thing} was older than anybody had thought" for thing in "mill bridge garden ship".split())


def draw(count: int, writer: SceneWriter) -> list[SceneExample]:
    return [writer.draw(random.Random(seed)) for seed in range(count)]


@pytest.fixture(scope="module")
def examples() -> list[SceneExample]:
    return draw(400, SceneWriter(OPEN_TEXTS, frozenset()))


def test_every_trace_is_strict_and_true_of_its_scene(examples: list[SceneExample]) -> None:
    for example in examples:
        scene = example.scene
        assert parse_text(render(example.trace)).format is TraceFormat.STRICT
        assert example.trace.transcript == scene.transcript
        assert [speaker.id for speaker in scene.speakers] == [f"S{i + 1}" for i in range(len(scene.speakers))]
        # Every speaker has a turn, and numbers follow the first turns.
        assert [*dict.fromkeys(turn.speaker for turn in scene.turns)] == [speaker.id for speaker in scene.speakers]
        assert example.kind in possible_kinds(scene)
        assert not example.choices or example.choices.count(example.answer) == 1
        assert scene.background_line not in [turn.line.text for turn in scene.turns]


def test_a_background_that_contradicts_answers_the_same_question_otherwise(examples: list[SceneExample]) -> None:
    contradicted = [example for example in examples if example.scene.contradicted]
    assert len(contradicted) > 30
    for example in contradicted:
        scene = example.scene
        assert scene.background_line is not None and scene.contradicted is not None
        said = [q.answer for turn in scene.turns for q in turn.line.questions if q.question == scene.contradicted]
        otherwise = {q.question: q.answer for q in line_from_text(scene.background_line).questions}
        assert len(said) == 1 and otherwise[scene.contradicted] != said[0]
        if example.kind == "free":
            assert example.answer == said[0] and "speaker" in example.question


def test_what_was_learnt_least_is_asked_most(examples: list[SceneExample]) -> None:
    kinds = Counter(example.kind for example in examples)
    assert kinds.most_common(1)[0][0] == "free" and len(kinds) == 10


def test_no_held_out_line_is_ever_read() -> None:
    rng = random.Random(0)
    # Enough to include every sentence without a slot: without the check, most scenes would have one.
    held_out = frozenset(draw_line(rng).text for _ in range(3_000))
    for example in draw(200, SceneWriter(OPEN_TEXTS, held_out)):
        scene = example.scene
        assert held_out.isdisjoint({*(turn.line.text for turn in scene.turns), scene.background_line})


def test_open_lines_are_those_that_it_was_given(examples: list[SceneExample]) -> None:
    opened = {turn.line.text for example in examples for turn in example.scene.turns if turn.line.is_open}
    assert opened == {*OPEN_TEXTS}
    assert not any(turn.line.is_open for e in draw(50, SceneWriter((), frozenset())) for turn in e.scene.turns)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("work"))


@pytest.fixture
def start(work: Path) -> Callable[..., TinyRun]:
    def begin(run_dir: Path) -> TinyRun:
        return tiny_run(dataclasses.replace(debug(), read_size=3), work, run_dir, is_resumed=False)

    return begin


def test_what_the_caption_holds_is_there_and_no_target(start: Callable[..., TinyRun], tmp_path: Path) -> None:
    trainer = start(tmp_path / "run").trainer
    tokenizer = trainer.run_model.tokenizer
    prepared = trainer.make_step(0)
    assert len(prepared) == debug().batch_size + 3
    for encoded, states_AD in prepared[debug().batch_size :]:
        assert states_AD.shape == (1, ENCODER_WIDTH) and not states_AD.any()
        targets = [target for target in encoded.targets if target != IGNORED]
        opening, closing = tokenizer.tag_ids[Section.CAPTION]
        assert opening in targets and closing not in targets and closing in encoded.token_ids
        assert {ids[0] for s, ids in tokenizer.tag_ids.items() if s in (Section.ENV, Section.ASR)}.isdisjoint(targets)
        assert tokenizer.tag_ids[Section.REASONING][0] in targets and targets[-1] == tokenizer.im_end_id
        # The token after the caption is predicted from the caption's last tag.
        assert encoded.targets[encoded.token_ids.index(closing)] == tokenizer.tag_ids[Section.REASONING][0]


def test_a_style_without_a_caption_has_nothing_to_read(
    work: Path, start: Callable[..., TinyRun], tmp_path: Path
) -> None:
    tokenizer = start(tmp_path / "run").trainer.run_model.tokenizer
    recipe = dataclasses.replace(debug(), read_size=1, trace_style="short")
    with pytest.raises(TrainingError, match="short traces have nothing to read"):
        ClipSequences(read_clips(work / "clips/train"), [], tokenizer, recipe, SceneWriter((), frozenset()))
