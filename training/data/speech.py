"""Draw speech clips: one voice with a few lines of open text, or silence; a share passes through channels.

Scenes train speaker and background perception; speech clips train word recognition. A clip is an ordinary `Scene`.
"""

from __future__ import annotations

import random

import numpy as np
import soxr

from hyper_model.audio import SAMPLE_RATE_HZ, mix
from training.data.channels import degrade
from training.data.scenes import NUM_OTHER_LINES, Scene, SceneBuilder, SceneSpeaker, Turn, tilt_spectrum
from training.data.sources import recordings as sounds
from training.data.sources.sentences import line_from_text
from training.data.sources.voices import Voice

# Weights apply to engines, since there are many formant voices and few of real speakers. Formant voices have the lowest
# weight: the frozen encoder's own decoder gets half of their words wrong (docs/LOG.md).
_ENGINE_WEIGHTS = {"kokoro": 28, "hibari": 28, "flite": 28, "espeak": 16}
_SILENT_SHARE = 0.06
_QUIET_SHARE = 0.6
_DEGRADED_SHARE = 1 / 3
_OPEN_SHARE = 0.88
# Scenes have up to seven turns. A model trained on at most two lines repeated itself in 7 % of scenes. Nearly all of
# them had 20 or more words (docs/LOG.md).
_NUM_LINES, _NUM_LINES_WEIGHTS = (1, 2, 3, 4, 5), (40, 24, 16, 12, 8)
_LONGEST_S = 15.0


class SpeechBuilder(SceneBuilder):
    """Source of speech clips of one split, drawn and rendered from a voice bank and recordings."""

    def _draw_voice(self, rng: random.Random) -> Voice:
        by_engine: dict[str, list[Voice]] = {}
        for voice in self.voices:
            by_engine.setdefault(voice.engine, []).append(voice)
        engine = rng.choices(list(by_engine), [_ENGINE_WEIGHTS[name] for name in by_engine])[0]
        return rng.choice(by_engine[engine])

    def _draw_lines(self, rng: random.Random, voice: Voice) -> list[tuple[str, np.ndarray]]:
        """Draw one to five different lines of a voice at equal speed and tilt, at most `_LONGEST_S` together."""
        is_training = self.split == "train"
        speed = rng.uniform(0.9, 1.12) if is_training else 1.0
        tilt = rng.uniform(-0.4, 0.4) if is_training else 0.0
        lines: list[tuple[str, np.ndarray]] = []
        num_samples = 0
        for _ in range(rng.choices(_NUM_LINES, _NUM_LINES_WEIGHTS)[0]):
            utterance, samples_S = self.draw_utterance(rng, voice.name, is_open=rng.random() < _OPEN_SHARE)
            if any(text == utterance.text for text, _ in lines):
                continue
            if tilt:
                samples_S = tilt_spectrum(samples_S, tilt)
            if abs(speed - 1.0) > 0.01:
                samples_S = soxr.resample(samples_S, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ / speed, quality="MQ")
            num_samples += len(samples_S)
            if lines and num_samples > _LONGEST_S * SAMPLE_RATE_HZ:
                break
            lines.append((utterance.text, samples_S))
        return lines

    @staticmethod
    def _place(rng: random.Random, lines: list[tuple[str, np.ndarray]]) -> tuple[tuple[Turn, ...], np.ndarray]:
        """Place lines one after the other with silence around them; without lines, return 1 to 6 s of silence."""
        cursor_s = rng.uniform(0.05, 0.6)
        turns: list[Turn] = []
        for text, samples_S in lines:
            end_s = cursor_s + len(samples_S) / SAMPLE_RATE_HZ
            turns.append(Turn("S1", line_from_text(text), cursor_s, end_s))
            cursor_s = end_s + rng.uniform(0.1, 0.9)
        duration_s = turns[-1].end_s + rng.uniform(0.05, 0.6) if turns else rng.uniform(1.0, 6.0)
        speech_S = np.zeros(int(duration_s * SAMPLE_RATE_HZ), np.float32)
        for turn, (_, samples_S) in zip(turns, lines, strict=True):
            begin = int(turn.start_s * SAMPLE_RATE_HZ)
            speech_S[begin : begin + len(samples_S)] += samples_S[: len(speech_S) - begin]
        return tuple(turns), speech_S

    def draw(self, seed: int) -> tuple[Scene, np.ndarray]:
        """Draw one clip and its audio, float32 [S]."""
        rng = random.Random(f"speech/{seed}")
        is_silent = rng.random() < _SILENT_SHARE
        voice = self._draw_voice(rng)
        turns, speech_S = self._place(rng, [] if is_silent else self._draw_lines(rng, voice))
        num_samples = len(speech_S)

        label, recording, snr_db = sounds.QUIET, None, None
        mixture_S = speech_S
        if rng.random() >= (0.45 if is_silent else _QUIET_SHARE):
            label = rng.choice(list(self.recordings))
            background_S, recording = self.draw_background(rng, label, num_samples)
            if not background_S.any():
                label, recording = sounds.QUIET, None
            elif turns:
                snr_db = rng.uniform(5.0, 20.0)
                mixture_S = mix(speech_S, background_S, snr_db)
            else:
                mixture_S = background_S / max(1e-6, float(np.sqrt(np.mean(background_S**2)))) * 0.05
        channel = None
        if self.split == "train" and rng.random() < _DEGRADED_SHARE and mixture_S.any():
            mixture_S, channel = degrade(mixture_S, rng)
        mixture_S = self._set_level(rng, mixture_S)
        scene = Scene(
            seed=seed,
            split=self.split,
            environment=label,
            recording=recording,
            snr_db=snr_db,
            speakers=(SceneSpeaker("S1", voice.name, voice.sex),) if turns else (),
            turns=turns,
            background_line=None,
            has_overlap=False,
            duration_s=num_samples / SAMPLE_RATE_HZ,
            other_lines=self.draw_other_lines(rng, {t.line.text for t in turns}, NUM_OTHER_LINES) if turns else (),
            channel=channel,
        )
        return scene, mixture_S

    @staticmethod
    def _set_level(rng: random.Random, samples_S: np.ndarray) -> np.ndarray:
        """Add a noise floor (white to brown, 25 to 60 dB below speech) and set the level of the sum."""
        floor = np.random.default_rng(rng.randrange(2**32)).standard_normal(len(samples_S))
        color = rng.uniform(0.0, 1.0)
        spectrum = np.fft.rfft(floor)
        spectrum[1:] /= np.arange(1, len(spectrum)) ** color
        spectrum[0] = 0.0
        floor = np.fft.irfft(spectrum, len(samples_S))
        floor /= max(1e-9, float(np.sqrt(np.mean(floor**2))))
        level = float(np.sqrt(np.mean(samples_S**2)))
        if level:
            mixture_S = samples_S / level + floor * 10 ** (-rng.uniform(25, 60) / 20)
            mixture_S = (mixture_S * 10 ** (rng.uniform(-36, -16) / 20)).astype(np.float32)
        else:
            mixture_S = (floor * 10 ** (rng.uniform(-80, -34) / 20)).astype(np.float32)
        peak = float(np.abs(mixture_S).max())
        return mixture_S * np.float32(0.98 / peak) if peak > 0.98 else mixture_S
