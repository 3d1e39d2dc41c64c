"""Unpredictable lines: they are reproducible from the seed, keep to their split and can be spoken."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.training_data import write_wordnet
from training.data.sources.downloads import MissingDataError
from training.data.sources.open_text import Split, split_of
from training.data.sources.unpredictable import draw_unpredictable

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_wordnet(tmp_path_factory.mktemp("texts") / "wordnet")
    (folder / "cntlist.rev").write_text("".join(f"{w}%1:00:00:: 1 9\n" for w in ("river", "lamp", "seldom", "carve")))
    with (folder / "data.noun").open("a") as file:
        file.write("09999999 18 n 02 Ada_Lovelace 0 Lovelace 0 001 @i 09990000 n 0000 | English mathematician\n")
    return folder


@pytest.mark.parametrize("split", SPLITS)
def test_every_line_is_of_its_split_and_holds_words_alone(wordnet: Path, split: Split) -> None:
    rng = random.Random(1)
    lines = [draw_unpredictable(rng, split, wordnet) for _ in range(120)]
    assert all(split_of(line) == split for line in lines)
    assert all(re.fullmatch(r"[A-Za-z']+( [A-Za-z']+)*", line) for line in lines)
    assert len(set(lines)) > 60


def test_the_same_seed_draws_the_same_lines(wordnet: Path) -> None:
    first, second = random.Random(7), random.Random(7)
    drawn = [draw_unpredictable(first, "train", wordnet) for _ in range(60)]
    assert drawn == [draw_unpredictable(second, "train", wordnet) for _ in range(60)]


def test_a_folder_without_wordnet_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=re.escape(str(tmp_path))):
        draw_unpredictable(random.Random(0), "train", tmp_path)
