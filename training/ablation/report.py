"""Write the comparison of the arms: a page, the same as JSON, and a plot. It measures nothing itself.

Figures and intervals follow `hyper eval`, from each item's outcomes. Seeds are pooled: a figure covers the items of all
seeds of the arm, and the bootstrap draws a voice for all seeds at once. Two arms are compared item by item and seed by
seed. The baseline has no seed and is compared with every seed of another arm.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hyper_model.errors import HyperError
from hyper_model.manifest import MANIFEST_FILE, read_manifest
from training.ablation.arms import ARMS, SETTINGS_FILE, SUITES, Arm, arm_dir
from training.evaluation.report import RESULT_FILE
from training.evaluation.score import ItemScores, item_scores_of
from training.evaluation.statistics import Sums, compare, figure, shares
from training.recipes import TraceStyle

PAGE_FILE, JSON_FILE, PICTURE_FILE = "ablation.md", "ablation.json", "ablation.png"
REFERENCES = ("sft", "grpo-explicit", "hyper")
"""Arms compared with every other arm."""

UNPAUSED = "grpo-explicit"
"""The arm without pauses but otherwise equal to `hyper`."""
PAUSE_GROUPS: Mapping[str, Callable[[ItemScores], bool]] = {
    "no pause": lambda j: not j.is_aborted and not j.num_pauses,
    "paused": lambda j: not j.is_aborted and bool(j.num_pauses),
    "aborted": lambda j: bool(j.is_aborted),
}
"""Completions of an arm with pauses, grouped by the gate's actions."""

Value = Callable[[ItemScores], float | tuple[float, float] | None]


@dataclass(frozen=True)
class Column:
    """One figure of the table: its suites and the value of an item.

    Attributes:
        styles: Styles with a meaningful figure; a missing section gives no figure.
    """

    name: str
    title: str
    suites: tuple[str, ...]
    value: Value
    styles: tuple[TraceStyle, ...] = ("explicit", "short", "direct")


def _word_errors(item_scores: ItemScores) -> tuple[float, float] | None:
    if item_scores.word_errors is None or not item_scores.num_words:
        return None
    return item_scores.word_errors, item_scores.num_words


COLUMNS: tuple[Column, ...] = (
    Column("accuracy_snr_10", "accuracy, 10 dB", ("snr-10",), lambda j: j.is_right),
    Column("accuracy_snr_5", "accuracy, 5 dB", ("snr-5",), lambda j: j.is_right),
    Column("accuracy_hard", "accuracy, hard multi-speaker", ("hard-multi-speaker",), lambda j: j.is_right),
    Column("consistency", "consistency, 10 dB", ("snr-10",), lambda j: j.is_consistent, ("explicit", "short")),
    Column("wer", "word error, 10 dB", ("snr-10",), _word_errors, ("explicit",)),
    Column("pauses", "pauses per sample", SUITES, lambda j: j.num_pauses),
    Column("given_up", "aborted", SUITES, lambda j: j.is_aborted),
    Column("strict", "strict format", SUITES, lambda j: j.is_strict, ("explicit",)),
)
_ALL_ACCURACY = Column("accuracy", "accuracy, all three", SUITES, lambda j: j.is_right)
COMPARED: tuple[Column, ...] = (*COLUMNS[:3], _ALL_ACCURACY, COLUMNS[3])
_DRAWN = ("accuracy_snr_10", "accuracy_snr_5", "accuracy_hard")

PAPER_COLUMNS = ("accuracy_snr_10", "accuracy_snr_5", "accuracy_hard", "consistency")
PAPER: Mapping[str, tuple[str, tuple[float, float, float, float]]] = {
    "sft": ("SFT", (41.5, 31.2, 46.2, 44.0)),
    "grpo-direct": ("GRPO", (48.3, 38.4, 52.7, 50.2)),
    "grpo-explicit": ("GRPO + explicit CoT", (58.7, 47.6, 61.5, 60.8)),
    "hyper": ("HyPeR", (68.1, 57.8, 70.4, 69.5)),
}
"""The paper's rows in percent, by PAPER_COLUMNS: its background-rich, 5 dB and hard multi-speaker sets of PAQA."""

_NO_CONSISTENCY = (
    "Without the reward for consistency the paper's model lost 4.2 points of accuracy and 12.7 of consistency."
)

Rows = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Results of one seed of an arm: suite -> item -> the item's outcomes."""


