"""Train a policy on perceptual traces: Stage I (method, section 5).

The loss is token-normalised cross entropy on the completion; prompt, audio and latent tokens have no loss. Seed and
step alone determine the sequences of a step, so a resumed run continues with the same sequences. This module depends on
no synthesizer, scene audio or engine.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from hyper_model.audio_encoder import LogMel, num_audio_tokens
from hyper_model.errors import HyperError
from hyper_model.files import replacing
from hyper_model.trace import PauseMode, Section, TraceTokenizer, add_position_tokens, render_choice
from training.data.clips import Clip, ClipKind, open_clips
from training.data.examples import Example, Order, read_clip
from training.data.questions import draw_example
from training.data.sources.downloads import MissingDataError
from training.data.text_scenes import SceneWriter
from training.export import RunModel
from training.policy import Row, pack
from training.recipes import SftRecipe
from training.sft.tokens import Encoded, Spans, build_tokenizer, canonical_completion, encode_sequence, in_style
from training.trainer import PolicyTrainer, TrainingError

ENCODER_WIDTH = 384
"""Width of the encoder states in built clips: Whisper tiny.en's."""
_WINDOW_STEPS = 8
_TOKENIZER_CLIPS = 6_000
_READ = -1
"""Key of a sequence without a clip."""
_ASR_END = Section.ASR.tags[1]


class Sequences(Protocol):
    """A source of Stage I sequences."""

    is_encoded: bool

    def lengths(self, step: int) -> list[tuple[int, int]]:
        """List the sequences of a step: a key for `draw` and an approximate length each."""
        ...

    def draw(self, key: int, step: int, rng: random.Random) -> tuple[Encoded, torch.Tensor]:
        """Return a sequence and its clip, as encoder states [A, D] or log-mel."""
        ...


class ClipSequences:
    """Sequences from prebuilt, encoded clips, with a new question at each use.

    Args:
        scenes, speech: Clips of both kinds; without speech clips, all sequences are scenes.
        writer: Source of scenes without audio; required if `read_size` of the recipe is above 0.
    """

    is_encoded = True

    def __init__(
        self,
        scenes: Sequence[Clip],
        speech: Sequence[Clip],
        tokenizer: TraceTokenizer,
        recipe: SftRecipe,
        writer: SceneWriter | None = None,
    ) -> None:
        if not scenes and not speech:
            raise MissingDataError("no clips to train on: build them first (make scenes)")
        self.clips = [*scenes, *speech]
        self.tokenizer, self.recipe, self.writer = tokenizer, recipe, writer
        if recipe.read_size and recipe.trace_style != "explicit":
            raise TrainingError(f"{recipe.trace_style} traces have nothing to read: read_size must be 0")
        self.num_scenes = len(scenes)
        self.scene_order = Order(max(1, len(scenes)), f"{recipe.seed}/scenes")
        self.speech_order = Order(max(1, len(speech)), f"{recipe.seed}/speech")
        # Number of speech sequences before each window; it grows on demand.
        self.num_before = [0]

    def _num_speech(self, window: int) -> int:
        if self.num_scenes in (0, len(self.clips)):
            return 0 if self.num_scenes else self.recipe.batch_size * _WINDOW_STEPS
        share = self._moved(self.recipe.speech_share, window * _WINDOW_STEPS)
        return round(share * self.recipe.batch_size * _WINDOW_STEPS)

    def _moved(self, ends: tuple[float, float], step: int) -> float:
        first, last = ends
        return first + (last - first) * min(1.0, step / max(1, self.recipe.num_steps))

    def lengths(self, step: int) -> list[tuple[int, int]]:
        """List the clips of a step, then its scenes without audio.

        Clips are sorted by length within a window of eight steps, since padding costs time.
        """
        window, place = divmod(step, _WINDOW_STEPS)
        while len(self.num_before) <= window:
            self.num_before.append(self.num_before[-1] + self._num_speech(len(self.num_before) - 1))
        size = self.recipe.batch_size * _WINDOW_STEPS
        before, count = self.num_before[window], self._num_speech(window)
        keys = [self.num_scenes + self.speech_order[before + i] for i in range(count)]
        keys += [self.scene_order[window * size - before + i] for i in range(size - count)]
        keys.sort(key=lambda key: self.clips[key].num_tokens)
        batches = [keys[i : i + self.recipe.batch_size] for i in range(0, size, self.recipe.batch_size)]
        random.Random(f"{self.recipe.seed}/window/{window}").shuffle(batches)
        clips = [(key, self.clips[key].num_tokens) for key in batches[place]]
        return clips + [(_READ, 0)] * self.recipe.read_size

    def draw(self, key: int, step: int, rng: random.Random) -> tuple[Encoded, torch.Tensor]:
        """Draw a question about a clip and blank a few of its states, or draw a scene without audio."""
        recipe = self.recipe
        assert recipe.decoder is not None
        spans = Spans(recipe.pause_share, recipe.decoder.latent_tokens, PauseMode(recipe.pause_mode))
        if key == _READ:
            assert self.writer is not None
            example = self.writer.draw(rng)
            completion = in_style(example.trace, recipe.trace_style)
            encoded = encode_sequence(
                self.tokenizer, example.question, example.choices, completion, spans=spans, rng=rng, is_read=True
            )
            return encoded, torch.zeros(1, ENCODER_WIDTH, dtype=torch.bfloat16)
        clip = self.clips[key]
        example = draw_example(clip.scene, rng)
        completion = in_style(example.trace, recipe.trace_style)
        is_cut = key >= self.num_scenes and rng.random() < self._moved(recipe.cut_share, step)
        is_cut &= _ASR_END in completion
        if is_cut:
            completion = completion[: completion.index(_ASR_END) + len(_ASR_END)]
        encoded = encode_sequence(
            self.tokenizer,
            example.question,
            example.choices,
            completion,
            spans=spans,
            rng=rng,
            is_cut=is_cut,
            wrong_words=recipe.wrong_words,
        )
        states_AD = clip.states(ENCODER_WIDTH).clone()
        for _ in range(round(recipe.dropout_states * len(states_AD) / 3)):
            start = rng.randrange(len(states_AD))
            states_AD[start : start + 3] = 0.0
        return encoded, states_AD


