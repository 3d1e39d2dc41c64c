"""Rehearse Qwen2-Audio-7B on this machine: real shapes and vocabulary, random weights, the whole service and training.

The parts, in order, each in processes of its own:

1. `loadtests.random_qwen` writes the model in transformers' layout, and `hyper checkpoint adopt` converts it.
2. `hyper serve` answers a question with choices and an open one, streamed, each with a pause.
3. `hyper train` takes one step of Stage I and one of Stage II of the 7B recipes, with adapters, on two layers.

Memory is the anonymous and shared memory of a part's processes, without mapped files. docs/gpu.md explains the figures.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import psutil

from loadtests.client import QA_PATH, EventReader
from loadtests.clips import FreshClips, wav
from loadtests.qwen_shapes import GIBIBYTE, SCALES, Shapes
from loadtests.target import child, environment, serving

TRAINED_LAYERS = 2
CACHE_GIB = 1
MAX_MODEL_LEN = 2_048
"""Context length with a cache of 1 GiB: half a MiB per token."""
MAX_TOKENS = 24
START_TIMEOUT_S = 3_600
ANSWER_TIMEOUT_S = 1_800
SAMPLE_S = 1.0
# Random tokens have a low confidence, so the gate pauses at its first full window and never gives up.
PAUSE: Mapping[str, Any] = {
    "max_pauses": 1,
    "tau_pause": 0.5,
    "tau_abort": 0.0,
    "window_tokens": 8,
    "rest_tokens": 8,
}
# One prefill may take longer than the default silence, after which the service kills an engine. Deadlines follow.
SERVICE: Mapping[str, str] = {
    "HYPER_KV_CACHE_GIB": str(CACHE_GIB),
    "HYPER_MAX_NUM_SEQS": "2",
    "HYPER_HANG_TIMEOUT_S": "1800",
    "HYPER_LOG_LEVEL": "info",
    # The plan is that of bfloat16 weights, and the first compilation takes longer than all answers.
    "HYPER_COMPILE": "off",
    "HYPER_QUANTIZE": "off",
    "HYPER_MAX_TIMEOUT_MS": str(1_000 * ANSWER_TIMEOUT_S),
}
QUESTIONS: Sequence[Mapping[str, Any]] = (
    {"question": "How many people speak?", "choices": ["one", "two", "three", "four"]},
    {"question": "What is said?"},
)
ADAPTERS = (
    'lora={"rank": 16, "alpha": 32}',
    "fsdp=",
    "dtype=bfloat16",
    "autocast=false",
    "num_steps=1",
    "warmup_steps=0",
    "log_every_steps=1",
    "save_every_steps=1",
)
STAGES: Mapping[str, Sequence[str]] = {
    "sft": (*ADAPTERS, "batch_size=2"),
    "grpo": (*ADAPTERS, "batch_size=1", "group_size=2", "max_tokens=16", "max_redraws=0", "max_pauses=1"),
}
COMPLETION = (
    '<THINK><PLANNING>Count the voices.</PLANNING><CAPTION><ENV>quiet</ENV><SPEAKER>S1 woman: "i am late"</SPEAKER>'
    "<ASR>i am late</ASR></CAPTION><REASONING>Only S1 speaks.</REASONING><SUMMARY>One person speaks.</SUMMARY></THINK>"
    "<RESPONSE>one</RESPONSE><FINAL_ANSWER>one</FINAL_ANSWER>"
)


@dataclass(frozen=True)
class Rehearsal:
    """Settings of a rehearsal.

    Attributes:
        layers: Decoder layers of the served model.
        scale: Name of the widths (`qwen_shapes.SCALES`).
        work: Folder of models, runs and the log.
        vocabulary: File of the vocabulary; None for Qwen's.
        trains: Whether the training steps run.
    """

    layers: int
    scale: str
    clips: Path
    work: Path
    vocabulary: Path | None
    trains: bool
    say: Callable[[str], None]

    @property
    def shapes(self) -> Shapes:
        """Return the widths of the model."""
        return SCALES[self.scale]

    @property
    def log(self) -> Path:
        """Return the log file of all processes."""
        return self.work / "rehearse.log"


@dataclass(frozen=True)
class Needs:
    """Memory and disk of a rehearsal, in GiB."""

    service_gib: float
    training_gib: float
    disk_gib: float

    @classmethod
    def of(cls, setup: Rehearsal) -> Needs:
        """Return the needs by the shapes."""
        shapes = setup.shapes
        small_gib = shapes.weights_gib(TRAINED_LAYERS)
        # Stage II holds trainer and engine; logits, adapters and a copy of the adapted weights come with them.
        training_gib = 2 * small_gib + CACHE_GIB + 4.0 if setup.trains else 0.0
        # The source is deleted once it is adopted.
        disk_gib = 2 * shapes.weights_gib(setup.layers) + (2 * small_gib if setup.trains else 0.0) + 0.5
        return cls(shapes.plan_gib(setup.layers, CACHE_GIB), training_gib, disk_gib)

    def require(self, available_gib: float, free_disk_gib: float) -> None:
        """Refuse a rehearsal that does not fit.

        Raises:
            click.ClickException: Memory or disk is short; the message has both numbers and a remedy.
        """
        wanted_gib = max(self.service_gib, self.training_gib)
        if wanted_gib > available_gib:
            raise click.ClickException(
                f"the rehearsal needs {wanted_gib:.1f} GiB of memory and {available_gib:.1f} GiB are available; stop "
                "other programs, or use fewer --layers"
            )
        if self.disk_gib > free_disk_gib:
            raise click.ClickException(
                f"the rehearsal needs {self.disk_gib:.1f} GiB of disk and {free_disk_gib:.1f} GiB are free; use "
                "another --work, or fewer --layers"
            )


@dataclass
class PeakMemory:
    """Largest memory of a process and its descendants, sampled in a thread."""

    pid: int
    peak_bytes: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def sampled(self) -> Iterator[PeakMemory]:
        """Sample until the end of the block."""
        thread = threading.Thread(target=self._sample, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.stopped.set()
            thread.join()

    @property
    def peak_gib(self) -> float:
        """Return the peak in GiB."""
        return round(self.peak_bytes / GIBIBYTE, 2)

    def _sample(self) -> None:
        # The first sample is taken at once: a block can end within one interval.
        while True:
            self.peak_bytes = max(self.peak_bytes, memory_of(self.pid))
            if self.stopped.wait(SAMPLE_S):
                return


def memory_of(pid: int) -> int:
    """Return the anonymous and shared memory of a process and its descendants, in bytes; 0 after its end."""
    try:
        root = psutil.Process(pid)
        pids = [pid, *(process.pid for process in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    anonymous, shared = 0, 0
    for each in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{each}/status").read_text(encoding="ascii", errors="replace").splitlines()
            sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")}
            anonymous += sizes.get("RssAnon", 0)
            # The processes of an engine share their segments.
            shared = max(shared, sizes.get("RssShmem", 0))
    return anonymous + shared


def run(setup: Rehearsal) -> dict[str, Any]:
    """Rehearse; return the figures.

    Raises:
        click.ClickException: The rehearsal does not fit, or a part failed.
    """
    needs = Needs.of(setup)
    setup.work.mkdir(parents=True, exist_ok=True)
    available_gib = psutil.virtual_memory().available / GIBIBYTE
    free_disk_gib = shutil.disk_usage(setup.work).free / GIBIBYTE
    setup.say(
        f"memory: {needs.service_gib:.1f} GiB to serve, {needs.training_gib:.1f} GiB to train; "
        f"{available_gib:.1f} GiB are available"
    )
    setup.say(f"disk: {needs.disk_gib:.1f} GiB; {free_disk_gib:.1f} GiB are free in {setup.work}")
    needs.require(available_gib, free_disk_gib)
    setup.log.write_text("")
    figures: dict[str, Any] = {"layers": setup.layers, "scale": setup.scale}
    served = make_checkpoint(setup, setup.layers)
    figures |= serve(setup, served)
    figures["plan_gib"] = round(needs.service_gib, 2)
    if setup.trains:
        trained = served
        if setup.layers != TRAINED_LAYERS:
            shutil.rmtree(served)
            trained = make_checkpoint(setup, TRAINED_LAYERS)
        figures |= train(setup, trained)
    return figures


def make_checkpoint(setup: Rehearsal, layers: int) -> Path:
    """Return an adopted random model whose gate has a budget, the one of an earlier run if there is one."""
    source, adopted = (setup.work / f"{kind}-{setup.scale}-{layers}" for kind in ("source", "checkpoint"))
    if (adopted / "hyper.json").exists():
        setup.say(f"{adopted} is reused")
    else:
        write_and_adopt(setup, layers, source, adopted)
    # An adopted model has no pauses. `hyper checkpoint calibrate` gives a trained one its budget and thresholds.
    manifest: dict[str, Any] = json.loads((adopted / "hyper.json").read_text(encoding="utf-8"))
    manifest["pause"] |= PAUSE
    manifest["max_model_len"] = MAX_MODEL_LEN
    (adopted / "hyper.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return adopted


def write_and_adopt(setup: Rehearsal, layers: int, source: Path, adopted: Path) -> None:
    """Write a random model and adopt it."""
    shutil.rmtree(source, ignore_errors=True)
    arguments = ["-m", "loadtests.random_qwen", str(source), "--layers", str(layers), "--scale", setup.scale]
    if setup.vocabulary is not None:
        arguments += ["--vocabulary", str(setup.vocabulary)]
    step(setup, f"write {layers} decoder layers", arguments)
    step(setup, "adopt them", [*HYPER, "checkpoint", "adopt", str(source), str(adopted), "--name", "rehearsal"])
    shutil.rmtree(source)


HYPER = ("-m", "hyper_model.cli")


def step(setup: Rehearsal, name: str, arguments: Sequence[str]) -> PeakMemory:
    """Run a Python program to its end; return its peak.

    Raises:
        click.ClickException: The program failed.
    """
    started_s = time.monotonic()
    with child([sys.executable, *arguments], environment(), setup.log) as process, memory(process) as peak:
        code = process.wait()
    if code:
        raise click.ClickException(f"{name}: the program ended with {code}; see {setup.log}")
    setup.say(f"{name}: {time.monotonic() - started_s:.0f} s, {peak.peak_gib:.1f} GiB at most")
    return peak


def memory(process: subprocess.Popen[str]) -> contextlib.AbstractContextManager[PeakMemory]:
    """Sample the memory of a process."""
    return PeakMemory(process.pid).sampled()


def serve(setup: Rehearsal, checkpoint: Path) -> dict[str, Any]:
    """Start the service, ask the questions, and return the figures."""
    clip = base64.b64encode(wav(FreshClips(setup.clips).make(1))).decode()
    started_s = time.monotonic()
    replies: list[dict[str, Any]] = []
    settings = {**SERVICE, "HYPER_CHECKPOINT": str(checkpoint)}
    with serving(setup.log, timeout_s=START_TIMEOUT_S, **settings) as (process, url), memory(process) as peak:
        start_s = time.monotonic() - started_s
        setup.say(f"the service is ready after {start_s:.0f} s")
        for question in QUESTIONS:
            reply = ask(url, {**question, "audio": {"data": clip}})
            setup.say(json.dumps(reply))
            replies.append(reply)
    return {
        "answered": sum(reply["is_answered"] for reply in replies),
        "questions": len(replies),
        "peak_gib": peak.peak_gib,
        "start_s": round(start_s, 1),
        "replies": replies,
    }


def ask(url: str, question: Mapping[str, Any]) -> dict[str, Any]:
    """Ask one question, streamed; return the outcome."""
    timeout_ms = 1_000 * ANSWER_TIMEOUT_S
    body = {**question, "stream": True, "pause": 1, "max_tokens": MAX_TOKENS, "timeout_ms": timeout_ms}
    names: list[str] = []
    last: dict[str, Any] = {}
    reader = EventReader()
    with httpx.stream("POST", url + QA_PATH, json=body, timeout=ANSWER_TIMEOUT_S) as response:
        if response.status_code != 200:
            return {"is_answered": False, "status": response.status_code, "error": response.read().decode()[:500]}
        for chunk in response.iter_bytes():
            for name, data in reader.feed(chunk):
                names.append(name)
                if name in ("done", "error"):
                    last = json.loads(data)
    return outcome(question, names, last)


def outcome(question: Mapping[str, Any], names: Sequence[str], last: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a stream of events shows; choices count as answered with a probability for each."""
    if "done" not in names:
        return {"is_answered": False, "error": last}
    answer: Mapping[str, Any] = last["answer"]
    choices = question.get("choices", ())
    scores = answer.get("scores") or []
    is_scored = not choices or (len(scores) == len(choices) and abs(sum(scores) - 1) < 1e-3)
    return {
        "is_answered": is_scored,
        "events": len(names),
        "choice": answer.get("choice"),
        "termination": last["termination"],
        "format": last["trace"]["format"],
        "pauses": last["pause"]["count"],
        "warnings": [warning["code"] for warning in last["warnings"]],
        "prompt_tokens": last["usage"]["prompt_tokens"],
        "completion_tokens": last["usage"]["completion_tokens"],
        "pause_tokens": last["usage"]["pause_tokens"],
        "first_token_s": _seconds(last["timings_ms"]["first_token"]),
        "total_s": _seconds(last["timings_ms"]["total"]),
    }


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds / 1_000, 1)


