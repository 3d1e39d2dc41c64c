"""Write the report of an evaluation: the result as JSON, a page of tables and plots. It measures nothing itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyper_model.files import write_whole
from training.data.hard_sets import SNR_LEVELS_DB
from training.evaluation.confidence import draw_reliability
from training.evaluation.score import BREAKDOWNS, ECE, FIGURES, MAP

RESULT_FILE = "result.json"
REPORT_FILE = "report.md"
ACCURACY_FILE = "accuracy.png"
SNR_FILE = "snr.png"
RELIABILITY_FILE = "reliability.png"

PLAIN_FIGURES = {
    "chance_accuracy": "accuracy of guessing among the choices",
    "count_from_turns_accuracy": "best possible speaker count from the number of turns alone",
    "ttft_p50_s": "median seconds to the first token",
    "ttft_p95_s": "95th percentile of the seconds to the first token",
    "e2e_p50_s": "median seconds to the whole reply",
    "e2e_p95_s": "95th percentile of the seconds to the whole reply",
}
"""Figures without an interval."""

_SNR_CURVES = (
    ("accuracy_snr", "choice accuracy"),
    ("environment_accuracy_snr", "environment"),
    ("wer_snr", "word error rate"),
)


def write(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `result.json` of the first result, and a page and plots of all results side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RESULT_FILE, json.dumps(results[0], indent=1) + "\n")
    pictures = draw(results, folder)
    links = "".join(f"\n![{name.removesuffix('.png')}]({name})\n" for name in pictures)
    (folder / REPORT_FILE).write_text(markdown(results) + links, encoding="utf-8")


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the page: figures with intervals, one column per system, then breakdowns and paired differences."""
    first = results[0]
    title = f"# {first['system']} on {first['suite']}"
    lead = f"{first['num_items']} items, {first['num_choice_items']} with choices. Intervals: 95 %, bootstrap of whole "
    lead += "voices, recordings or clips."
    parts = [title, lead, _figures_table(results)]
    for name, group, _ in BREAKDOWNS:
        if first.get(name):
            parts.append(_breakdown_table(name, group, results))
    for compared in first.get("compared", ()):
        parts.append(_differences_table(first["system"], compared))
    if first.get("probe"):
        parts.append(_probe_table(first["probe"]))
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _figures_table(results: Sequence[Mapping[str, Any]]) -> str:
    meanings = {figure.name: figure.meaning for figure in FIGURES}
    meanings[MAP] = "mean average precision of the labels that ENV names"
    meanings[ECE] = "expected calibration error of the answers' confidence"
    meanings |= {f"{ECE}_choices": "the same, of questions with choices", f"{ECE}_open": "the same, of open questions"}
    rows: list[list[str]] = []
    for name, meaning in {**meanings, **PLAIN_FIGURES}.items():
        if any(name in result for result in results):
            rows.append([f"`{name}`", *(_cell(result, name) for result in results), meaning])
    return _table(["figure", *(result["system"] for result in results), "meaning"], rows)


def _cell(result: Mapping[str, Any], name: str) -> str:
    if name not in result:
        return "-"
    interval = result["interval_95"].get(name)
    return f"{result[name]:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def _breakdown_table(name: str, group: str, results: Sequence[Mapping[str, Any]]) -> str:
    keys = sorted({key for result in results for key in result.get(name, {})})
    rows = [
        [key, *(f"{value:.3f}" if (value := result.get(name, {}).get(key)) is not None else "-" for result in results)]
        for key in keys
    ]
    return f"## {name}\n\n" + _table([group, *(result["system"] for result in results)], rows)


def _differences_table(system: str, compared: Mapping[str, Any]) -> str:
    rows: list[list[str]] = []
    for name, difference in compared["figures"].items():
        low, high = difference["interval"]
        is_paired = difference.get("p_mcnemar") is not None
        rows.append(
            [
                f"`{name}`",
                f"{difference['value']:+.3f} ({low:+.3f} to {high:+.3f})",
                f"{difference['p_bootstrap']:.3g}",
                f"{difference['only_first']} / {difference['only_other']}" if is_paired else "-",
                f"{difference['p_mcnemar']:.3g}" if is_paired else "-",
                f"{difference['num_items']} in {difference['num_clusters']}",
            ]
        )
    head = ["figure", "difference (95 %)", "p, bootstrap", "only first / only other", "p, McNemar", "items in clusters"]
    note = f"{compared['num_shared']} shared items; {compared['num_left_out']} left out."
    return f"## {system} minus {compared['system']}\n\n{note}\n\n" + _table(head, rows)


def _probe_table(probe: Mapping[str, Any]) -> str:
    names = ("trigger_rate", "cosine_to_answer", "cosine_before", "displacement")

    def cell(row: Mapping[str, Any], name: str) -> str:
        if name not in row:
            return "-"
        low, high = row[f"{name}_interval_95"]
        return f"{row[name]:.3f} ({low:.3f} to {high:.3f})"

    rows = [[str(row["pause"]), str(row["num_spans"]), *(cell(row, name) for name in names)] for row in probe["pauses"]]
    head = ["pause", "spans", *(name.replace("_", " ") for name in names)]
    return f"## Latent probe\n\n{probe['num_completions']} completions.\n\n" + _table(head, rows)


def draw(results: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Plot accuracy by group, curves over SNR for suites with SNR levels, and reliability; return the file names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names: list[str] = []
    broken = next((name for name, _, _ in BREAKDOWNS if results[0].get(name)), None)
    if broken is not None:
        keys = list(results[0][broken])
        figure, axes = pyplot.subplots(figsize=(max(6.4, 0.5 * len(keys)), 3.6), layout="constrained")
        width = 0.8 / len(results)
        for place, result in enumerate(results):
            at = [x + (place - (len(results) - 1) / 2) * width for x in range(len(keys))]
            axes.bar(at, [result.get(broken, {}).get(key, 0.0) for key in keys], width, label=result["system"])
        axes.set_xticks(range(len(keys)), keys, rotation=30, ha="right")
        axes.set_ylim(0, 1)
        axes.set_ylabel(broken.replace("_", " "))
        axes.legend(frameon=False)
        figure.savefig(folder / ACCURACY_FILE, dpi=150)
        pyplot.close(figure)
        names.append(ACCURACY_FILE)
    if any(f"accuracy_snr_{level}" in results[0] for level in SNR_LEVELS_DB):
        figure, panels = pyplot.subplots(1, len(_SNR_CURVES), figsize=(10, 3.4), layout="constrained")
        for axes, (stem, label) in zip(panels, _SNR_CURVES, strict=True):
            for result in results:
                levels = [level for level in SNR_LEVELS_DB if f"{stem}_{level}" in result]
                values = [result[f"{stem}_{level}"] for level in levels]
                bounds = [result["interval_95"][f"{stem}_{level}"] for level in levels]
                errors = [
                    [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
                    [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
                ]
                axes.errorbar(
                    levels, values, yerr=errors if levels else None, marker="o", capsize=2, label=result["system"]
                )
            axes.set_xlabel("speech over background, dB")
            axes.set_title(label)
            axes.set_ylim(bottom=0)
            axes.invert_xaxis()
        panels[0].legend(frameon=False)
        figure.savefig(folder / SNR_FILE, dpi=150)
        pyplot.close(figure)
        names.append(SNR_FILE)
    curves = [
        (result["system"], [(each["confidence"], each["accuracy"], each["count"]) for each in result["reliability"]])
        for result in results
        if "reliability" in result
    ]
    if curves:
        draw_reliability(curves, folder / RELIABILITY_FILE)
        names.append(RELIABILITY_FILE)
    return names