@dataclass(eq=False)
class ExampleSequences:
    """Sequences from a data set with gold completions; clips are decoded at each use and never cached.

    Attributes:
        examples: Rows with a completion.
        latent_tokens, pause_mode: The checkpoint's settings.
        answers_by_letter: The checkpoint's form of a choice answer.
        max_model_len: Context length of the checkpoint in tokens, clip included.
    """

    examples: Sequence[Example]
    tokenizer: TraceTokenizer
    recipe: SftRecipe
    latent_tokens: int
    pause_mode: PauseMode
    answers_by_letter: bool
    max_model_len: int
    log_mel: LogMel
    is_encoded = False

    def __post_init__(self) -> None:
        if not self.examples:
            raise MissingDataError("no example with a gold completion to train on")
        self.order = Order(len(self.examples), f"{self.recipe.seed}/examples")

    def lengths(self, step: int) -> list[tuple[int, int]]:
        """List the rows of a step; the lengths of their clips are unknown, so they are 0."""
        first = step * self.recipe.batch_size
        return [(self.order[first + i], 0) for i in range(self.recipe.batch_size)]

    def draw(self, key: int, step: int, rng: random.Random) -> tuple[Encoded, torch.Tensor]:
        """Decode the clip of a row and encode its gold completion.

        Raises:
            HyperError: The clip or the completion is unreadable, or both together are too long; the message names the
                row.
        """
        example = self.examples[key]
        waveform = read_clip(example)
        answer = example.answer
        if example.choices and self.answers_by_letter:
            answer = render_choice(example.choices.index(answer), example.choices)
        try:
            completion = canonical_completion(example.completion or "", answer, self.recipe.trace_style)
            spans = Spans(self.recipe.pause_share, self.latent_tokens, self.pause_mode)
            encoded = encode_sequence(
                self.tokenizer, example.question, example.choices, completion, spans=spans, rng=rng
            )
            # The clip's tokens replace one AUDIO id.
            num_tokens = len(encoded.token_ids) - 1 + num_audio_tokens(len(waveform.samples_S))
            if num_tokens > self.max_model_len:
                raise HyperError(
                    f"question, clip and completion take {num_tokens} tokens; the checkpoint takes {self.max_model_len}"
                )
        except HyperError as error:
            raise HyperError(f"{example.source}: {error}") from error
        return encoded, self.log_mel(waveform.samples_S)


