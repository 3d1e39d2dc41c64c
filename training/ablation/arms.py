"""Train the arms of the ablation from one Stage I checkpoint and evaluate all of them on the same questions.

An arm is the baseline, or a checkpoint from these steps:

1. Further steps of Stage I on traces of the arm's form; the base may not have this form.
2. Calibration of the gate on these weights, for arms with pauses.
3. Stage II, except in the arm for Stage I alone.
4. A second calibration, since Stage II moves the threshold for sampled rollouts, less confident than greedy
completions.
5. The evaluation.

Each step is a `hyper` command in its own process, skipped if its result exists. This module depends on no model: it
builds command lines and checks for files.

RUN_DIR holds `stage-1/FORM/seed-N`, shared by all arms of one form, `ARM/seed-N`, and the report.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from hyper_model.errors import HyperError
from hyper_model.files import write_whole

if TYPE_CHECKING:
    from training.recipes import TraceStyle

SUITES = ("snr-10", "snr-5", "hard-multi-speaker")
SETTINGS_FILE = "settings.json"

_PERCEPTION: Mapping[str, object] = {"fidelity": 0.0, "environment": 0.0, "speakers": 0.0, "transcript": 0.0}
STYLE_WEIGHTS: Mapping[TraceStyle, Mapping[str, object]] = {
    "explicit": {},
    "short": _PERCEPTION,
    "direct": _PERCEPTION | {"alignment": 0.0},
}
STYLE_LENGTHS: Mapping[TraceStyle, Mapping[str, object]] = {
    "explicit": {},
    "short": {"min_tokens": 8, "max_tokens": 120},
    "direct": {"min_tokens": 1, "max_tokens": 60},
}
"""Changes to the recipe's reward weights per trace style.

