"""`hyper eval`: run a suite on a checkpoint, a service or the baseline; write figures, tables and plots."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from training.cli.registry_option import RegistryOption

if TYPE_CHECKING:
    from hyper_model.errors import HyperError
    from training.data.sources.voices import Bank, Split
    from training.evaluation.runners.http import Endpoint
    from training.evaluation.suites.item import Item, Suite

KEPT_FILE = "replies.jsonl"
FITTED_FILE = "cascade.npz"

RECORDING_ITEMS = 300
"""Default number of questions about long recordings."""

SEED = 0
"""Seed of the bank, common to training and evaluation."""


def bank_of(split: Split, work: Path, workers: int) -> Bank:
    """Open the bank of a split's voices, and build its missing rounds."""
    from training.data.sources.downloads import fetch, require_speech_programs
    from training.data.sources.voices import Bank, build_bank, list_voices, missing_rounds, trained_lines

    fetch(work / "assets")
    voices = [voice for voice in list_voices() if voice.split == split]
    if missing_rounds(work / "bank", voices):
        require_speech_programs()
        build_bank(work / "assets", work / "bank", seed=SEED, num_workers=workers, voices=voices)
    # A sentence spoken by a training voice would measure memory.
    return Bank(work / "bank", without=trained_lines(seed=SEED))


@dataclass(frozen=True)
class Asked:
    """Settings of an evaluation, in a form for another process."""

    suite: str
    work: Path
    workers: int
    num_items: int | None
    data: Path | None
    audio_root: Path | None
    cuts_long: bool
    pauses: int | None
    probe: bool
    use_tqdm: bool

    def items(self) -> list[Item]:
        """Draw or read the items."""
        from training.data.sources.downloads import SOUNDS_FOLDER
        from training.evaluation.suites.item import SuiteRequest

        def warn(faults: Sequence[HyperError]) -> None:
            if faults:
                click.echo(f"left out {len(faults)} unusable rows, the first: {faults[0]}", err=True)

        request = SuiteRequest(
            self.num_items,
            lambda split: bank_of(split, self.work, self.workers),
            self.work / "assets" / SOUNDS_FOLDER,
            self.data,
            self.audio_root,
            warn,
        )
        return _suites()[self.suite].items(request)


def _suites() -> Mapping[str, Suite]:
    from training.evaluation.suites import SUITES

    return SUITES