class SftTrainer(PolicyTrainer):
    """Trainer of Stage I by cross entropy, the mean over all targets of a step on all ranks."""

    recipe: SftRecipe

    def __init__(
        self, model: RunModel, recipe: SftRecipe, run_dir: Path, sequences: Sequences, *, num_workers: int = 0
    ) -> None:
        self.sequences = sequences
        super().__init__(model, recipe, run_dir, num_workers=num_workers)

    def make_step(self, step: int) -> list[tuple[Encoded, torch.Tensor]]:
        """Draw this rank's share of a step: every n-th of the sequences sorted by length."""
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed}/step/{step}")
        keys = [(key, rng.getrandbits(32)) for key, _ in self.sequences.lengths(step)]
        mine = keys[self.args.process_index :: self.args.world_size]
        return [self.sequences.draw(key, step, random.Random(seed)) for key, seed in mine]

    def micro_batches(self, prepared: list[tuple[Encoded, torch.Tensor]]) -> list[dict[str, Any]]:
        """Pack the sequences of a step into batches of `rows_at_once` rows."""
        share = 1.0 / self.sum_over_ranks(sum(encoded.weight for encoded, _ in prepared))
        at_once = self.recipe.rows_at_once
        batches: list[dict[str, Any]] = []
        if self.sequences.is_encoded:
            # Padding costs time.
            prepared = sorted(prepared, key=lambda pair: len(pair[0].token_ids) + len(pair[1]))
        for start in range(0, len(prepared), at_once):
            pairs = prepared[start : start + at_once]
            rows = [Row(e.token_ids, e.targets, e.audio_at, clip) for clip, (e, _) in enumerate(pairs)]
            batch = pack(
                rows,
                [clip for _, clip in pairs],
                pad_id=self.run_model.tokenizer.end_of_text_id,
                is_encoded=self.sequences.is_encoded,
            )
            weights_N = None
            if any(encoded.weights for encoded, _ in pairs):
                weights_N = torch.tensor([weight for encoded, _ in pairs for weight in encoded.weights or ()])
            batches.append({"batch": batch, "share": share, "weights_N": weights_N})
        return batches

    def micro_loss(self, model: Any, micro: dict[str, Any]) -> torch.Tensor:
        """Return the weighted cross entropy of a batch as a share of the step's mean."""
        logprobs_N = model(**micro["batch"]).logprobs_N
        if micro["weights_N"] is not None:
            logprobs_N = logprobs_N * micro["weights_N"].to(logprobs_N.device)
        return -logprobs_N.sum() * micro["share"]


def train_tokenizer_on(clips: Sequence[Clip], recipe: SftRecipe, file: Path, more: Iterable[str] = ()) -> None:
    """Train and write the tokenizer of a run from scratch; an existing file stays.

    Args:
        more: Further texts, such as the open texts of the clips.
    """
    if file.exists():
        return
    assert recipe.decoder is not None
    rng = random.Random(recipe.seed)
    picked = rng.sample(clips, min(_TOKENIZER_CLIPS, len(clips)))
    examples = (draw_example(clip.scene, rng) for clip in picked)
    tokenizer = build_tokenizer(examples, recipe.decoder.vocab_size, more)
    if recipe.decoder.has_position_tokens:
        add_position_tokens(tokenizer, recipe.decoder.latent_tokens)
    with replacing(file) as partial:
        tokenizer.save(str(partial))


def read_clips(folder: Path, *kinds: ClipKind) -> list[Clip]:
    """Open the built clips of a folder, optionally of some kinds only."""
    return [clip for kind in kinds or (None,) for clip in open_clips(folder, ENCODER_WIDTH, kind=kind)]