Sections absent from a style have weight 0; without SUMMARY there is no conclusion for `alignment`. The length with full
reward covers nearly all gold traces of the style: 10 to 117 and 2 to 54 tokens are the first to 99th percentile. Every
whole trace of these styles is weak, with equal format reward. It has no effect on advantages within a group.
"""

_COLLAPSE_LENGTH: Mapping[TraceStyle, float] = {"explicit": 0.5, "short": 0.25, "direct": 0.1}
"""Relative trace length of a collapsed run; short styles allow answers of one word or sentence."""


@dataclass(frozen=True)
class Arm:
    """One variant of the model, with its training settings.

    Attributes:
        meaning: Description for the report.
        style: Style of its traces.
        pause_mode: Form of its pauses; None for an arm without pauses.
        max_pauses: Its pause budget.
        wanted_pauses: Target of Stage II, in pauses per rollout.
        weights: Reward weights in addition to those of its style.
        has_stage_2: True if Stage II follows Stage I.
        baseline: Baseline in place of a checkpoint (`hyper eval --baseline`), without training.
        has_position_ids: True if each position of a span has its own embedding.
    """

    name: str
    meaning: str
    style: TraceStyle = "explicit"
    pause_mode: Literal["parallel", "sampled"] | None = None
    max_pauses: int = 0
    wanted_pauses: float = 0.0
    weights: Mapping[str, object] = field(default_factory=dict[str, object])
    has_stage_2: bool = True
    baseline: Literal["cascade"] | None = None
    has_position_ids: bool = False

    @property
    def form(self) -> str:
        """Return the name of its Stage I data, shared by arms of one form."""
        parts = [self.style, self.pause_mode, "positions" if self.has_position_ids else None]
        return "-".join(word for word in parts if word)


WANTED_PAUSES = 0.75
"""Target of pauses per rollout; an arm with twice the target also gets twice the rate in the served gate."""


def _pausing(name: str, meaning: str, **changes: Any) -> Arm:
    return Arm(name, meaning, **{"pause_mode": "parallel", "max_pauses": 3, "wanted_pauses": WANTED_PAUSES} | changes)


ARMS: tuple[Arm, ...] = (
    Arm(
        "cascade",
        "baseline: recogniser, speaker clustering, sound tagger and rules; not trained here",
        has_stage_2=False,
        baseline="cascade",
    ),
    Arm("sft", "Stage I only, on explicit traces", has_stage_2=False),
    Arm("grpo-direct", "Stage II; the answer alone", style="direct"),
    Arm("grpo-short", "Stage II; planning, reasoning and summary without a caption", style="short"),
    Arm("grpo-explicit", "Stage II; the explicit trace"),
    _pausing("hyper", "Stage II; the explicit trace and at most 3 pauses"),
    _pausing(
        "hyper-no-consistency",
        "as hyper, without the reward for consistency",
        # The background gate only lowers these two rewards, so it has no effect here.
        weights={"fidelity": 0.0, "alignment": 0.0},
    ),
    _pausing("hyper-sampled", "as hyper, with sampled spans", pause_mode="sampled"),
    _pausing("hyper-positions", "as hyper, one learned embedding per latent position", has_position_ids=True),
    _pausing("hyper-1", "as hyper, at most 1 pause", max_pauses=1),
    # Twice the budget needs a threshold with twice the pause rate.
    _pausing("hyper-6", "as hyper, at most 6 pauses", max_pauses=6, wanted_pauses=1.5),
)


@dataclass(frozen=True)
class Base:
    """Properties of the arms' common initial checkpoint.

    Attributes:
        decoder: Fields of `recipes.Decoder`.
        wanted: Range of pauses per completion of its calibration; None without a calibration.
        wanted_aborts: Maximum share of aborted completions of its calibration.
    """

    path: Path
    name: str
    sha256: str
    decoder: Mapping[str, int]
    window_tokens: int
    rest_tokens: int
    sections: tuple[str, ...]
    wanted: tuple[float, float] | None
    wanted_aborts: float | None

    @classmethod
    def read(cls, path: Path) -> Base:
        """Read the manifest and configuration of a checkpoint.

        Raises:
            CheckpointError: There is no checkpoint, or it is invalid.
        """
        from hyper_model.checkpoint import open_checkpoint

        opened = open_checkpoint(path, verify=False)
        pause = opened.manifest.pause
        text = json.loads((path / "config.json").read_text(encoding="utf-8"))["text_config"]
        decoder = {
            "vocab_size": 0,
            "hidden_size": text["hidden_size"],
            "num_layers": text["num_hidden_layers"],
            "num_heads": text["num_attention_heads"],
            "ffn_size": text["intermediate_size"],
            "latent_tokens": pause.latent_tokens,
        }
        calibration = pause.calibration if pause.max_pauses else None
        return cls(
            path,
            opened.manifest.name,
            opened.manifest_sha256,
            decoder,
            pause.window_tokens,
            pause.rest_tokens,
            tuple(section.value for section in pause.sections),
            None if calibration is None else calibration.wanted_pauses,
            None if calibration is None else calibration.wanted_abort_rate,
        )


@dataclass(frozen=True)
class Plan:
    """Size of the ablation per arm.

    Attributes:
        num_steps, num_sft_steps: Steps of Stage II, and of Stage I before it.
        num_items: Questions per arm, over all suites.
        sections: Sections with an active gate; empty means the base's.
        wanted_aborts: Maximum share of aborted completions for calibrations; None means the base's.
        sft_set, grpo_set: Further settings of all arms' recipes, as in `--set`.
    """

    num_steps: int
    num_sft_steps: int
    num_items: int
    sections: tuple[str, ...] = ()
    wanted_aborts: float | None = None
    sft_set: tuple[str, ...] = ()
    grpo_set: tuple[str, ...] = ()

    def items_of(self, suite: str) -> int:
        """Return the number of questions of a suite."""
        share, rest = divmod(self.num_items, len(SUITES))
        return share + (SUITES.index(suite) < rest)

    def said(self, base: Base) -> dict[str, Any]:
        """Return the common settings of all results in a directory, as plain JSON data."""
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}
        return settings | {"base": base.name, "base_sha256": base.sha256}


@dataclass(frozen=True)
class Step:
    """One command and its result.

    Attributes:
        arguments: Arguments of `hyper`.
        result: A folder or file, written atomically.
        run_dir: A training run to resume if it exists; None for other commands.
        copied: A checkpoint changed in place by the command. It works on a copy, renamed to the result.
    """

    title: str
    arguments: tuple[str, ...]
    result: Path
    log: Path
    run_dir: Path | None = None
    copied: Path | None = None

    @property
    def is_done(self) -> bool:
        """Return True if the result exists."""
        return self.result.exists()


def num_seeds_of(arm: Arm, num_seeds: int) -> int:
    """Return the number of seeds of an arm; a baseline has one."""
    return 1 if arm.baseline else num_seeds


def arm_dir(run_dir: Path, arm: Arm, seed: int) -> Path:
    """Return the folder of an arm's runs, checkpoint and results."""
    return run_dir / arm.name / f"seed-{seed}"


