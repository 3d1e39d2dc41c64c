"""Calibrate the thresholds of a checkpoint's gate for a wanted pause rate, and write them to its manifest.

Calibration has three steps:

1. Sample completions without pauses, with their confidences.
2. Simulate the effect of each threshold on them offline: the curve.
3. Run the real gate in the real engine with the chosen thresholds, and move the pause threshold until the rate fits.

Step 3 is necessary, since a pause changes all later tokens. This module depends on no source of clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hyper_model.checkpoint import Checkpoint, update_pause
from hyper_model.errors import CheckpointError
from hyper_model.manifest import MANIFEST_FILE, Calibration, CalibrationPoint, PauseFields
from hyper_model.pause import Gate, GateSettings, Verdict
from hyper_model.trace import PauseMode
from training.rl.rollout import Completion, Prompt, VllmBackend

NUM_CURVE_POINTS = 25
MAX_TRIALS = 6
"""Maximum number of runs with the real gate."""


@dataclass(frozen=True)
class Wanted:
    """Target rates of a calibration.

    Attributes:
        pauses: Minimum and maximum of pauses per completion.
        abort_rate: Maximum share of aborted completions.
    """

    pauses: tuple[float, float] = (0.45, 1.0)
    abort_rate: float = 0.01

    @property
    def middle(self) -> float:
        """Return the targeted number of pauses."""
        return sum(self.pauses) / 2


def calibrate(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    *,
    source: str,
    wanted: Wanted,
    fields: dict[str, Any] | None = None,
    use_tqdm: bool = True,
) -> tuple[Checkpoint, Calibration]:
    """Calibrate a checkpoint in place; on any error the manifest stays unchanged.

    Args:
        prompts: The validation set, disjoint from training and reported evaluation data.
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
        backend = VllmBackend(checkpoint)

        def complete(gate: GateSettings, is_armed: bool) -> list[Completion]:
            return backend.answer(prompts, gate=gate, is_armed=is_armed, use_tqdm=use_tqdm)

        thresholds, found = find_thresholds(settings, complete, source=source, wanted=wanted)
        checkpoint = update_pause(checkpoint.path, thresholds)
        calibration = found
        return checkpoint, calibration
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be calibrated: {error}") from error
    finally:
        if calibration is None:
            (checkpoint.path / MANIFEST_FILE).write_bytes(before)


def find_thresholds(
    settings: GateSettings,
    complete: Callable[[GateSettings, bool], Sequence[Completion]],
    *,
    source: str,
    wanted: Wanted,
) -> tuple[dict[str, Any], Calibration]:
    """Return the thresholds as fields of the manifest, and the calibration record.

    Args:
        complete: Writes the validation set's completions with a gate. The gate acts if the flag is True, else it only
            observes.

    Raises:
        CheckpointError: No threshold gives the wanted rates.
    """
    plain = complete(settings, False)
    curve = threshold_curve(settings, plain)
    tau_abort = min(settings.tau_abort, highest_abort(curve, wanted.abort_rate))
    tau_pause = threshold_for(settings, plain, wanted.middle)
    low, high = 0.0, 1.0
    measured: list[str] = []
    for _ in range(MAX_TRIALS):
        trial = replace(settings, tau_pause=tau_pause, tau_abort=min(tau_abort, tau_pause))
        pauses, abort_rate = rates(complete(trial, True))
        measured.append(f"{pauses:.2f} pauses and {abort_rate:.3f} aborted at {tau_pause:.4f}")
        if abort_rate > wanted.abort_rate:
            if trial.tau_abort == 0.0:
                # The aborts then have another cause than low confidence.
                measured.append(f"these repeat themselves for loop_tokens, {settings.loop_tokens} tokens")
                break
            tau_abort = tau_abort / 2 if tau_abort > curve[0].tau else 0.0
        elif wanted.pauses[0] <= pauses <= wanted.pauses[1]:
            calibration = Calibration(
                source=source,
                num_completions=len(plain),
                wanted_pauses=wanted.pauses,
                wanted_abort_rate=wanted.abort_rate,
                pauses=round(pauses, 4),
                abort_rate=round(abort_rate, 4),
                curve=tuple(curve),
            )
            taus = {"tau_pause": trial.tau_pause, "tau_abort": trial.tau_abort}
            return taus | {"calibration": calibration.model_dump(mode="json")}, calibration
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


def rates(completions: Sequence[Completion]) -> tuple[float, float]:
    """Return pauses per completion and the share of aborted completions."""
    gates = [completion.gate for completion in completions if completion.gate is not None]
    return sum(gate.num_pauses for gate in gates) / len(gates), sum(gate.is_aborted for gate in gates) / len(gates)


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


def threshold_curve(settings: GateSettings, completions: Sequence[Completion]) -> list[CalibrationPoint]:
    """Return simulated rates at quantiles of the completions' lowest windows and at threshold 1."""
    lowest = sorted(run.gate.lowest for run in completions if run.gate and run.gate.lowest is not None)
    if not lowest:
        raise CheckpointError(f"no completion has a full window of {settings.window_tokens} tokens in a gated section")
    places = {round(at * (len(lowest) - 1) / (NUM_CURVE_POINTS - 1)) for at in range(NUM_CURVE_POINTS)}
    return [
        CalibrationPoint(
            tau=round(tau, 6),
            pauses=round(pause_rate(settings, completions, tau), 4),
            abort_rate=round(sum(value <= tau for value in lowest) / len(completions), 4),
        )
        for tau in sorted({lowest[place] for place in places} | {1.0})
    ]


def highest_abort(curve: Sequence[CalibrationPoint], wanted_rate: float) -> float:
    """Return the highest threshold within the wanted abort rate, else a value just below the curve."""
    fitting = [point.tau for point in curve if point.abort_rate <= wanted_rate]
    return max(fitting) if fitting else curve[0].tau * 0.99


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
    axes.axvline(tau_pause, linestyle="--", color="grey", label=f"tau_pause {tau_pause:.3f}")
    axes.axhspan(*calibration.wanted_pauses, alpha=0.15, label="wanted")
    axes.set_xlabel("threshold on the window's confidence")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
