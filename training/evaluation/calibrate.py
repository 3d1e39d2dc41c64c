"""Calibrate a checkpoint's gate and the confidence of its answers, and write both to its manifest.

The pause threshold is calibrated for a wanted pause rate. The abort threshold is calibrated against being wrong: the
gate aborts only if nearly all such completions answer wrongly without a pause. Calibration has four steps:

1. Sample completions without pauses, with their confidences.
2. Simulate the effect of each threshold on them offline: the curve.
3. Run the real gate in the real engine with the chosen thresholds, and move the pause threshold until the rate fits.
4. Fit the temperatures of the confidence to the answers of the last run (`training.evaluation.confidence`).

Step 3 is necessary, since a pause changes all later tokens. This module depends on no source of clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hyper_model.checkpoint import Checkpoint, update_manifest, update_pause
from hyper_model.errors import CheckpointError
from hyper_model.manifest import MANIFEST_FILE, Calibration, CalibrationPoint, ConfidenceFields, PauseFields
from hyper_model.pause import Gate, GateSettings, Verdict
from hyper_model.trace import PauseMode, Termination
from training.data.truth import Truth
from training.evaluation.confidence import fit_confidence, own_confidence, rated
from training.rl.rewards import is_right
from training.rl.rollout import Completion, Prompt, VllmBackend

NUM_CURVE_POINTS = 25
MAX_TRIALS = 6
"""Maximum number of runs with the real gate."""

MIN_ABORTED = 5
"""Least number of completions below an abort threshold, for a judgement of their answers."""


@dataclass(frozen=True)
class Wanted:
    """Target rates of a calibration.

    Attributes:
        pauses: Minimum and maximum of pauses per completion.
        abort_rate: Maximum share of aborted completions.
        wrong: Minimum share of wrong answers, without a pause, among the completions below the abort threshold.
    """

    pauses: tuple[float, float] = (0.45, 1.0)
    abort_rate: float = 0.005
    wrong: float = 0.9

    @property
    def middle(self) -> float:
        """Return the targeted number of pauses."""
        return sum(self.pauses) / 2


class Found(NamedTuple):
    """Thresholds as fields of the manifest, the calibration record, and the completions of the last run."""

    fields: dict[str, Any]
    calibration: Calibration
    completions: Sequence[Completion]


def calibrate(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    truths: Sequence[Truth],
    *,
    source: str,
    wanted: Wanted,
    fields: dict[str, Any] | None = None,
    use_tqdm: bool = True,
) -> tuple[Checkpoint, Calibration]:
    """Calibrate gate and confidence of a checkpoint in place; on any error the manifest stays unchanged.

    Args:
        prompts: The validation set, disjoint from training and reported evaluation data.
        truths: Truth of each prompt.
        source: Description of the validation set.
        fields: Fields of the manifest's `pause` group to set first, such as `{"max_pauses": 3}`.

    Raises:
        CheckpointError: The checkpoint cannot have a gate, or no threshold gives the wanted rates.
    """
    before = (checkpoint.path / MANIFEST_FILE).read_bytes()
    calibration = None
    fields = dict(fields or {})
    if checkpoint.manifest.pause.calibration is not None:
        # Thresholds of an earlier calibration do not limit this one.
        fields = {name: PauseFields.model_fields[name].default for name in ("tau_pause", "tau_abort")} | fields
    try:
        # This comes first, since the engine reads the gate's settings from the manifest at start.
        checkpoint = update_pause(checkpoint.path, {**fields, "calibration": None})
        settings = GateSettings.of(checkpoint.manifest, checkpoint.tokenizer)
        if settings is None:
            raise CheckpointError("no gate: its tags are plain text, or its budget is 0 (--max-pauses sets one)")
        if wanted.pauses[0] > settings.max_pauses:
            raise CheckpointError(f"{wanted.pauses[0]:g} pauses are wanted of a budget of {settings.max_pauses}")
        backend = backend_of(checkpoint)

        def complete(gate: GateSettings) -> list[Completion]:
            return backend.answer(prompts, gate=gate, use_tqdm=use_tqdm)

        found = find_thresholds(settings, complete, truths, source=source, wanted=wanted)
        checkpoint = update_pause(checkpoint.path, found.fields)
        checkpoint = write_confidence(checkpoint, found.completions, truths, source=source)
        calibration = found.calibration
        return checkpoint, calibration
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be calibrated: {error}") from error
    finally:
        if calibration is None:
            (checkpoint.path / MANIFEST_FILE).write_bytes(before)


def calibrate_confidence(
    checkpoint: Checkpoint, prompts: Sequence[Prompt], truths: Sequence[Truth], *, source: str, use_tqdm: bool = True
) -> Checkpoint:
    """Calibrate the confidence of a checkpoint in place, with its gate as it is.

    Args:
        prompts, truths, source: As in `calibrate`.

    Raises:
        CheckpointError: The checkpoint cannot run here, or the set has too few right or wrong answers.
    """
    backend = backend_of(checkpoint)
    completions = backend.answer(prompts, gate=backend.gate, use_tqdm=use_tqdm)
    made = write_confidence(checkpoint, completions, truths, source=source)
    if made.manifest.confidence is None or made.manifest.confidence.source != source:
        raise CheckpointError(
            f"{checkpoint.path}: the confidence cannot be calibrated on {source}: too few answers, or hardly any wrong "
            "or right one; use more --items"
        )
    return made


def backend_of(checkpoint: Checkpoint) -> VllmBackend:
    """Return an engine with answers at temperature 1: the model's own probabilities."""
    backend = VllmBackend(checkpoint)
    manifest = checkpoint.manifest.model_copy(update={"confidence": own_confidence()})
    backend.checkpoint = replace(checkpoint, manifest=manifest)
    return backend