@click.command("eval")
@click.option(
    "--suite",
    cls=RegistryOption,
    registry=_suites,
    default="held-out",
    show_default=True,
    help="Questions to ask. {described}",
)
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("checkpoints/hyper-mini"),
    show_default=True,
    help="Checkpoint to evaluate.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Data set of a suite without items of its own, in any format of `hyper data check`.",
)
@click.option(
    "--audio-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of relative audio paths in --data.  [default: the file's folder]",
)
@click.option(
    "--cut-long",
    "cuts_long",
    is_flag=True,
    help="Use the first 30 s of longer clips.  [default: refuse such clips; their items count as wrong]",
)
@click.option(
    "--url",
    help="Evaluate a running service instead of a checkpoint: a HyPeR service, or with --api openai any server with "
    "OpenAI's chat API and input_audio.",
)
@click.option(
    "--baseline",
    type=click.Choice(["cascade"]),
    help="Evaluate the baseline cascade instead: recogniser, voice activity, speaker clustering, sound tagger and "
    "rules (needs `requirements/install.sh .venv cpu train data baseline`).",
)
@click.option("--api", type=click.Choice(["hyper", "openai"]), default="hyper", show_default=True, help="API of --url.")
@click.option("--model", help="Model name (openai).  [default: the server's first model]")
@click.option("--api-key-env", help="Environment variable with the API key.")
@click.option("--concurrency", type=click.IntRange(1), default=4, show_default=True, help="Concurrent requests.")
@click.option(
    "--timeout", "timeout_s", type=float, default=120.0, show_default=True, help="Timeout of one request in seconds."
)
@click.option("--tries", "num_tries", type=click.IntRange(1), default=6, show_default=True, help="Attempts per item.")
@click.option(
    "--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Maximum tokens of a reply (openai)."
)
@click.option(
    "--instruction", help="Text after the choices (openai).  [default: Answer with the letter and the words ...]"
)
@click.option(
    "--extra-body",
    help="JSON object of additional request fields (openai), such as '{\"skip_special_tokens\": false}' for a HyPeR "
    "checkpoint on vLLM's own server; null removes a field.",
)
@click.option(
    "--probe",
    is_flag=True,
    help="Also measure the effect of pauses on the hidden states of 300 completions.",
)
@click.option("--pauses", type=click.IntRange(0), help="Lower the pause budget.  [default: the checkpoint's]")
@click.option(
    "--items",
    "num_items",
    type=click.IntRange(2),
    help="Number of questions.  [default: 1400 for scenes, all of a data set]",
)
@click.option(
    "--max-minutes",
    type=click.IntRange(1, 60),
    help="Longest recordings of --suite long.  [default: 60]",
)
@click.option(
    "--against",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Compare item by item with the result.json of an earlier run, its folder, or another checkpoint, which is "
    "evaluated first. Repeatable.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for result.json (with each item's outcome), report.md and figures. It also keeps replies of --url, so "
    "an interrupted run resumes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON line instead of a table.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build"),
    show_default=True,
    help="Folder of assets and voices; suites of scenes build missing parts.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=os.cpu_count() or 1,
    show_default="one per core",
    help="Number of processes that build missing voices.",
)
def evaluate(
    suite: str,
    checkpoint: Path,
    data: Path | None,
    audio_root: Path | None,
    cuts_long: bool,
    url: str | None,
    baseline: str | None,
    probe: bool,
    pauses: int | None,
    num_items: int | None,
    max_minutes: int | None,
    against: tuple[Path, ...],
    out: Path | None,
    as_json: bool,
    work: Path,
    workers: int,
    **endpoint_options: Any,
) -> None:
    """Evaluate a checkpoint through vLLM, a running service, or the baseline on a suite of questions.

    Suites of scenes build missing voices first. docs/evaluation.md defines each figure.
    """
    asked = Asked(suite, work, workers, num_items, data, audio_root, cuts_long, pauses, probe, not as_json)
    if _suites()[suite].is_recordings:
        if against or baseline or data or probe or pauses is not None:
            raise click.UsageError(
                f"--suite {suite} takes --checkpoint or --url, --items, --max-minutes, --out, --json"
            )
        ask_recordings(asked, None if url is None else _endpoint(url, **endpoint_options), checkpoint, max_minutes, out)
        return
    if max_minutes is not None:
        raise click.UsageError("--max-minutes needs --suite long")
    if url is not None and baseline is not None:
        raise click.UsageError("--url and --baseline exclude each other; omit one")
    if data is not None and not _suites()[suite].reads_file:
        readers = ", ".join(name for name, each in _suites().items() if each.reads_file)
        raise click.UsageError(f"--suite {suite} has its own items; use --data with {readers}")
    asks_checkpoint = (url is None and baseline is None) or any((path / "hyper.json").is_file() for path in against)
    if pauses is not None and not asks_checkpoint:
        raise click.UsageError("--pauses applies to a --checkpoint; a service has its own budget")
    if probe and (url is not None or baseline is not None):
        raise click.UsageError("--probe needs a --checkpoint; --url and --baseline have no hidden states to measure")
    endpoint = None if url is None else _endpoint(url, **endpoint_options)
    others = [_other_result(path, asked) for path in against]
    items = asked.items()
    if endpoint is not None:
        result = ask_endpoint(endpoint, asked, items, None if out is None else out / KEPT_FILE)
    elif baseline is not None:
        result = ask_cascade(asked, items)
    else:
        result = ask_checkpoint(checkpoint, asked, items)
    _finish(result, others, items, out=out, as_json=as_json)


