"""Ask a service about long recordings, and compare its answers, places and words with the truth.

The service is a running one, or one per way of cutting that this module starts for a checkpoint. All figures come from
replies and from `/metrics`, so they are those of a user.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import soundfile
from rapidfuzz.distance import Levenshtein

from hyper_model.audio import SAMPLE_RATE_HZ, WINDOW_S
from hyper_model.errors import HyperError
from hyper_model.proxies import is_local
from training.data.truth import Truth
from training.evaluation.suites.long import KINDS, LongQuestion, LongRecording
from training.text_metrics import words

READY_TIMEOUT_S = 900.0
REQUEST_TIMEOUT_S = 1800.0
NEAR_S = 2.0
"""Words within this time of a cut are near it."""

NUM_SINGLE = 24
SINGLE_AT_ONCE = 12
"""Requests of one window, and how many at once, to measure the rate without recordings."""

_SETTINGS = {
    "HYPER_SYNC_WINDOWS": "1000",
    "HYPER_MAX_RECORDING_S": "4000",
    "HYPER_MAX_AUDIO_BYTES": str(256 * 2**20),
    "HYPER_UPLOAD_TIMEOUT_S": "600",
    "HYPER_RECORDING_DECODE_TIMEOUT_S": "300",
    "HYPER_DEFAULT_TIMEOUT_MS": "1700000",
    "HYPER_MAX_TIMEOUT_MS": "1800000",
}
"""Limits of the started service: an hour in one request, which users send as a job."""


@dataclass
class Found:
    """Outcomes of all questions so far.

    Attributes:
        right: Outcome of each question by length and kind.
        recalled, oracle, cited: Outcomes of the questions with a meaning for them.
        near, elsewhere: Word errors and words.
        lost_s: Seconds in no answered window.
        windows, seconds: Answered windows and the seconds of the first request per recording.
    """

    right: dict[tuple[int, str], list[bool]] = field(default_factory=lambda: defaultdict(list))
    recalled: list[bool] = field(default_factory=list[bool])
    oracle: list[bool] = field(default_factory=list[bool])
    with_window: list[bool] = field(default_factory=list[bool])
    cited: list[bool] = field(default_factory=list[bool])
    near: list[int] = field(default_factory=lambda: [0, 0])
    elsewhere: list[int] = field(default_factory=lambda: [0, 0])
    lost_s: float = 0.0
    windows: int = 0
    seconds: float = 0.0
    first_answer_s: list[float] = field(default_factory=list[float])
    next_answer_s: list[float] = field(default_factory=list[float])
    by_code: int = 0

    def figures(self) -> dict[str, Any]:
        """Return the figures of a report."""
        lengths = sorted({minutes for minutes, _ in self.right})
        every = [outcome for outcomes in self.right.values() for outcome in outcomes]
        return {
            "num_questions": len(every),
            "accuracy": share(every),
            "accuracy_by_minutes": {
                str(minutes): share(
                    [each for (length, _), found in self.right.items() if length == minutes for each in found]
                )
                for minutes in lengths
            },
            "accuracy_by_kind": {
                kind: share([each for (_, other), found in self.right.items() if other == kind for each in found])
                for kind in KINDS
            },
            "answered_by_code": share([True] * self.by_code + [False] * (len(every) - self.by_code)),
            "recall_at_4": share(self.recalled),
            "oracle_window_accuracy": share(self.oracle),
            "accuracy_beside_oracle": share(self.with_window),
            "cited_times_hold_truth": share(self.cited),
            "wer_near_cuts": rate(self.near),
            "wer_elsewhere": rate(self.elsewhere),
            "num_words_near_cuts": self.near[1],
            "windows_per_s": round(self.windows / self.seconds, 3) if self.seconds else None,
            "first_answer_s": median(self.first_answer_s),
            "next_answer_s": median(self.next_answer_s),
            "lost_seconds": round(self.lost_s, 3),
        }


def share(outcomes: Sequence[bool]) -> float | None:
    """Return the share of true outcomes; None without any."""
    return round(sum(outcomes) / len(outcomes), 4) if outcomes else None


def rate(errors_and_words: Sequence[int]) -> float | None:
    """Return errors per word; None without words."""
    errors, num_words = errors_and_words
    return round(errors / num_words, 4) if num_words else None


def median(seconds: Sequence[float]) -> float | None:
    """Return the median; None without values."""
    return round(statistics.median(seconds), 3) if seconds else None


@contextlib.contextmanager
def started(checkpoint: Path, cuts: str) -> Iterator[str]:
    """Run a service with a checkpoint and a way of cutting, and return its address once it is ready.

    Raises:
        HyperError: It ends, or is not ready in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        **_SETTINGS,
        "HYPER_CHECKPOINT": str(checkpoint.resolve()),
        "HYPER_PORT": str(port),
        "HYPER_RECORDING_CUTS": cuts,
    }
    command = [sys.executable, "-m", "hyper_model.cli", "serve"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise HyperError(f"the service for {checkpoint} did not become ready; try `hyper serve` to see why")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def is_ready(url: str) -> bool:
    """Return whether the service accepts requests."""
    try:
        return httpx.get(f"{url}/readyz", timeout=5, trust_env=not is_local(url)).is_success
    except httpx.HTTPError:
        return False


class Asker:
    """Asks one service, and collects the outcomes.

    Args:
        url: Address of the service.
        api_key: Its key, if it needs one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.base = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.client = httpx.Client(headers=headers, timeout=REQUEST_TIMEOUT_S, trust_env=not is_local(url))
        self.found = Found()

    def measure(self, recording: LongRecording, questions: Sequence[LongQuestion], *, asks_oracle: bool = True) -> None:
        """Ask all questions about a recording, and compare the replies with the truth."""
        clip = flac(recording.samples_S)
        timeline: list[Mapping[str, Any]] = []
        for number, question in enumerate(questions):
            started_s = time.perf_counter()
            reply = self.ask(clip, question, long_audio="chunk")
            seconds = time.perf_counter() - started_s
            timeline = reply["timeline"]
            if number == 0:
                asked = [each for each in timeline if each["status"] != "silent"]
                self.found.windows += len(asked) + sum(each["relistened"] for each in timeline)
                self.found.seconds += seconds
                self.found.first_answer_s.append(seconds)
                self.compare_words(recording, timeline)
            else:
                self.found.next_answer_s.append(seconds)
            self.compare(recording, question, reply)
            if asks_oracle and question.kind in ("needle", "absence") and question.times and len(timeline) > 1:
                self.ask_oracle(clip, question, reply)

    def compare(self, recording: LongRecording, question: LongQuestion, reply: Mapping[str, Any]) -> None:
        """Compare one reply with the truth."""
        found, answer = self.found, reply["answer"]
        is_right = answer["choice"] == question.truth.answer
        found.right[recording.minutes, question.kind].append(is_right)
        found.by_code += answer["answered_by"] == "timeline"
        relistened = [each for each in reply["timeline"] if each["relistened"]]
        if question.kind in ("needle", "absence") and question.times and relistened:
            found.recalled.append(any(overlaps(each, question.times) for each in relistened))
        if is_right and question.times and answer["evidence"]:
            found.cited.append(overlaps(answer["evidence"][0], question.times))

    def ask_oracle(self, clip: bytes, question: LongQuestion, reply: Mapping[str, Any]) -> None:
        """Ask the window that holds the truth, with its place given."""
        middle_s = statistics.fmean(question.times[0])
        start_s = next(each["start_s"] for each in reversed(reply["timeline"]) if each["start_s"] <= middle_s)
        oracle = self.ask(clip, question, long_audio="window", start_s=start_s)
        self.found.oracle.append(oracle["answer"]["choice"] == question.truth.answer)
        self.found.with_window.append(reply["answer"]["choice"] == question.truth.answer)

    def compare_words(self, recording: LongRecording, timeline: Sequence[Mapping[str, Any]]) -> None:
        """Count word errors near cuts and elsewhere, and seconds in no window.

        A line's words are spread evenly over its turn. Words are compared window by window.
        """
        spoken = [
            (turn.start_s + (turn.end_s - turn.start_s) * (place + 0.5) / len(line), word)
            for turn in recording.turns
            if (line := words(turn.line.text))
            for place, word in enumerate(line)
        ]
        cuts = [each["end_s"] for each in timeline[:-1]]
        covered_s, last_s = 0.0, 0.0
        for window in timeline:
            start_s = max(window["start_s"], last_s)
            if window["status"] != "failed":
                covered_s += window["end_s"] - start_s
            last_s = max(last_s, window["end_s"])
            here = [(at_s, word) for at_s, word in spoken if start_s <= at_s < window["end_s"]]
            written = words(window["transcript"] or "")
            wrong = [0] * max(1, len(here))
            for edit in Levenshtein.editops([word for _, word in here], written):
                wrong[min(edit.src_pos, len(wrong) - 1)] += 1
            for (at_s, _), errors in zip(here, wrong, strict=False):
                is_near = any(abs(at_s - cut_s) <= NEAR_S for cut_s in cuts)
                counts = self.found.near if is_near else self.found.elsewhere
                counts[0] += errors
                counts[1] += 1
            if not here:
                self.found.elsewhere[0] += len(written)
        self.found.lost_s += len(recording.samples_S) / SAMPLE_RATE_HZ - covered_s

    def single_window_rate(self, recording: LongRecording) -> float:
        """Return windows per second as single requests, each a different part of a recording."""
        size = round(WINDOW_S * SAMPLE_RATE_HZ * 0.8)
        last = max(1, len(recording.samples_S) - size)
        starts = np.linspace(0, last, NUM_SINGLE, dtype=int)
        clips = [flac(recording.samples_S[start : start + size]) for start in starts]
        question = LongQuestion("single", Truth("What is said?", ""))

        def ask(clip: bytes) -> None:
            self.ask(clip, question, pause="off")

        with ThreadPoolExecutor(SINGLE_AT_ONCE) as pool:
            started_s = time.perf_counter()
            list(pool.map(ask, clips))
            return NUM_SINGLE / (time.perf_counter() - started_s)

    def ask(self, clip: bytes, question: LongQuestion, **fields: Any) -> Mapping[str, Any]:
        """Post one question.

        Raises:
            HyperError: The service refuses it.
        """
        data = {"question": question.truth.question, "choices": list(question.truth.choices), **fields}
        files = {"file": ("clip.flac", clip)}
        try:
            reply = self.client.post(f"{self.base}/v1/audio/qa", data=data, files=files)
        except httpx.HTTPError as error:
            raise HyperError(f"{self.base}: {error or type(error).__name__}") from error
        if not reply.is_success:
            raise HyperError(f"{self.base}: {reply.status_code} {reply.text[:300]}")
        return reply.json()

    def decoder_peak_mib(self) -> float | None:
        """Return the largest memory of a decoder process; None if the metrics are not readable."""
        reply = self.client.get(f"{self.base}/metrics")
        match = re.search(r"^hyper_decode_peak_bytes (\S+)$", reply.text, re.M)
        return round(float(match[1]) / 2**20, 1) if match else None

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def overlaps(window: Mapping[str, Any], times: Sequence[tuple[float, float]]) -> bool:
    """Return whether a window holds a part of any of the times."""
    return any(window["start_s"] < end_s and start_s < window["end_s"] for start_s, end_s in times)


def flac(samples_S: np.ndarray) -> bytes:
    """Return samples as a FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, samples_S, SAMPLE_RATE_HZ, format="FLAC")
    return file.getvalue()
