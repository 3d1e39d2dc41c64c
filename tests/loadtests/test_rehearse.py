"""The rehearsal of 7B: its vocabulary, weights and arithmetic, and a whole one of a tiny model."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click
import pytest
import tiktoken
import torch
from transformers import Qwen2AudioForConditionalGeneration

from hyper_model.adopt import adopt
from hyper_model.trace import Section, build_prompt
from hyper_model.weights import expected_shapes
from loadtests.qwen_shapes import FULL, TINY
from loadtests.random_qwen import QWEN_SPLIT, RandomTensors, build_config, build_tokenizer, main, read_ranks
from loadtests.rehearse import Needs, Rehearsal, memory_of, outcome, run
from tests.paths import CLIPS

TEXTS = ("the theatre, the weather", "\n\n  Who speaks first? It's 12:45.", "naïve café, 日本語 ಕನ್ನಡ 🙂", "")


def small_ranks() -> dict[bytes, int]:
    """Return a vocabulary with merges of several levels."""
    words = [b"th", b"he", b"the", b" the", b"er", b"eat", b"at", b"re", b"ther", b"wea", b"we", b"\n\n"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    # A token needs both of its parts first.
    for word in sorted(words, key=len):
        ranks[word] = len(ranks)
    return ranks


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    file = tmp_path / "small.tiktoken"
    file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in small_ranks().items()))
    return file


def rehearsal(work: Path, vocabulary: Path | None = None, **fields: Any) -> Rehearsal:
    fields = {"layers": 2, "scale": "tiny", "trains": True} | fields
    return Rehearsal(clips=CLIPS, work=work, vocabulary=vocabulary, say=lambda _: None, **fields)


def test_the_tokenizer_splits_texts_as_tiktoken_does(vocabulary: Path) -> None:
    ranks = read_ranks(vocabulary)
    assert ranks == small_ranks()
    tokenizer = build_tokenizer(ranks)
    reference = tiktoken.Encoding("small", pat_str=QWEN_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS:
        assert tokenizer.encode(text).ids == reference.encode(text)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("the").ids == [ranks[b"the"]]
    assert tokenizer.token_to_id("<|endoftext|>") == len(ranks)


@pytest.mark.parametrize(("shapes", "layers", "num"), [(FULL, 32, 8_397_094_912), (FULL, 2, None), (TINY, 3, None)])
def test_the_arithmetic_counts_what_transformers_builds(shapes: Any, layers: int, num: int | None) -> None:
    tokenizer = build_tokenizer(small_ranks())
    config = build_config(shapes, layers, tokenizer)
    built = RandomTensors(config, [0, 1, 2, 3]).num_bytes // 2
    spare = 0 if shapes.vocab_size else 2 * tokenizer.get_vocab_size() * shapes.hidden_size
    assert shapes.num_parameters(layers) + spare == built
    assert num in (None, built)
    wanted = cast("Mapping[str, tuple[int, ...]]", expected_shapes(config.to_dict()))
    assert sum(torch.Size(shape).numel() for shape in wanted.values()) == built


def test_an_adopted_random_model_begins_with_the_planted_tags(tmp_path: Path, vocabulary: Path) -> None:
    main([str(tmp_path / "source"), "--layers=2", "--scale=tiny", f"--vocabulary={vocabulary}"], standalone_mode=False)
    checkpoint = adopt(tmp_path / "source", tmp_path / "adopted").checkpoint
    tokenizer = checkpoint.tokenizer
    assert checkpoint.manifest.trace.answer_style == "letter"
    model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "adopted", dtype=torch.float32).eval()
    ids = build_prompt(tokenizer, "Who speaks?")
    ids.remove(tokenizer.audio_id)
    written: list[int] = []
    with torch.inference_mode():
        for _ in range(3):
            logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1]
            written.append(int(logits.argmax()))
    assert written == [tokenizer.tag_ids[section][0] for section in (Section.THINK, Section.CAPTION, Section.ENV)]


def test_a_rehearsal_that_does_not_fit_is_refused_with_both_numbers(tmp_path: Path) -> None:
    needs = Needs.of(rehearsal(tmp_path, layers=32, scale="full"))
    assert 17 < needs.service_gib < 19 and needs.training_gib < needs.service_gib
    needs.require(20.0, 50.0)
    with pytest.raises(click.ClickException, match=r"needs 17\.\d GiB of memory and 12\.0 GiB are available"):
        needs.require(12.0, 50.0)
    with pytest.raises(click.ClickException, match=r"GiB of disk and 20\.0 GiB are free"):
        needs.require(20.0, 20.0)


def test_memory_counts_this_process() -> None:
    held = torch.ones(2**24)
    assert memory_of(os.getpid()) > held.nbytes
    assert memory_of(2**22 + 1) == 0


def test_choices_without_a_probability_each_are_not_answered() -> None:
    last: dict[str, Any] = {
        "answer": {"text": "one", "choice": "one", "scores": [0.5, 0.5]},
        "termination": "truncated",
        "trace": {"format": "malformed"},
        "pause": {"count": 1},
        "warnings": [],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "pause_tokens": 64},
        "timings_ms": {"first_token": None, "total": 1500.0},
    }
    two, three = {"choices": ["one", "two"]}, {"choices": ["one", "two", "three"]}
    assert outcome(two, ["done"], last)["is_answered"]
    assert not outcome(three, ["done"], last)["is_answered"]
    assert outcome({}, ["done"], last)["total_s"] == 1.5
    assert outcome(two, ["error"], {"error": {"code": "x"}}) == {
        "is_answered": False,
        "error": {"error": {"code": "x"}},
    }


@pytest.mark.timeout(1200)
def test_a_tiny_rehearsal_answers_both_questions_and_takes_both_steps(tmp_path: Path, vocabulary: Path) -> None:
    figures = run(rehearsal(tmp_path, vocabulary))
    log = (tmp_path / "rehearse.log").read_text()
    assert (figures["answered"], figures["questions"]) == (2, 2), log
    for reply in figures["replies"]:
        # The planted tags open a section, and random tokens make the gate pause in it.
        assert (reply["pauses"], reply["pause_tokens"]) == (1, 64), json.dumps(reply)
    assert figures["plan_gib"] > 1 and figures["peak_gib"] > 0.5
    assert figures["sft_loss"] > 0 and figures["grpo_gap"] < 0.1
