"""Recordings of tones that stand for words, and an engine that writes down the tones of each window."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

import numpy as np

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.errors import HyperError
from hyper_model.trace import Speaker, Trace, TraceTokenizer, render
from server.engines.protocol import Clip, GenerationRequest, ScriptedEngine, TokenChunk
from server.engines.scripted import scripted_checkpoint

WORDS: Mapping[str, int] = {"alpha": 300, "bravo": 500, "charlie": 700, "delta": 900, "echo": 1100, "foxtrot": 1300}
WORD_S = 0.5
FAILING_HZ = 2500
"""A window with this tone fails in the engine."""

FRAME = SAMPLE_RATE_HZ // 10
HUM = 0.01


def place(samples_S: np.ndarray, at_s: float, hertz: int, length_s: float = WORD_S) -> None:
    """Add a tone."""
    times_S = np.arange(int(length_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    start = round(at_s * SAMPLE_RATE_HZ)
    samples_S[start : start + len(times_S)] += (0.3 * np.sin(2 * np.pi * hertz * times_S)).astype(np.float32)


def recording(duration_s: float, words: Sequence[tuple[float, str]], failing_s: float | None = None) -> np.ndarray:
    """Return words at their times, in silence."""
    samples_S = np.zeros(round(duration_s * SAMPLE_RATE_HZ), np.float32)
    for at_s, word in words:
        place(samples_S, at_s, WORDS[word])
    if failing_s is not None:
        place(samples_S, failing_s, FAILING_HZ)
    return samples_S


def tones_of(samples_S: Clip) -> list[int]:
    """Return the tones of a window, one entry per run of frames."""
    found: list[int] = []
    last = 0
    for start in range(0, len(samples_S) - FRAME + 1, FRAME):
        frame_S = samples_S[start : start + FRAME]
        hertz = 0
        if np.mean(np.square(frame_S)) > 1e-3:
            hertz = 10 * int(np.argmax(np.abs(np.fft.rfft(frame_S))))
        if hertz and hertz != last:
            found.append(hertz)
        last = hertz
    return found


def words_of(samples_S: Clip) -> list[str]:
    """Return the words of a window."""
    names = {hertz: word for word, hertz in WORDS.items()}
    return [names[hertz] for hertz in tones_of(samples_S) if hertz in names]


def script(clips: Sequence[Clip], tokenizer: TraceTokenizer) -> list[int]:
    """Write the words of a window as its transcript."""
    words = " ".join(words_of(np.concatenate(clips)))
    trace = Trace(
        planning="Read the tones.",
        environment="rain" if "echo" in words else "quiet",
        speakers=(Speaker("S1", "voice", (words,)),) if words else (),
        transcript=words,
        reasoning="Each tone is a word.",
        summary=words or "nothing",
        response=words or "nothing",
        final_answer=words or "nothing",
    )
    return [*tokenizer.encode_trace(render(trace)), tokenizer.im_end_id]


class ToneEngine(ScriptedEngine):
    """Engine that knows the tones of a window.

    Attributes:
        num_asked: Windows asked so far.
        most_at_once: Largest number of windows in the engine at once.
        gate: Holds all requests while it is not set.
    """

    def __init__(self) -> None:
        super().__init__(scripted_checkpoint().tokenizer, script=script)
        self.lengths: list[int] = []
        self.most_at_once = 0
        self.gate = asyncio.Event()
        self.gate.set()

    @property
    def num_asked(self) -> int:
        """Return the number of windows asked so far."""
        return len(self.lengths)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Write the words of the window, or fail."""
        self.lengths.append(len(request.clips[0]))
        if FAILING_HZ in tones_of(request.clips[0]):
            raise HyperError("This window makes the engine fail.")
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                self.most_at_once = max(self.most_at_once, self.num_in_flight)
                await self.gate.wait()
                yield chunk

    async def score(self, request: GenerationRequest, candidates: Sequence[Sequence[int]]) -> list[float]:
        """Prefer the candidate whose words are in the window."""
        words = set(words_of(request.clips[0]))
        lines = re.findall(r"^([A-Z])\. (.+)$", self.tokenizer.decode(request.prompt_token_ids), re.M)
        texts = dict(lines)
        letters = [self.tokenizer.decode(candidate).strip()[:1] for candidate in candidates]
        return [0.0 if words & set(texts[letter].split()) else -3.0 for letter in letters]
