"""Write the report of a run from its log and recipe: curves, a page and a model card.

A running or interrupted run can be reported too. This module depends on no model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyper_model.manifest import MANIFEST_FILE, read_manifest
from training.recipes import REWARD_WEIGHTS
from training.trainer import LEFT_OUT_FILE, read_left_out, read_log, read_recipe

_MAX_LEFT_OUT = 50

CURVES_FILE, REPORT_FILE = "curves.png", "report.md"

_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss",)),
    ("reward", ("reward",)),
    ("parts of the reward", tuple(f"reward_{name}" for name in REWARD_WEIGHTS)),
    ("visible tokens per trace", ("length",)),
    ("pauses per rollout", ("pauses",)),
    ("divergence from the reference", ("kl",)),
    ("entropy", ("entropy",)),
    ("gap between sampler and trainer", ("gap",)),
    ("seconds per step", ("step_s", "rollout_s", "reference_s", "sync_s")),
)
_TOLD = ("loss", "reward", "reward_accuracy", "strict", "length", "pauses", "aborted", "cut", "kl", "entropy", "gap")


def write_report(run_dir: Path, *, outcome: str) -> Path:
    """Write `curves.png` and `report.md` into a run directory; return the page.

    Args:
        outcome: The end of the run, in a sentence.
    """
    recipe = read_recipe(run_dir)
    rows = read_log(run_dir)
    draw_curves(rows, run_dir / CURVES_FILE, title=recipe["name"])
    lines = [f"# Run of {recipe['name']}", "", outcome, "", f"![Curves]({CURVES_FILE})", "", *_told(rows)]
    if left_out := read_left_out(run_dir):
        lines += ["", "## Rows left out", "", f"{len(left_out)} rows of the data were not used ({LEFT_OUT_FILE}):", ""]
        lines += [f"- {row}: {reason}" for row, reason in list(left_out.items())[:_MAX_LEFT_OUT]]
        if len(left_out) > _MAX_LEFT_OUT:
            lines += [f"- and {len(left_out) - _MAX_LEFT_OUT} more"]
    lines += ["", "## Recipe", "", "```json", json.dumps(recipe, indent=2), "```", ""]
    page = run_dir / REPORT_FILE
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def write_card(run_dir: Path, checkpoint: Path, *, num_steps: int, data: str | None) -> Path:
    """Write the model card of a run's exported checkpoint; return its path.

    The card has the facts known at export. Accuracy is left to a later evaluation.

    Args:
        num_steps: Number of training steps of the weights.
        data: Name of the training file; None for synthetic scenes.
    """
    manifest = read_manifest((checkpoint / MANIFEST_FILE).read_bytes())
    recipe = read_recipe(run_dir)
    left_out = read_left_out(run_dir)
    source = "Synthetic scenes (docs/data-card.md of the project that trained it)."
    if data is not None:
        source = f"{data} (sha256 {recipe['origin']['data'][:12]})"
        source += f", without {len(left_out)} rows that could not be used." if left_out else "."
    lines = [
        f"# {manifest.name}",
        "",
        f"A HyPeR checkpoint: {manifest.base_model}; recipe `{recipe['name']}`, after step {num_steps} of "
        f"{recipe['num_steps']}. `hyper checkpoint info` prints all settings.",
        "",
        f"- Data: {source}",
        "- Pauses: thresholds are not calibrated for these weights. Run `hyper checkpoint calibrate`.",
        "- Evaluation: none yet. Run `hyper eval --checkpoint`.",
        "- Licence: see the licences of its base and its data.",
        "",
        "## Training",
        "",
        *_told([row for row in read_log(run_dir) if row["step"] <= num_steps]),
    ]
    card = checkpoint / "README.md"
    card.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return card


def _told(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the figures at the beginning and end of a run, as lines of a page."""
    if not rows:
        return ["The log is empty."]
    share = max(1, len(rows) // 10)
    lines = [
        f"Means over the first and the last tenth of the log ({share} of {len(rows)} lines each):",
        "",
        "| | first | last |",
        "| --- | --- | --- |",
    ]
    for name in _TOLD:
        first, last = _mean(rows[:share], name), _mean(rows[-share:], name)
        if first is not None and last is not None:
            lines.append(f"| {name} | {first:.4g} | {last:.4g} |")
    seconds = _mean(rows, "step_s")
    if seconds is not None:
        lines += ["", f"{rows[-1]['step']} steps, {seconds:.2f} s each on average."]
    return lines


def draw_curves(rows: Sequence[dict[str, Any]], path: Path, *, title: str) -> None:
    """Plot every figure of a log with a panel, as measured and smoothed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(name, [key for key in keys if any(key in row for row in rows)]) for name, keys in _PANELS]
    panels = [(name, keys) for name, keys in panels if keys] or [("the log is empty", [])]
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure, grid = pyplot.subplots(
        num_rows, num_columns, figsize=(4.2 * num_columns, 2.8 * num_rows), layout="constrained", squeeze=False
    )
    for axes, (name, keys) in zip(grid.flat, panels, strict=False):
        for key in keys:
            steps = [row["step"] for row in rows if key in row]
            values = [row[key] for row in rows if key in row]
            (line,) = axes.plot(steps, _smoothed(values), label=key.removeprefix("reward_").removesuffix("_s"))
            if len(keys) == 1:
                axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        if len(keys) > 1:
            axes.legend(frameon=False, fontsize=6)
    for axes in list(grid.flat)[len(panels) :]:
        axes.axis("off")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _smoothed(values: Sequence[float]) -> list[float]:
    found: list[float] = []
    share = min(1.0, 10 / max(1, len(values)))
    for value in values:
        found.append(value if not found else found[-1] + share * (value - found[-1]))
    return found


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return sum(values) / len(values) if values else None