def write_confidence(
    checkpoint: Checkpoint, completions: Sequence[Completion], truths: Sequence[Truth], *, source: str
) -> Checkpoint:
    """Fit the temperatures to answers at temperature 1, and write them; too few answers leave the manifest as it is."""
    found = [rated(run.result, is_answer_right(run, truth)) for run, truth in zip(completions, truths, strict=True)]
    fields = fit_confidence([answer for answer in found if answer is not None], source=source)
    if fields == ConfidenceFields(source=source):
        return checkpoint
    return update_manifest(checkpoint.path, {"confidence": fields.model_dump(mode="json")})


def is_answer_right(completion: Completion, truth: Truth) -> bool | None:
    """Return whether a completion's answer is right, as an evaluation counts it; None if the truth is unknown."""
    result = completion.result
    if not truth.answer:
        return None
    if truth.choices:
        return result.choice_index == truth.choices.index(truth.answer)
    return is_right(result.parsed, truth)


def find_thresholds(
    settings: GateSettings,
    complete: Callable[[GateSettings], Sequence[Completion]],
    truths: Sequence[Truth],
    *,
    source: str,
    wanted: Wanted,
) -> Found:
    """Find the thresholds with the wanted rates.

    Args:
        complete: Writes the validation set's completions with a gate.
        truths: Truth of each completion.

    Raises:
        CheckpointError: No threshold gives the wanted rates.
    """
    # A gate without a budget still ends repetitions, as the calibrated one will.
    plain = complete(replace(settings, tau_pause=0.0, tau_abort=0.0, max_pauses=0))
    is_wrong = [_no(is_answer_right(run, truth)) for run, truth in zip(plain, truths, strict=True)]
    curve = threshold_curve(settings, plain, is_wrong)
    tau_abort = highest_abort(curve, wanted.abort_rate, wanted.wrong, num_completions=len(plain))
    tau_pause = threshold_for(settings, plain, wanted.middle)
    low, high, measured = 0.0, 1.0, list[str]()
    for _ in range(MAX_TRIALS):
        trial = replace(settings, tau_pause=tau_pause, tau_abort=min(tau_abort, tau_pause))
        completions = complete(trial)
        pauses, abort_rate = rates(completions)
        measured.append(f"{pauses:.2f} pauses and {abort_rate:.3f} aborted at {tau_pause:.4f}")
        if abort_rate > wanted.abort_rate:
            if trial.tau_abort == 0.0:
                # The aborts then have another cause than low confidence.
                measured.append(_too_many_loops(settings))
                break
            tau_abort = tau_abort / 2 if tau_abort > curve[0].tau else 0.0
        elif wanted.pauses[0] <= pauses <= wanted.pauses[1]:
            calibration = Calibration(
                source=source,
                num_completions=len(plain),
                wanted_pauses=wanted.pauses,
                wanted_abort_rate=wanted.abort_rate,
                wanted_wrong=wanted.wrong,
                pauses=round(pauses, 4),
                abort_rate=round(abort_rate, 4),
                curve=tuple(curve),
            )
            taus = {"tau_pause": trial.tau_pause, "tau_abort": trial.tau_abort}
            return Found(taus | {"calibration": calibration.model_dump(mode="json")}, calibration, completions)
        elif pauses < wanted.pauses[0]:
            if tau_pause == 1.0:
                break
            low = tau_pause
            tau_pause = (tau_pause + high) / 2
        else:
            high = tau_pause
            tau_pause = (tau_pause + low) / 2
    raise CheckpointError(
        f"no threshold gave {wanted.pauses[0]:g} to {wanted.pauses[1]:g} pauses per completion with at "
        f"most {wanted.abort_rate:g} aborted; measured {'; '.join(measured)}"
    )


def _too_many_loops(settings: GateSettings) -> str:
    return (
        f"these repeat themselves for loop_tokens, {settings.loop_tokens} tokens, more than max_closed_loops times "
        f"({settings.max_closed_loops})"
    )


