"""Stage I: teaches a policy to write the perceptual trace (method, section 5).

Plain token-normalised cross entropy on the completion; prompt, audio and latent tokens carry none. What a step sees
depends on the seed and the step alone, so a resumed run goes on with the very sequences that it would have seen.
Knows nothing of synthesizers, scenes' sound or the engine.
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
from hyper_model.trace import PauseMode, Section, TraceTokenizer, add_position_tokens, render_choice
from training.data.clips import Clip, ClipKind, open_clips
from training.data.examples import Example, Order, read_clip
from training.data.questions import draw_example
from training.data.sources.downloads import MissingDataError
from training.data.text_scenes import SceneWriter
from training.export import RunModel
from training.policy import IGNORED, Row, pack
from training.recipes import SftRecipe
from training.sft.tokens import Encoded, Spans, build_tokenizer, canonical_completion, encode_sequence, in_style
from training.trainer import PolicyTrainer, TrainingError

ENCODER_WIDTH = 384
"""Width of the states that built clips hold: Whisper tiny.en's."""
_WINDOW_STEPS = 8
_TOKENIZER_CLIPS = 6_000
_READ = -1
"""The key of a sequence without a clip."""
_ASR_END = Section.ASR.tags[1]


class Sequences(Protocol):
    """Draws what Stage I trains on."""

    is_encoded: bool

    def lengths(self, step: int) -> list[tuple[int, int]]:
        """Lists a step's sequences: what `draw` takes, and about how long each is."""
        ...

    def draw(self, key: int, step: int, rng: random.Random) -> tuple[Encoded, torch.Tensor]:
        """Returns a sequence and its clip: the encoder's states, or its log-mel."""
        ...


class ClipSequences:
    """Draws from clips that were built and encoded before: a question of its own about each, whenever it is seen.

    Args:
        scenes, speech: Clips of both kinds; without the second all are scenes.
        writer: Draws what is only read; needed where the recipe wants any (`read_size`).
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
        # Speech sequences before each window; it grows as windows are asked for.
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
        """Lists a step's clips, then what is read; clips are sorted by length inside a window of eight steps.

        Padding costs time.
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
        heard = [(key, self.clips[key].num_tokens) for key in batches[place]]
        return heard + [(_READ, 0)] * self.recipe.read_size

    def draw(self, key: int, step: int, rng: random.Random) -> tuple[Encoded, torch.Tensor]:
        """Asks a question about a clip, and blanks a few of its states; or about a scene that nobody hears."""
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
    """Draws from a data set with gold completions; clips are decoded when they are needed, and never kept.

    Attributes:
        examples: Rows that have a completion.
        latent_tokens, pause_mode: The checkpoint's.
        answers_by_letter: How the checkpoint writes its choice.
        max_model_len: Positions that the checkpoint serves, the clip's included.
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
        """Lists a step's rows; how long their clips are nobody knows yet."""
        first = step * self.recipe.batch_size
        return [(self.order[first + i], 0) for i in range(self.recipe.batch_size)]

    def draw(self, key: int, step: int, rng: random.Random) -> tuple[Encoded, torch.Tensor]:
        """Decodes a row's clip and encodes its gold completion.

        Raises:
            HyperError: The clip or the completion cannot be read, or both are too long; the message names the row.
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
            # The clip's tokens take the place of one.
            num_tokens = len(encoded.token_ids) - 1 + num_audio_tokens(len(waveform.samples_S))
            if num_tokens > self.max_model_len:
                raise HyperError(
                    f"question, clip and completion take {num_tokens} tokens; the checkpoint takes {self.max_model_len}"
                )
        except HyperError as error:
            raise HyperError(f"{example.source}: {error}") from error
        return encoded, self.log_mel(waveform.samples_S)


class SftTrainer(PolicyTrainer):
    """Trains on sequences by cross entropy, the mean over all targets of a step on all ranks."""

    recipe: SftRecipe

    def __init__(
        self, model: RunModel, recipe: SftRecipe, run_dir: Path, sequences: Sequences, *, num_workers: int = 0
    ) -> None:
        self.sequences = sequences
        super().__init__(model, recipe, run_dir, num_workers=num_workers)

    def make_step(self, step: int) -> list[tuple[Encoded, torch.Tensor]]:
        """Draws this rank's sequences of a step: every n-th of those sorted by length."""
        recipe = self.recipe
        rng = random.Random(f"{recipe.seed}/step/{step}")
        keys = [(key, rng.getrandbits(32)) for key, _ in self.sequences.lengths(step)]
        mine = keys[self.args.process_index :: self.args.world_size]
        return [self.sequences.draw(key, step, random.Random(seed)) for key, seed in mine]

    def micro_batches(self, prepared: list[tuple[Encoded, torch.Tensor]]) -> list[dict[str, Any]]:
        """Packs as many sequences as are in memory together."""
        num_targets = sum(target != IGNORED for encoded, _ in prepared for target in encoded.targets)
        share = 1.0 / self.sum_over_ranks(num_targets)
        at_once = self.recipe.rows_at_once
        found: list[dict[str, Any]] = []
        if self.sequences.is_encoded:
            # Padding costs time.
            prepared = sorted(prepared, key=lambda pair: len(pair[0].token_ids) + len(pair[1]))
        for start in range(0, len(prepared), at_once):
            some = prepared[start : start + at_once]
            rows = [Row(e.token_ids, e.targets, e.audio_at, clip) for clip, (e, _) in enumerate(some)]
            batch = pack(
                rows,
                [clip for _, clip in some],
                pad_id=self.run_model.tokenizer.end_of_text_id,
                is_encoded=self.sequences.is_encoded,
            )
            found.append({"batch": batch, "share": share})
        return found

    def micro_loss(self, model: Any, micro: dict[str, Any]) -> torch.Tensor:
        """Returns the batch's cross entropy as a share of the step's mean."""
        return -model(**micro["batch"]).logprobs_N.sum() * micro["share"]


def train_tokenizer_on(clips: Sequence[Clip], recipe: SftRecipe, file: Path, more: Iterable[str] = ()) -> None:
    """Writes the tokenizer of a run that begins from nothing; one that is there stays.

    Args:
        more: Further texts, such as the open ones that clips are spoken from.
    """
    if file.exists():
        return
    assert recipe.decoder is not None
    rng = random.Random(recipe.seed)
    picked = rng.sample(clips, min(_TOKENIZER_CLIPS, len(clips)))
    examples = (draw_example(clip.scene, rng) for clip in picked)
    partial = file.with_suffix(".partial")
    tokenizer = build_tokenizer(examples, recipe.decoder.vocab_size, more)
    if recipe.decoder.has_position_tokens:
        add_position_tokens(tokenizer, recipe.decoder.latent_tokens)
    tokenizer.save(str(partial))
    partial.replace(file)


def read_clips(folder: Path, *kinds: ClipKind) -> list[Clip]:
    """Opens the built clips of a folder, or those of some kinds."""
    return [clip for kind in kinds or (None,) for clip in open_clips(folder, ENCODER_WIDTH, kind=kind)]