def steps_of(arm: Arm, seed: int, *, plan: Plan, base: Base, run_dir: Path, work: Path) -> list[Step]:
    """List the steps of an arm in order."""
    folder, shared = arm_dir(run_dir, arm, seed), run_dir / "stage-1" / arm.form / f"seed-{seed}"
    evaluated = base.path
    steps: list[Step] = []
    if not arm.baseline:
        initial = base.path
        if arm.has_position_ids:
            steps.append(_positions(base, shared.parent))
            initial = steps[-1].result
        steps.append(_stage_1(arm, seed, plan, base, initial, shared, work))
        start = steps[-1].result
        if arm.max_pauses:
            steps.append(_calibration(arm, plan, base, start, shared / f"gated-{arm.max_pauses}", work))
            start = steps[-1].result
        if arm.has_stage_2:
            steps.append(_stage_2(arm, seed, plan, base, start, folder, work))
            if arm.max_pauses:
                steps.append(_calibration(arm, plan, base, steps[-1].result, folder / "gated", work, is_served=True))
        evaluated = steps[-1].result
    return [*steps, *(_evaluation(arm, suite, plan, evaluated, folder, work) for suite in SUITES)]


def _positions(base: Base, folder: Path) -> Step:
    arguments = ("checkpoint", "positions", base.path, folder / "base")
    return Step("a token for each position", _texts(arguments), folder / "base", folder / "base.log")


def _stage_1(arm: Arm, seed: int, plan: Plan, base: Base, begun_from: Path, folder: Path, work: Path) -> Step:
    settings: dict[str, object] = {
        "num_steps": plan.num_sft_steps,
        "seed": seed,
        # A fifth of the recipe's rate, since the base has finished its own decay.
        "learning_rate": 2e-4,
        "min_learning_rate": 2e-5,
        "warmup_steps": min(20, plan.num_sft_steps),
        "save_every_steps": 100,
        "speech_share": [0.25, 0.25],
        "cut_share": [0.0, 0.0],
        # Not every form works without audio.
        "read_size": 0,
        # The base's projector is already trained.
        "spelling": None,
        "decoder": {**base.decoder, **({"has_position_tokens": True} if arm.has_position_ids else {})},
        "trace_style": arm.style,
        "pause_share": 0.25 if arm.pause_mode else 0.0,
        "pause_mode": arm.pause_mode or "parallel",
    }
    arguments = ("train", "mini_sft", folder / "run", "--base", begun_from, "--work", work)
    arguments += ("--name", f"{base.name}-{arm.form}")
    arguments += ("--export", folder / "checkpoint", "--overwrite", *_set(settings, plan.sft_set))
    return Step(
        f"Stage I, {arm.form}", _texts(arguments), folder / "checkpoint", folder / "stage-1.log", folder / "run"
    )


def _calibration(
    arm: Arm, plan: Plan, base: Base, checkpoint: Path, result: Path, work: Path, *, is_served: bool = False
) -> Step:
    assert base.wanted is not None
    # The served gate must keep the pause rate of Stage II.
    share = arm.wanted_pauses / WANTED_PAUSES if is_served else 1.0
    wanted = [round(share * pauses, 4) for pauses in base.wanted]
    wanted_aborts = base.wanted_aborts if plan.wanted_aborts is None else plan.wanted_aborts
    arguments = ("checkpoint", "calibrate", _partial(result), "--work", work, "--workers", 1)
    arguments += ("--wanted", *wanted, "--wanted-aborts", wanted_aborts, "--max-pauses", arm.max_pauses)
    arguments += ("--window-tokens", base.window_tokens, "--rest-tokens", base.rest_tokens)
    for section in plan.sections or base.sections:
        arguments += ("--section", section)
    log = result.with_name(f"{result.name}.log")
    return Step(f"gate of {arm.max_pauses} pauses", _texts(arguments), result, log, copied=checkpoint)


def _stage_2(arm: Arm, seed: int, plan: Plan, base: Base, start: Path, folder: Path, work: Path) -> Step:
    settings: dict[str, object] = {
        "num_steps": plan.num_steps,
        "seed": seed,
        "max_pauses": arm.max_pauses,
        "wanted_pauses": arm.wanted_pauses,
        "collapse_length": _COLLAPSE_LENGTH[arm.style],
        "weights": {**STYLE_WEIGHTS[arm.style], **arm.weights},
        "trace_length": STYLE_LENGTHS[arm.style],
    }
    arguments = ("train", "mini_grpo", folder / "run", "--base", start, "--work", work)
    arguments += ("--name", f"{base.name}-{arm.name}")
    arguments += ("--export", folder / "checkpoint", "--overwrite", *_set(settings, plan.grpo_set))
    return Step("Stage II", _texts(arguments), folder / "checkpoint", folder / "stage-2.log", folder / "run")