def rates(completions: Sequence[Completion]) -> tuple[float, float]:
    """Return pauses per completion and the share of aborted completions."""
    gates = [completion.gate for completion in completions if completion.gate is not None]
    # The procedure itself aborts a repetition in the answer.
    is_aborted = [
        run.gate.is_aborted or run.result.parsed.termination is Termination.ABORTED
        for run in completions
        if run.gate is not None
    ]
    return sum(gate.num_pauses for gate in gates) / len(gates), sum(is_aborted) / len(gates)


def simulate(settings: GateSettings, completion: Completion) -> Gate:
    """Run the gate over a completion as if its pauses had no effect on later tokens."""
    gate = Gate(settings)
    for token_id, confidence in zip(completion.written_ids, completion.confidences, strict=True):
        decision = gate.decide(confidence)
        if decision.verdict is Verdict.ABORT:
            gate.is_aborted = True
            break
        if decision.verdict is Verdict.PAUSE:
            gate.push(settings.open_id, confidence)
            if settings.mode is PauseMode.PARALLEL:
                gate.feed_span()
            else:
                gate.push(settings.close_id, None)
        gate.push(token_id, confidence)
    return gate


def pause_rate(settings: GateSettings, completions: Sequence[Completion], tau_pause: float) -> float:
    """Return pauses per completion at one threshold, by `simulate`."""
    trial = replace(settings, tau_pause=tau_pause, tau_abort=0.0)
    return sum(simulate(trial, completion).num_pauses for completion in completions) / len(completions)


def threshold_curve(
    settings: GateSettings, completions: Sequence[Completion], is_wrong: Sequence[bool | None] | None = None
) -> list[CalibrationPoint]:
    """Return simulated rates at quantiles of the completions' lowest windows and at threshold 1.

    Args:
        is_wrong: Whether the answer of each completion is wrong; None without a known truth.
    """
    lowest = sorted(run.gate.lowest for run in completions if run.gate and run.gate.lowest is not None)
    if not lowest:
        raise CheckpointError(f"no completion has a full window of {settings.window_tokens} tokens in a gated section")
    is_wrong = [None] * len(completions) if is_wrong is None else is_wrong
    judged = [
        (run.gate.lowest, wrong)
        for run, wrong in zip(completions, is_wrong, strict=True)
        if run.gate is not None and run.gate.lowest is not None and wrong is not None
    ]

    def share_wrong(tau: float) -> float | None:
        below = [wrong for value, wrong in judged if value <= tau]
        return round(sum(below) / len(below), 4) if below else None

    places = {round(at * (len(lowest) - 1) / (NUM_CURVE_POINTS - 1)) for at in range(NUM_CURVE_POINTS)}
    return [
        CalibrationPoint(
            tau=round(tau, 6),
            pauses=round(pause_rate(settings, completions, tau), 4),
            abort_rate=round(sum(value <= tau for value in lowest) / len(completions), 4),
            wrong=share_wrong(tau),
        )
        for tau in sorted({lowest[place] for place in places} | {1.0})
    ]


def highest_abort(
    curve: Sequence[CalibrationPoint], wanted_rate: float, wanted_wrong: float, *, num_completions: int
) -> float:
    """Return the highest threshold whose aborts are rare and nearly all wrong without a pause; 0 if there is none."""
    fitting = [
        point.tau
        for point in curve
        if point.wrong is not None
        and point.wrong >= wanted_wrong
        and point.abort_rate <= wanted_rate
        and round(point.abort_rate * num_completions) >= MIN_ABORTED
    ]
    return max(fitting, default=0.0)


def _no(outcome: bool | None) -> bool | None:
    return None if outcome is None else not outcome


def threshold_for(settings: GateSettings, completions: Sequence[Completion], wanted: float) -> float:
    """Return the pause threshold with the wanted simulated pause rate, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2
        if pause_rate(settings, completions, middle) < wanted:
            low = middle
        else:
            high = middle
    return high


def draw_curve(calibration: Calibration, tau_pause: float, path: Path) -> None:
    """Plot the curve and the chosen threshold as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    taus = [point.tau for point in calibration.curve]
    axes.plot(taus, [point.pauses for point in calibration.curve], marker=".", label="pauses a completion")
    axes.plot(taus, [point.abort_rate for point in calibration.curve], marker=".", label="share with a lower window")
    judged = [(point.tau, point.wrong) for point in calibration.curve if point.wrong is not None]
    if judged:
        axes.plot(*zip(*judged, strict=True), label="wrong among these")
    axes.axvline(tau_pause, linestyle="--", color="grey", label=f"tau_pause {tau_pause:.3f}")
    axes.axhspan(*calibration.wanted_pauses, alpha=0.15, label="wanted")
    axes.set_xlabel("threshold on the window's confidence")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