def ask_checkpoint(checkpoint: Path, asked: Asked, items: list[Item] | None = None) -> dict[str, Any]:
    """Run the items on a checkpoint in this process; without given items, draw them anew."""
    from hyper_model.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    from training.evaluation.runners.checkpoint import answer, time_alone
    from training.evaluation.score import judge, latency, summarize
    from training.rl.rollout import VllmBackend

    items = asked.items() if items is None else items
    backend = VllmBackend(opened)
    gate = backend.gate
    if gate is not None and asked.pauses is not None:
        gate = gate.with_budget(asked.pauses) if asked.pauses else None
    seconds = time_alone(backend, items, gate=gate, cuts_long=asked.cuts_long)
    replies = answer(backend, items, gate=gate, cuts_long=asked.cuts_long, use_tqdm=asked.use_tqdm)
    result = summarize(items, [judge(item, reply) for item, reply in zip(items, replies, strict=True)])
    result |= latency("e2e", seconds)
    if asked.probe:
        from training.evaluation.latent_probe import probe
        from training.evaluation.runners.checkpoint import complete_for_probe

        main = [item for item in items if item.part == "main"]
        completed = complete_for_probe(backend, main, gate=gate, cuts_long=asked.cuts_long)
        result["probe"] = probe(opened, *completed, use_tqdm=asked.use_tqdm)
    result |= {"system": opened.manifest.name, "checkpoint": opened.manifest.name}
    return result | {"manifest_sha256": opened.manifest_sha256, **_about(asked)}


def _endpoint(
    url: str, *, api_key_env: str | None, instruction: str | None, extra_body: str | None, **fields: Any
) -> Endpoint:
    """Check the options of a service."""
    from training.evaluation.runners.http import INSTRUCTION, Endpoint

    try:
        extra = json.loads(extra_body or "{}")
    except ValueError as error:
        raise click.BadParameter(f"not valid JSON ({error})", param_hint="--extra-body") from error
    if not isinstance(extra, dict):
        raise click.BadParameter("must be a JSON object", param_hint="--extra-body")
    api_key = os.environ.get(api_key_env) if api_key_env else None
    if api_key_env and not api_key:
        raise click.BadParameter(f"the environment variable {api_key_env} is not set", param_hint="--api-key-env")
    instruction = INSTRUCTION if instruction is None else instruction
    return Endpoint(url, api_key=api_key, instruction=instruction, extra=extra, **fields)


def ask_endpoint(endpoint: Endpoint, asked: Asked, items: list[Item], kept: Path | None) -> dict[str, Any]:
    """Run the items on a service; if it never writes a trace, score only the answers."""
    from training.evaluation.runners.http import ask
    from training.evaluation.score import judge, summarize

    replies, model = ask(
        endpoint,
        items,
        kept=kept,
        cuts_long=asked.cuts_long,
        use_tqdm=asked.use_tqdm,
        say=lambda text: click.echo(text, err=True),
    )
    reads = "trace" if endpoint.api == "hyper" or any(reply.parsed.texts for reply in replies) else "answer"
    item_scores = [judge(item, reply, reads=reads) for item, reply in zip(items, replies, strict=True)]
    return summarize(items, item_scores) | {"system": model, "url": endpoint.base, **_about(asked)}