def write_report(run_dir: Path) -> Path:
    """Write page, JSON and plot of all arms with results; return the page's path.

    Raises:
        HyperError: There are no results, or some are unreadable.
    """
    try:
        settings = json.loads((run_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise HyperError(f"{run_dir} has no ablation ({error.strerror})") from error
    results = {arm.name: seeds for arm in ARMS if (seeds := read_results(run_dir, arm))}
    if not results:
        raise HyperError(f"{run_dir} has no results yet")
    steps = {arm.name: _trained_steps(run_dir, arm, results[arm.name]) for arm in ARMS if arm.name in results}
    summary = summarize(results, settings, steps)
    (run_dir / JSON_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw(summary, run_dir / PICTURE_FILE)
    page = run_dir / PAGE_FILE
    page.write_text(markdown(summary) + f"\n![Accuracy by arm]({PICTURE_FILE})\n", encoding="utf-8")
    return page


def read_results(run_dir: Path, arm: Arm) -> dict[int, Rows]:
    """Read the results of an arm by seed; seeds without any result are left out."""
    seeds: dict[int, Rows] = {}
    for folder in (run_dir / arm.name).glob("seed-*"):
        rows: dict[str, Mapping[str, Mapping[str, Any]]] = {}
        for suite in SUITES:
            file = folder / suite / RESULT_FILE
            if file.exists():
                rows[suite] = json.loads(file.read_text(encoding="utf-8"))["items"]
        if rows:
            seeds[int(folder.name.rpartition("-")[2])] = rows
    return dict(sorted(seeds.items()))


def _trained_steps(run_dir: Path, arm: Arm, seeds: Mapping[int, Rows]) -> list[int]:
    """Read the number of Stage II steps of each seed's checkpoint; early ends give fewer than planned."""
    num_steps: list[int] = []
    for seed in seeds:
        file = arm_dir(run_dir, arm, seed) / "checkpoint" / MANIFEST_FILE
        if file.exists():
            num_steps.append(json.loads(read_manifest(file.read_bytes()).recipe)["trained_steps"])
    return num_steps


def summarize(
    found: Mapping[str, Mapping[int, Rows]], said: Mapping[str, Any], steps: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Return all figures and comparisons as plain data.

    Args:
        found: Results of each arm, by seed.
        said: Common settings of all results.
        steps: Stage II steps of each arm's seeds.
    """
    arms = [_arm_summary(arm, found, steps.get(arm.name, ())) for arm in ARMS if arm.name in found]
    return {"settings": dict(said), "arms": arms}


def _arm_summary(arm: Arm, found: Mapping[str, Mapping[int, Rows]], steps: Sequence[int]) -> dict[str, Any]:
    seeds = found[arm.name]
    figures: dict[str, Any] = {}
    for column in (*COLUMNS, _ALL_ACCURACY):
        sums = _sums(column, list(seeds.values()))
        if arm.style in column.styles and sums.clusters:
            value, interval = figure(sums)
            by_seed = [figure(one)[0] for rows in seeds.values() if (one := _sums(column, [rows])).clusters]
            figures[column.name] = {
                "value": round(value, 4),
                "interval_95": [round(end, 4) for end in interval],
                "by_seed": [round(one, 4) for one in by_seed],
            }
    return {
        "name": arm.name,
        "meaning": arm.meaning,
        "seeds": list(seeds),
        "steps": list(steps),
        "num_items": sum(len(_main(items)) for rows in seeds.values() for items in rows.values()),
        "figures": figures,
        "by_pauses": _by_pauses(arm, found) if arm.max_pauses and UNPAUSED in found else {},
        "less": {
            name: compared
            for name in REFERENCES
            if name != arm.name and name in found and (compared := _compared(arm, name, found))
        },
    }


def _compared(arm: Arm, name: str, found: Mapping[str, Mapping[int, Rows]]) -> dict[str, Any]:
    """Compare an arm with another on their common items, seed by seed."""
    other = next(candidate for candidate in ARMS if candidate.name == name)
    pairs = [
        _shared(rows, against)
        for seed, rows in found[arm.name].items()
        for against_seed, against in found[name].items()
        if seed == against_seed or arm.baseline or other.baseline
    ]
    compared: dict[str, Any] = {}
    for column in COMPARED:
        if not {arm.style, other.style} <= {*column.styles}:
            continue
        ours, theirs = _sums(column, [a for a, _ in pairs]), _sums(column, [b for _, b in pairs])
        if ours.clusters and ours.clusters == theirs.clusters:
            difference = asdict(compare(ours, theirs))
            if len(pairs) > 1 or len(column.suites) > 1:
                # The same question occurs more than once, and McNemar's test would count each occurrence as a separate
                # question.
                difference["p_mcnemar"] = None
            compared[column.name] = {key: value for key, value in difference.items() if value is not None}
    return compared


def _by_pauses(arm: Arm, found: Mapping[str, Mapping[int, Rows]]) -> dict[str, Any]:
    """Compare choices with those of the same arm without pauses, grouped by the gate's action.

    A gate pauses at low confidence, so questions with pauses are harder. The fair comparison is with the same questions
    without pauses, not with other questions.
    """
    groups: dict[str, list[tuple[bool, bool, str]]] = {name: [] for name in PAUSE_GROUPS}
    for seed, rows in found[arm.name].items():
        ours, theirs = _shared(rows, found[UNPAUSED].get(seed, {}))
        for suite, items in ours.items():
            for id, row in items.items():
                item_scores, other = item_scores_of(row), item_scores_of(theirs[suite][id])
                if id.startswith("main/") and item_scores.is_right is not None and other.is_right is not None:
                    (name,) = (name for name, holds in PAUSE_GROUPS.items() if holds(item_scores))
                    groups[name].append((item_scores.is_right, other.is_right, row["voice"]))
    compared: dict[str, Any] = {}
    for name, members in groups.items():
        if members:
            ours, theirs, voices = zip(*members, strict=True)
            difference = compare(shares(ours, voices), shares(theirs, voices))
            compared[name] = {
                "num_items": len(members),
                "value": round(sum(ours) / len(members), 4),
                "other": round(sum(theirs) / len(members), 4),
                "difference": difference.value,
                "interval_95": list(difference.interval),
            }
    return compared


def _shared(rows: Rows, against: Rows) -> tuple[Rows, Rows]:
    """Return the common part of two results: equal question and equal clip."""
    shared = {
        suite: [id for id, row in items.items() if against.get(suite, {}).get(id, {}).get("digest") == row["digest"]]
        for suite, items in rows.items()
    }
    return tuple(
        {s: {id: rows_of_arm[s][id] for id in ids} for s, ids in shared.items() if ids}
        for rows_of_arm in (rows, against)
    )  # pyright: ignore[reportReturnType]


def _main(items: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for id, row in items.items() if id.startswith("main/")]


def _sums(column: Column, seeds: Sequence[Rows]) -> Sums:
    values: list[tuple[float, float]] = []
    clusters: list[str] = []
    for rows in seeds:
        for suite in column.suites:
            for row in _main(rows.get(suite, {})):
                value = column.value(item_scores_of(row))
                if value is not None:
                    values.append(value if isinstance(value, tuple) else (float(value), 1.0))
                    clusters.append(row["voice"])
    return Sums(np.asarray(values, np.float64).reshape(-1, 2), tuple(clusters))


def markdown(summary: Mapping[str, Any]) -> str:
    """Return the page."""
    plan, arms = summary["settings"], summary["arms"]
    lead = (
        f"All arms except the baseline `cascade` start from {plan['base']} (manifest {plan['base_sha256'][:12]}). They "
        f"have {plan['num_sft_steps']} further steps of Stage I on traces of their own form, then {plan['num_steps']} "
        f"of Stage II; `sft` has only Stage I. All answer the same {plan['num_items']} questions about scenes of "
        "held-out voices. "
        "In brackets: 95 %, bootstrap of whole voices; with one seed, the effect of another seed is not included. A "
        "dash: the arm has no such section, or no result yet. Arms with pauses also have their gate's effects: "
        "advantages weighted by confidence in Stage II, and aborted completions, which count as wrong."
    )
    parts = ["# Ablation", lead, _figures_table(arms), _meanings(arms)]
    for name in REFERENCES:
        if any(name in arm["less"] for arm in arms):
            parts += [f"## Difference from `{name}`, item by item", _differences_table(name, arms)]
    if any(arm["less"] for arm in arms):
        parts.append(
            "Difference (95 %); p by bootstrap of voices, and by McNemar's exact test if no question appears twice. "
            "McNemar's test assumes independent items: if they disagree, trust the bootstrap. There are as many tests "
            "as cells."
        )
    if any(arm["by_pauses"] for arm in arms):
        parts += [
            f"## Accuracy by pauses, compared with `{UNPAUSED}` on the same questions",
            _pauses_table(arms),
            _PAUSES_NOTE,
        ]
    parts += ["## Comparison with the paper", _paper_table(arms), _PAPER_NOTE]
    return "\n\n".join(parts) + "\n"


_PAPER_NOTE = (
    "In percent: here, and in the paper (its test set of PAQA: background-rich at 10 dB, 5 dB, hard multi-speaker). "
    "**The tasks are not the same**: the paper's model has seven billion parameters and its questions are about "
    "dialogues, emotion and translation. This table's model has some millions, and its own questions are about "
    f"synthetic scenes. Compare only the order of the rows, not their figures. {_NO_CONSISTENCY}"
)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows))


def _cell(arm: Mapping[str, Any], name: str) -> str:
    entry = arm["figures"].get(name)
    if entry is None:
        return "-"
    low, high = entry["interval_95"]
    return f"{entry['value']:.3f} ({low:.3f} to {high:.3f})"


def _figures_table(arms: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"`{arm['name']}`",
            *(_cell(arm, column.name) for column in COLUMNS),
            "/".join(map(str, dict.fromkeys(arm["steps"]))) or "-",
            str(len(arm["seeds"])),
        ]
        for arm in arms
    ]
    return _table(["arm", *(column.title for column in COLUMNS), "steps", "seeds"], rows)


def _meanings(arms: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"- `{arm['name']}`: {arm['meaning']}" for arm in arms)


def _differences_table(name: str, arms: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [f"`{arm['name']}`", *(_difference(arm["less"][name].get(column.name)) for column in COMPARED)]
        for arm in arms
        if name in arm["less"]
    ]
    return _table(["arm", *(column.title for column in COMPARED)], rows)


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    tests = f"p {found['p_bootstrap']:.3g}" + (f", {found['p_mcnemar']:.3g}" if "p_mcnemar" in found else "")
    return f"{found['value']:+.3f} ({low:+.3f} to {high:+.3f}), {tests}"


def _pauses_table(arms: Sequence[Mapping[str, Any]]) -> str:
    rows: list[list[str]] = []
    for arm in arms:
        if arm["by_pauses"]:
            cells: list[str] = []
            for name in PAUSE_GROUPS:
                group = arm["by_pauses"].get(name)
                if group is None:
                    cells.append("-")
                    continue
                low, high = group["interval_95"]
                cells.append(
                    f"{group['value']:.3f} / {group['other']:.3f} of {group['num_items']}: {group['difference']:+.3f} "
                    f"({low:+.3f} to {high:+.3f})"
                )
            rows.append([f"`{arm['name']}`", *cells])
    return _table(["arm", *PAUSE_GROUPS], rows)


_PAUSES_NOTE = (
    "Accuracy with the gate / without it, and the number of questions of all three sets, in three groups: the gate "
    "opened no pause, one or more pauses, or aborted the completion. A gate opens at low confidence, so the questions "
    "of the second group are harder with or without pauses."
)


def _paper_table(arms: Sequence[Mapping[str, Any]]) -> str:
    titles = {column.name: column.title for column in COLUMNS}
    rows: list[list[str]] = []
    for arm in arms:
        if arm["name"] in PAPER:
            row, published = PAPER[arm["name"]]
            ours = (arm["figures"].get(name) for name in PAPER_COLUMNS)
            cells = [
                f"{'-' if figure is None else format(100 * figure['value'], '.1f')} / {value:.1f}"
                for figure, value in zip(ours, published, strict=True)
            ]
            rows.append([f"`{arm['name']}`", row, *cells])
    return _table(["arm", "the paper's row", *(f"{titles[name]}: here / paper" for name in PAPER_COLUMNS)], rows)


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Plot the accuracies of all arms with intervals as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = summary["arms"]
    titles = {column.name: column.title for column in COLUMNS}
    canvas, axes = pyplot.subplots(figsize=(max(6.4, 1.1 * len(arms)), 4.0), layout="constrained")
    width = 0.8 / len(_DRAWN)
    for place, name in enumerate(_DRAWN):
        known = [(x, found) for x, arm in enumerate(arms) if (found := arm["figures"].get(name))]
        at = [x + (place - (len(_DRAWN) - 1) / 2) * width for x, _ in known]
        values = [found["value"] for _, found in known]
        errors = [
            [max(0.0, sign * (end - found["value"])) for _, found in known for end in [found["interval_95"][side]]]
            for side, sign in ((0, -1), (1, 1))
        ]
        axes.bar(at, values, width, yerr=errors if known else None, capsize=2, label=titles[name])
    axes.set_xticks(range(len(arms)), [arm["name"] for arm in arms], rotation=30, ha="right")
    axes.set_ylim(0, 1)
    canvas.legend(loc="outside upper center", ncols=len(_DRAWN), frameon=False)
    canvas.savefig(path, dpi=150)
    pyplot.close(canvas)
