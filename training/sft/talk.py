"""Sequences for the alignment of a pretrained decoder with the audio encoder: transcripts of talk, and reading.

A talk sequence has any question about a clip, since a transcript must not depend on the question. Its trace ends after
ASR, or, in a share of the sequences, after an answer. A reading sequence has no audio. Its perception is input, and the
answer is the target.

A clip is a function of its index, so a shard on disk only saves the time for drawing and encoding it again.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hyper_model.audio_encoder import stack_rows
from hyper_model.trace import PauseMode, Section, Trace, TraceTokenizer, render
from training.data.clips import BASE_ENCODER_WIDTH, CLIPS_PER_SHARD, Clip, first_seed, open_clips
from training.data.encoder import ClipEncoder
from training.data.examples import Order
from training.data.reading import Reader, ask, wordings
from training.data.scenes import Scene
from training.recipes import SftRecipe
from training.sft.tokens import Encoded, Spans, encode_sequence

_WINDOW_STEPS = 8
_READ = -1
"""Key of a reading sequence."""
_ASR_END = Section.ASR.tags[1]
# An answer must follow from the transcript; traces of talk have no voices and no background.
_ANSWERED_KINDS = frozenset({"free", "word", "order", "last", "after", "mentioned", "absent"})


class TalkClips:
    """Clips of talk by index, read from shards if available, else drawn and encoded.

    Args:
        folder: Folder of the shards.
        draw: Return truth and audio of a seed; None if all clips come from shards.
        encode: The encoder for drawn clips.
    """

    def __init__(
        self,
        folder: Path,
        draw: Callable[[int], tuple[Scene, np.ndarray]] | None = None,
        encode: ClipEncoder | None = None,
    ) -> None:
        self.folder, self.draw, self.encode = folder, draw, encode
        self.shards: dict[int, list[Clip]] = {}

    def __getitem__(self, index: int) -> tuple[Scene, torch.Tensor]:
        """Return the truth and the encoder's states [A, D] of a clip.

        Raises:
            KeyError: No shard has the clip, and drawing is disabled.
        """
        shard, place = divmod(index, CLIPS_PER_SHARD)
        if shard not in self.shards:
            clips = list(open_clips(self.folder, BASE_ENCODER_WIDTH, kind="talk", shard=shard))
            if clips:
                self.shards[shard] = clips
        if shard in self.shards:
            clip = self.shards[shard][place]
            return clip.scene, clip.states(BASE_ENCODER_WIDTH)
        if self.draw is None or self.encode is None:
            raise KeyError(f"no shard in {self.folder} holds clip {index}")
        scene, samples_S = self.draw(first_seed("talk", "train") + index)
        return scene, self.encode(samples_S).bfloat16()


class TalkSequences:
    """Talk and reading sequences; the first pass over the clips is in order, later ones are shuffled.

    Args:
        clips: Source of the clips.
        reader: Source of reading sequences; unused if `read_size` of the recipe is 0.
        stack: Number of encoder rows per audio token.
        latent_tokens: Length of a latent span.
    """

    is_encoded = True

    def __init__(
        self,
        clips: TalkClips,
        tokenizer: TraceTokenizer,
        recipe: SftRecipe,
        reader: Reader,
        *,
        stack: int,
        latent_tokens: int,
    ) -> None:
        assert recipe.talk is not None
        self.clips, self.tokenizer, self.recipe, self.reader = clips, tokenizer, recipe, reader
        self.talk, self.stack = recipe.talk, stack
        self.spans = Spans(recipe.pause_share, latent_tokens, PauseMode(recipe.pause_mode))
        self.order = Order(self.talk.num_clips, f"{recipe.seed}/talk")
        self.window, self.held = -1, dict[int, tuple[Scene, torch.Tensor]]()

    def _index(self, place: int) -> int:
        return place if place < self.talk.num_clips else self.order[place]

    def lengths(self, step: int) -> list[tuple[int, int]]:
        """List the clips of a step, then its reading sequences.

        The clips of eight steps are drawn together and sorted by length, since padding costs time.
        """
        window, place = divmod(step, _WINDOW_STEPS)
        size = self.recipe.batch_size * _WINDOW_STEPS
        if window != self.window:
            indices = [self._index(window * size + i) for i in range(size)]
            self.window, self.held = window, {index: self.clips[index] for index in indices}
        keys = sorted(self.held, key=lambda index: (len(self.held[index][1]), index))
        batches = [keys[i : i + self.recipe.batch_size] for i in range(0, len(keys), self.recipe.batch_size)]
        random.Random(f"{self.recipe.seed}/window/{window}").shuffle(batches)
        clips = [(key, len(self.held[key][1])) for key in batches[place % len(batches)]]
        return clips + [(_READ, 0)] * self.recipe.read_size

    def draw(self, key: int, step: int, rng: random.Random) -> tuple[Encoded, torch.Tensor]:
        """Draw a question about a clip and blank a few of its states, or draw a reading sequence."""
        if key == _READ:
            example = self.reader.draw(rng)
            encoded = encode_sequence(
                self.tokenizer,
                example.question,
                example.choices,
                render(example.trace),
                spans=self.spans,
                rng=rng,
                is_read=True,
            )
            return encoded, torch.zeros(1, self.stack * BASE_ENCODER_WIDTH, dtype=torch.bfloat16)
        scene, states_AD = self.held[key]
        question, choices, completion, is_cut = self._ask(scene, rng)
        encoded = encode_sequence(
            self.tokenizer, question, choices, completion, spans=self.spans, rng=rng, is_cut=is_cut
        )
        stacked_AD = stack_rows(states_AD, [len(states_AD)], self.stack)[0].clone()
        stacked_AD[torch.tensor([rng.random() < self.recipe.dropout_states for _ in range(len(stacked_AD))])] = 0.0
        return encoded, stacked_AD

    def _ask(self, scene: Scene, rng: random.Random) -> tuple[str, tuple[str, ...], str, bool]:
        """Draw (question, choices, completion, is_cut) for a clip."""
        found = wordings()
        trace = Trace(transcript=scene.transcript)
        if rng.random() < self.talk.answer_share and scene.turns:
            example = ask(scene, rng, found)
            if example.kind in _ANSWERED_KINDS:
                answered = Trace(transcript=scene.transcript, response=example.answer, final_answer=example.answer)
                return example.question, example.choices, render(answered), False
        text = render(trace)
        return rng.choice(found["anything"]), (), text[: text.index(_ASR_END) + len(_ASR_END)], True
