"""Plan the load: clips, questions and arrival times, all drawn before the first request.

Everything follows from a seed, so a run is reproducible. Of HTTP, only the form's encoding is used.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from loadtests.client import Question
from loadtests.clips import FreshClips, wav

CLIP_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".webm"})
QUESTIONS = (
    "What is in the background?",
    "How many people speak?",
    "What is said?",
    "Which sounds can be heard, and in what order?",
)
CUT_SECONDS = (0.5, 2.0, 5.0, 8.0)
CUTS_PER_LENGTH = 12
BOUNDARY = "hyper-loadtest-4f1c9d"
RECENT = 20
"""Number of recent clips for follow-up questions."""


@dataclass(frozen=True)
class Mix:
    """Shares of client behaviour, each drawn independently per request.

    Attributes:
        stream: Replies as events.
        cancel: Clients leaving before the answer, after a drawn time of at most `cancel_within_s`.
        follow_up: Questions about a recent clip.
        batch: Requests of the class `batch`.
        cut: Clips cut from the recordings, 0.5 to 8 s long; the others are the unchanged files.
    """

    stream: float = 0.5
    cancel: float = 0.0
    cancel_within_s: float = 2.0
    follow_up: float = 0.3
    batch: float = 0.0
    cut: float = 0.7
    fields: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Planned:
    """A request with its due time, in seconds after the start."""

    due_s: float
    question: Question


class Clips:
    """The clips of a run: unchanged files of a folder, and cuts of several lengths from its recordings.

    Raises:
        FileNotFoundError: The folder has no audio file.
    """

    def __init__(self, folder: Path) -> None:
        self.files = [(path.name, path.read_bytes()) for path in find_clips(folder)]
        self.cuts: list[tuple[str, bytes]] = []
        for seconds in CUT_SECONDS:
            try:
                fresh = FreshClips(folder, seconds)
            except FileNotFoundError:
                continue
            self.cuts += [(f"cut{seconds:g}-{n}.wav", wav(fresh.make(n))) for n in range(CUTS_PER_LENGTH)]

    def draw(self, rng: random.Random, cut: float) -> tuple[str, bytes]:
        """Draw a clip; return its name and bytes."""
        return rng.choice(self.cuts if self.cuts and rng.random() < cut else self.files)


def find_clips(directory: Path) -> list[Path]:
    """Return the audio files of a directory, sorted by name.

    Raises:
        FileNotFoundError: There are none.
    """
    clips = sorted(path for path in directory.iterdir() if path.suffix.lower() in CLIP_SUFFIXES)
    if not clips:
        raise FileNotFoundError(f"no audio file in {directory} ({', '.join(sorted(CLIP_SUFFIXES))})")
    return clips


def arrivals(rate_per_s: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    """Yield the times of a Poisson process; gaps are independent of the requests' outcomes."""
    due_s = rng.expovariate(rate_per_s)
    while due_s < duration_s:
        yield due_s
        due_s += rng.expovariate(rate_per_s)


def plan(clips: Clips, mix: Mix, rate_per_s: float, duration_s: float, seed: int) -> list[Planned]:
    """Draw every request of a run: due time, clip, form fields and time of cancellation."""
    rng = random.Random(f"{seed} {rate_per_s} {duration_s}")
    form = cache(multipart)
    recent: list[tuple[str, bytes]] = []
    planned: list[Planned] = []
    for number, due_s in zip(itertools.count(), arrivals(rate_per_s, duration_s, rng), strict=False):
        is_follow_up = bool(recent) and rng.random() < mix.follow_up
        name, clip = rng.choice(recent) if is_follow_up else clips.draw(rng, mix.cut)
        recent = [*recent, (name, clip)][-RECENT:]
        is_stream = rng.random() < mix.stream
        fields = {"question": QUESTIONS[number % len(QUESTIONS)], "stream": str(is_stream).lower(), **mix.fields}
        headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
        if rng.random() < mix.batch:
            headers["x-hyper-priority"] = "batch"
        leaves_s = rng.uniform(0, mix.cancel_within_s) if rng.random() < mix.cancel else None
        body = form(name, clip, tuple(fields.items()))
        planned.append(Planned(due_s, Question(body, headers, is_stream, leaves_s)))
    return planned


def multipart(name: str, clip: bytes, fields: Sequence[tuple[str, str]]) -> bytes:
    """Encode a form with one file in advance; the encoder of an HTTP client would run during the measurement."""
    parts = [
        f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{field}"\r\n\r\n{value}\r\n'.encode()
        for field, value in fields
    ]
    head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
    parts += [head.encode(), b"content-type: application/octet-stream\r\n\r\n", clip, b"\r\n"]
    return b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()])
