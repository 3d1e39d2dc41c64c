"""An ablation's report of fixed results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_model.errors import HyperError
from training.ablation.arms import ARMS, SETTINGS_FILE, SUITES
from training.ablation.report import PAPER, PAPER_COLUMNS, REFERENCES, write_report

SAID = {"base": "hyper-mini", "base_sha256": "0" * 64, "num_sft_steps": 5, "num_steps": 7, "num_items": 120}
NUM_ITEMS = 40


def write_result(
    run_dir: Path, name: str, is_right: Callable[[int], bool], *, seed: int = 0, suites: tuple[str, ...] = SUITES
) -> None:
    for suite in suites:
        items: dict[str, dict[str, Any]] = {
            f"main/{place}": {
                "digest": f"{suite}-{place}",
                "voice": f"voice-{place % 4}",
                "background": "water",
                "is_right": is_right(place),
                "is_consistent": True,
                "is_strict": True,
                "num_pauses": place % 2,
                "word_errors": 1,
                "num_words": 10,
            }
            for place in range(NUM_ITEMS)
        }
        # Parts beside `main` are not items of the table.
        items["swapped/0"] = dict(items["main/0"], is_right=False)
        file = run_dir / name / f"seed-{seed}" / suite / "result.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"items": items}))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / SETTINGS_FILE).write_text(json.dumps(SAID))
    return tmp_path


def report(run_dir: Path) -> tuple[str, dict[str, Any]]:
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert (run_dir / "ablation.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run_dir / "ablation.json").read_text(encoding="utf-8"))
    return page, {arm["name"]: arm for arm in summary["arms"]}


def test_arms_stand_beside_each_other_with_intervals_and_paired_tests(run_dir: Path) -> None:
    write_result(run_dir, "sft", lambda place: place % 2 == 0)
    write_result(run_dir, "grpo-explicit", lambda place: place % 4 != 3)
    write_result(run_dir, "hyper", lambda place: place != 3)
    page, arms = report(run_dir)
    assert list(arms) == ["sft", "grpo-explicit", "hyper"]
    figures = arms["grpo-explicit"]["figures"]
    assert figures["accuracy_snr_10"]["value"] == 0.75 and figures["wer"]["value"] == 0.1
    low, high = figures["accuracy_snr_10"]["interval_95"]
    assert low < 0.75 < high
    less = arms["hyper"]["less"]["grpo-explicit"]["accuracy_hard"]
    assert less["value"] == pytest.approx(0.225) and (less["only_first"], less["only_other"]) == (9, 0)
    assert less["p_mcnemar"] == pytest.approx(2 / 2**9) and less["num_items"] == NUM_ITEMS
    pooled = arms["hyper"]["less"]["sft"]["accuracy"]
    # The suites share scenes, so their items are not all independent.
    assert pooled["num_items"] == 3 * NUM_ITEMS and "p_mcnemar" not in pooled
    for name in REFERENCES:
        assert f"## Difference from `{name}`, item by item" in page
    assert "| `hyper` | HyPeR | 97.5 / 68.1 |" in page and "The tasks are not the same" in page
    assert "0.750 (" in page


def test_no_figure_is_made_of_a_section_that_a_style_has_not(run_dir: Path) -> None:
    write_result(run_dir, "grpo-direct", lambda place: True)
    write_result(run_dir, "grpo-short", lambda place: True)
    write_result(run_dir, "hyper", lambda place: True)
    _, arms = report(run_dir)
    assert {"wer", "strict", "consistency"}.isdisjoint(arms["grpo-direct"]["figures"])
    assert {"wer", "strict"}.isdisjoint(arms["grpo-short"]["figures"])
    assert "consistency" in arms["grpo-short"]["less"]["hyper"]
    assert "consistency" not in arms["grpo-direct"]["less"]["hyper"]


def test_the_rival_stands_beside_the_arms_with_what_it_hears(run_dir: Path) -> None:
    write_result(run_dir, "sft", lambda place: False)
    write_result(run_dir, "cascade", lambda place: True)
    for file in run_dir.glob("cascade/seed-0/*/result.json"):
        result = json.loads(file.read_text())
        # As scored by `hyper eval` for a model without traces.
        result["items"] = {id: row | {"is_strict": None, "is_consistent": None} for id, row in result["items"].items()}
        file.write_text(json.dumps(result))
    page, arms = report(run_dir)
    assert list(arms) == ["cascade", "sft"]
    assert arms["cascade"]["figures"].keys().isdisjoint({"strict", "consistency"})
    assert arms["cascade"]["figures"]["wer"]["value"] == 0.1
    assert arms["cascade"]["less"]["sft"]["accuracy_snr_5"]["num_items"] == NUM_ITEMS
    assert "| `cascade` | 1.000 (1.000 to 1.000) |" in page


def test_seeds_are_put_together_and_paired_with_their_own(run_dir: Path) -> None:
    for seed in (0, 1):
        write_result(run_dir, "hyper", lambda place: True, seed=seed)
        write_result(run_dir, "hyper-1", lambda place, seed=seed: place % 2 == seed, seed=seed)
    write_result(run_dir, "cascade", lambda place: False)
    _, arms = report(run_dir)
    assert arms["hyper-1"]["seeds"] == [0, 1] and arms["hyper-1"]["figures"]["accuracy_snr_5"]["by_seed"] == [0.5, 0.5]
    assert arms["hyper-1"]["less"]["hyper"]["accuracy_snr_5"]["num_items"] == 2 * NUM_ITEMS
    # The baseline has no seed, so it is compared with both.
    assert arms["cascade"]["less"]["hyper"]["accuracy_snr_5"]["num_items"] == 2 * NUM_ITEMS


def test_pauses_are_held_against_the_same_questions_without(run_dir: Path) -> None:
    write_result(run_dir, "grpo-explicit", lambda place: place % 4 != 1)
    # Every other completion pauses, and one of ten is aborted.
    write_result(run_dir, "hyper", lambda place: place % 10 != 9 and place % 4 != 3)
    for file in run_dir.glob("hyper/seed-0/*/result.json"):
        result = json.loads(file.read_text())
        for place in range(NUM_ITEMS):
            result["items"][f"main/{place}"]["is_aborted"] = place % 10 == 9
        file.write_text(json.dumps(result))
    page, arms = report(run_dir)
    found = arms["hyper"]["by_pauses"]
    assert {name: each["num_items"] for name, each in found.items()} == {"no pause": 60, "paused": 48, "aborted": 12}
    assert (found["no pause"]["value"], found["no pause"]["other"], found["no pause"]["difference"]) == (1.0, 1.0, 0.0)
    assert found["paused"]["value"] == found["paused"]["other"] == 0.5
    assert found["aborted"]["value"] == 0.0 and found["aborted"]["other"] == 0.5
    assert arms["hyper"]["figures"]["given_up"]["value"] == 0.1 and not arms["grpo-explicit"]["by_pauses"]
    assert "0.000 / 0.500 of 12: -0.500 (" in page and "mcnemar" not in json.dumps(found)


def test_a_question_that_stands_there_twice_is_no_further_evidence(run_dir: Path) -> None:
    for seed in (0, 1):
        write_result(run_dir, "sft", lambda place: place % 2 == 0, seed=seed)
        write_result(run_dir, "hyper", lambda place: True, seed=seed)
    less = report(run_dir)[1]["hyper"]["less"]["sft"]
    assert "p_bootstrap" in less["accuracy_hard"] and "p_mcnemar" not in less["accuracy_hard"]


def test_what_is_there_is_reported_while_the_rest_is_missing(run_dir: Path) -> None:
    with pytest.raises(HyperError, match="no results yet"):
        write_report(run_dir)
    write_result(run_dir, "hyper-6", lambda place: True, suites=("snr-10",))
    page, arms = report(run_dir)
    assert list(arms) == ["hyper-6"] and arms["hyper-6"]["steps"] == [] and arms["hyper-6"]["less"] == {}
    assert "| `hyper-6` | 1.000 (1.000 to 1.000) | - | - |" in page
    with pytest.raises(HyperError, match="no ablation"):
        write_report(run_dir / "nowhere")


def test_only_items_that_were_asked_alike_are_compared(run_dir: Path) -> None:
    write_result(run_dir, "sft", lambda place: True, suites=("snr-10",))
    write_result(run_dir, "hyper", lambda place: True, suites=("snr-10",))
    file = run_dir / "sft/seed-0/snr-10/result.json"
    result = json.loads(file.read_text())
    result["items"]["main/0"]["digest"] = "other"
    file.write_text(json.dumps(result))
    _, arms = report(run_dir)
    assert arms["hyper"]["less"]["sft"]["accuracy_snr_10"]["num_items"] == NUM_ITEMS - 1


def test_the_papers_rows_are_of_arms_that_there_are() -> None:
    assert {*PAPER, *REFERENCES} <= {arm.name for arm in ARMS}
    assert all(len(row) == len(PAPER_COLUMNS) for _, row in PAPER.values())