def train(setup: Rehearsal, checkpoint: Path) -> dict[str, Any]:
    """Take one step of each stage of the 7B recipes with adapters; return their figures."""
    fresh = FreshClips(setup.clips)
    clip = setup.work / "clip.wav"
    clip.write_bytes(wav(fresh.make(2)))
    row = {"instruction": "<audio>How many people speak?\nA. one\nB. two", "audios": [str(clip)], "output": COMPLETION}
    data = setup.work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for _ in range(4)), encoding="utf-8")
    figures: dict[str, Any] = {}
    for stage, settings in STAGES.items():
        run_dir = setup.work / f"run-{stage}"
        shutil.rmtree(run_dir, ignore_errors=True)
        arguments = [*HYPER, "train", f"qwen2_audio_7b_{stage}", str(run_dir)]
        arguments += ["--base", str(checkpoint), "--data", str(data)]
        arguments += [argument for setting in settings for argument in ("--set", setting)]
        peak = step(setup, f"one step of qwen2_audio_7b_{stage}", arguments)
        lines = (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        for name in ("step_s", "loss", "grad_norm", "gap", "rollout_s", "pauses"):
            found = [row[name] for row in rows if name in row]
            if found:
                figures[f"{stage}_{name}"] = found[0]
        figures[f"{stage}_peak_gib"] = peak.peak_gib
    return figures