def ask_recordings(
    asked: Asked, endpoint: Endpoint | None, checkpoint: Path, max_minutes: int | None, out: Path | None
) -> None:
    """Ask about long recordings: a running service, or one service per way of cutting for a checkpoint."""
    from hyper_model.files import write_whole
    from training.data.scenes import SceneBuilder
    from training.data.sources.downloads import SOUNDS_FOLDER
    from training.evaluation.runners.recordings import Asker, started
    from training.evaluation.suites.long import MINUTES, draw_questions, draw_recording

    builder = SceneBuilder(bank_of("test", asked.work, asked.workers), asked.work / "assets" / SOUNDS_FOLDER, "test")
    lengths = [minutes for minutes in MINUTES if minutes <= (max_minutes or MINUTES[-1])]
    num_per_kind = max(1, (asked.num_items or RECORDING_ITEMS) // (len(lengths) * 5))

    def measure(url: str, *, is_baseline: bool) -> dict[str, Any]:
        asker = Asker(url, None if endpoint is None else endpoint.api_key)
        rates: list[float] = []
        try:
            for minutes in lengths:
                # Short recordings have few questions, so there are more of them.
                for number in range(max(1, min(4, 4 // minutes))):
                    recording = draw_recording(builder, minutes, number)
                    if not is_baseline and minutes == lengths[-1]:
                        rates.append(asker.single_window_rate(recording))
                    asker.measure(recording, draw_questions(recording, num_per_kind), asks_oracle=not is_baseline)
                    if asked.use_tqdm:
                        click.echo(f"{recording.name}: {len(recording.scenes)} scenes", err=True)
            single = {} if is_baseline else {"single_windows_per_s": round(sum(rates) / len(rates), 3)}
            return asker.found.figures() | single | {"decoder_peak_mib": asker.decoder_peak_mib()}
        finally:
            asker.close()

    result: dict[str, Any] = {**_about(asked), "minutes": lengths}
    if endpoint is not None:
        result |= {"system": endpoint.base, **measure(endpoint.url, is_baseline=False)}
    else:
        result["system"] = checkpoint.name
        with started(checkpoint, "quietest") as url:
            result |= measure(url, is_baseline=False)
        with started(checkpoint, "fixed") as url:
            result["fixed_cuts"] = measure(url, is_baseline=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "result.json", json.dumps(result, indent=1) + "\n")
    if asked.use_tqdm:
        for name, value in result.items():
            click.echo(f"{name:<24} {value if isinstance(value, str) else json.dumps(value)}")
    else:
        click.echo(json.dumps(result))


def ask_cascade(asked: Asked, items: list[Item]) -> dict[str, Any]:
    """Run the items on the cascade, and fit it first if necessary."""
    from training.data.sources.downloads import SOUNDS_FOLDER
    from training.evaluation.runners.cascade import Cascade, Fitted, Parts, answer_all, fit
    from training.evaluation.score import judge, summarize

    folder = asked.work / "baseline"
    parts = Parts(folder)
    fitted = Fitted.load(folder / FITTED_FILE)
    if fitted is None:
        bank = bank_of("validation", asked.work, asked.workers)
        fitted = fit(parts, bank, asked.work / "assets" / SOUNDS_FOLDER, use_tqdm=asked.use_tqdm)
        fitted.save(folder / FITTED_FILE)
    replies = answer_all(Cascade(parts, fitted), items, cuts_long=asked.cuts_long, use_tqdm=asked.use_tqdm)
    item_scores = [judge(item, reply, reads="perception") for item, reply in zip(items, replies, strict=True)]
    return summarize(items, item_scores) | {"system": "cascade", "fitted": fitted.measured, **_about(asked)}


def _about(asked: Asked) -> dict[str, Any]:
    split = _suites()[asked.suite].split
    return {"suite": asked.suite} | ({} if split is None else {"split": split})


def _other_result(path: Path, asked: Asked) -> dict[str, Any]:
    """Read an earlier result, or run another checkpoint in a separate process, since an engine cannot be unloaded."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from hyper_model.errors import HyperError
    from training.evaluation.report import RESULT_FILE
    from training.evaluation.score import RESULT_VERSION

    if (path / "hyper.json").is_file():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(ask_checkpoint, path, asked).result()
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        result = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise HyperError(f"--against {path}: neither a checkpoint nor a result ({error})") from error
    if not isinstance(result, dict) or result.get("version") != RESULT_VERSION or "items" not in result:
        raise HyperError(f"--against {path}: not a result of this version with items; create one with --out")
    return result


def _finish(
    result: dict[str, Any], others: list[dict[str, Any]], items: list[Item], *, out: Path | None, as_json: bool
) -> None:
    """Compare, write and print."""
    from hyper_model.errors import HyperError
    from training.evaluation.report import markdown, write
    from training.evaluation.score import differences

    taken = [result["system"]]
    for other in others:
        # Two runs of one checkpoint need different names in the tables.
        if other["system"] in taken:
            other["system"] += f" ({len(taken) + 1})"
        taken.append(other["system"])
    compared: list[dict[str, Any]] = []
    for other in others:
        try:
            compared.append({"system": other["system"], **differences(items, result, other)})
        except ValueError as error:
            raise HyperError(f"--against {other['system']}: {error}") from error
    if compared:
        result["compared"] = compared
    if out is not None:
        write([result, *others], out)
    if as_json:
        click.echo(json.dumps({name: value for name, value in result.items() if name != "items"}))
    else:
        click.echo(markdown([result, *others]))
