"""The suite of silence and joins: the same words in every part, and figures for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.trace_parser import parse_text
from tests.training_data import write_bank
from training.data.sources.voices import Bank
from training.evaluation.score import Reply, judge, summarize
from training.evaluation.suites.around_speech import PARTS, SHORT_MS, around_speech_items


def test_every_part_has_the_words_of_the_plain_clips(tmp_path: Path) -> None:
    bank = Bank(write_bank(tmp_path / "bank"))
    items = around_speech_items(bank, num_items=4)
    again = around_speech_items(bank, num_items=4)
    assert [item.digest() for item in items] == [item.digest() for item in again]
    by_id = {item.id: item for item in items}
    assert {item.part for item in items} == {"main", *PARTS, *(f"short_{number}" for number in SHORT_MS)}
    for number in range(4):
        plain, behind = by_id[f"main/{number}"], by_id[f"behind_8s/{number}"]
        assert behind.truth.transcript == plain.truth.transcript
        assert np.array_equal(behind.load()[: len(plain.load())], plain.load())
        assert len(behind.load()) - len(plain.load()) == 8 * SAMPLE_RATE_HZ
        short = by_id[f"short_200/{number}"]
        assert len(short.load()) == SAMPLE_RATE_HZ // 5 and short.truth.transcript == ""
    replies = [Reply(parse_text("<THINK><CAPTION><ASR>a word</ASR></CAPTION></THINK>")) for _ in items]
    figures = summarize(items, [judge(item, reply) for item, reply in zip(items, replies, strict=True)])
    assert figures["invented_speech_rate_short_300"] == 1.0
    assert all(f"wer_{part}" in figures and f"wer_{part}" in figures["interval_95"] for part in PARTS)