def _evaluation(arm: Arm, suite: str, plan: Plan, asked: Path, folder: Path, work: Path) -> Step:
    from training.evaluation.report import RESULT_FILE

    arguments = ("eval", "--suite", suite, "--items", plan.items_of(suite))
    arguments += ("--out", folder / suite, "--work", work, "--workers", 1)
    if arm.baseline:
        arguments += ("--baseline", arm.baseline)
    else:
        arguments += ("--checkpoint", asked)
        if not arm.max_pauses:
            arguments += ("--pauses", 0)
    return Step(suite, _texts(arguments), folder / suite / RESULT_FILE, folder / f"{suite}.log")


def _set(settings: Mapping[str, object], more: Sequence[str]) -> Iterator[str]:
    texts = (
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in settings.items()
        if value != {}
    )
    for text in (*texts, *more):
        yield from ("--set", text)


def _texts(arguments: Sequence[object]) -> tuple[str, ...]:
    return tuple(map(str, arguments))


def _partial(result: Path) -> Path:
    return result.with_name(f"{result.name}.partial")


def run_step(step: Step) -> None:
    """Run a step, or wait for another process with the same step.

    Raises:
        HyperError: The command failed; the message has its log file and the last line.
    """
    import fcntl
    import shutil
    import time

    step.log.parent.mkdir(parents=True, exist_ok=True)
    with step.log.open("ab") as log:
        # The command inherits the lock with the file and holds it for its lifetime, even without its parent.
        fcntl.flock(log, fcntl.LOCK_EX)
        if step.is_done:
            return
        arguments = [*step.arguments]
        if step.run_dir is not None and (step.run_dir / "recipe.json").exists():
            arguments.append("--resume")
        if step.copied is not None:
            shutil.rmtree(_partial(step.result), ignore_errors=True)
            shutil.copytree(step.copied, _partial(step.result))
        log.write(f"\n$ hyper {' '.join(arguments)}\n".encode())
        log.flush()
        command = [sys.executable, "-m", "hyper_model.cli", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started_s = time.monotonic()
        # A separate session allows ending the command together with its workers.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        with contextlib.ExitStack() as undo:
            undo.callback(process.wait)
            undo.callback(os.killpg, process.pid, signal.SIGTERM)
            _wait(process, step.log)
            undo.pop_all()
        if process.returncode:
            raise HyperError(f"{step.title} ended with {process.returncode}: {_last_line(step.log)} (see {step.log})")
        if step.copied is not None:
            _partial(step.result).rename(step.result)
        if not step.is_done:
            raise HyperError(f"{step.title} left no {step.result} (see {step.log})")
        click.echo(f"    {step.title}: done in {(time.monotonic() - started_s) / 60:.1f} min", err=True)


def _wait(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a command's end; on a terminal, show its last line."""
    is_shown = sys.stderr.isatty()
    while True:
        try:
            process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            if is_shown:
                click.echo(f"\r\033[K{_last_line(log)[:110]}", err=True, nl=False)
    if is_shown:
        click.echo("\r\033[K", err=True, nl=False)


def _last_line(log: Path) -> str:
    """Return the last non-empty line of a log, progress bars included."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4_096))
        lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_arms(
    arms: Sequence[Arm], *, plan: Plan, base: Base, run_dir: Path, work: Path, num_seeds: int
) -> dict[str, str]:
    """Train and evaluate arms in turn; return the failures, none of which stops another arm."""
    failed: dict[str, str] = {}
    broken: set[Path] = set()
    todo = [(arm, seed) for seed in range(num_seeds) for arm in arms if seed < num_seeds_of(arm, num_seeds)]
    for place, (arm, seed) in enumerate(todo, 1):
        name = f"{arm.name}, seed {seed}"
        steps = steps_of(arm, seed, plan=plan, base=base, run_dir=run_dir, work=work)
        missing = [step for step in steps if not step.is_done]
        click.echo(f"[{place}/{len(todo)}] {name}: {len(missing)} of {len(steps)} steps to do", err=True)
        for step in missing:
            # Arms of one form share a failed step.
            if step.result in broken:
                failed[name] = f"{step.title} failed for another arm"
                break
            click.echo(f"    {step.title} ({step.log})", err=True)
            try:
                run_step(step)
            except HyperError as error:
                broken.add(step.result)
                failed[name] = str(error)
                click.echo(f"    failed: {error}", err=True)
                break
    return failed


def check_settings(run_dir: Path, said: Mapping[str, Any]) -> None:
    """Write the common settings of a directory, or compare them with the existing file.

    Raises:
        HyperError: The directory has other settings.
    """
    file = run_dir / SETTINGS_FILE
    if not file.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(said, indent=2) + "\n")
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*before, *said} if before.get(name) != said.get(name))
    if changed:
        values = (f"{name} {before.get(name)!r}, now {said.get(name)!r}" for name in changed)
        raise HyperError(f"{run_dir} was started with {'; '.join(values)}. Use the original settings or a new RUN_DIR.")
