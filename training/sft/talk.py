"""Sequences of a pretrained decoder behind Whisper base: transcripts of talk, traces of scenes, and reading.

A talk sequence has any question about a clip, since a transcript must not depend on the question. Its trace ends after
ASR, or, in a share of the sequences, after an answer. A scene sequence has a question about the scene and a whole
trace. A reading sequence has no audio. Its perception is input, and the answer is the target.

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
from training.data.clips import BASE_ENCODER_WIDTH, CLIPS_PER_SHARD, Clip, ClipKind, first_seed, open_clips
from training.data.encoder import ClipEncoder
from training.data.examples import Order
from training.data.reading import Reader, ask, wordings
from training.data.scenes import Scene
from training.recipes import SftRecipe
from training.sft.hints import draw_hint
from training.sft.tokens import Encoded, Spans, encode_sequence

_WINDOW_STEPS = 8
_READ = -1
"""Key of a reading sequence."""
_FIRST_SCENE = 1 << 40
"""Key of the first scene; a smaller key is the index of a talk clip."""
_ASR_END = Section.ASR.tags[1]
# An answer must follow from the transcript; traces of talk have no voices and no background.
_ANSWERED_KINDS = frozenset({"free", "word", "order", "last", "after", "mentioned", "absent"})


class ClipsByIndex:
    """Clips of one kind by index, read from shards if available, else drawn and encoded.

    Args:
        folder: Folder of the shards.
        draw: Return truth and audio of a seed; None if all clips come from shards.
        encode: The encoder for drawn clips.
    """

    def __init__(
        self,
        folder: Path,
        kind: ClipKind,
        draw: Callable[[int], tuple[Scene, np.ndarray]] | None = None,
        encode: ClipEncoder | None = None,
    ) -> None:
        self.folder, self.draw, self.encode = folder, draw, encode
        self.kind: ClipKind = kind
        self.shards: dict[int, list[Clip]] = {}

    def __getitem__(self, index: int) -> tuple[Scene, torch.Tensor]:
        """Return the truth and the encoder's states [A, D] of a clip.

        Raises:
            KeyError: No shard has the clip, and drawing is disabled.
        """
        shard, place = divmod(index, CLIPS_PER_SHARD)
        if shard not in self.shards:
            clips = list(open_clips(self.folder, BASE_ENCODER_WIDTH, kind=self.kind, shard=shard))
            if clips:
                self.shards[shard] = clips
        if shard in self.shards:
            clip = self.shards[shard][place]
            return clip.scene, clip.states(BASE_ENCODER_WIDTH)
        if self.draw is None or self.encode is None:
            raise KeyError(f"no {self.kind} shard in {self.folder} holds clip {index}")
        scene, samples_S = self.draw(first_seed(self.kind, "train") + index)
        return scene, self.encode(samples_S).bfloat16()


class TalkSequences:
    """Talk, scene and reading sequences; the first pass over the clips is in order, later ones are shuffled.

    Args:
        clips: Source of the talk.
        reader: Source of reading sequences; unused if `read_size` of the recipe is 0.
        scenes: Source of the scenes; required if `scene_share` of the recipe is above 0.
        stack: Number of encoder rows per audio token.
        latent_tokens: Length of a latent span.
    """

    is_encoded = True

    def __init__(
        self,
        clips: ClipsByIndex,
        tokenizer: TraceTokenizer,
        recipe: SftRecipe,
        reader: Reader,
        *,
        scenes: ClipsByIndex | None = None,
        stack: int,
        latent_tokens: int,
    ) -> None:
        assert recipe.talk is not None and (scenes is not None or not recipe.talk.scene_share)
        self.clips, self.scenes, self.tokenizer, self.recipe, self.reader = clips, scenes, tokenizer, recipe, reader
        self.talk, self.stack = recipe.talk, stack
        self.spans = Spans(recipe.pause_share, latent_tokens, PauseMode(recipe.pause_mode))
        self.order = Order(self.talk.num_clips, f"{recipe.seed}/talk")
        self.scene_order = Order(max(1, self.talk.num_scenes), f"{recipe.seed}/scenes")
        self.window, self.held = -1, dict[int, tuple[Scene, torch.Tensor]]()

    def _hold(self, window: int) -> dict[int, tuple[Scene, torch.Tensor]]:
        """Return the clips of a window by key; keys of scenes follow those of talk."""
        size, talk = self.recipe.batch_size * _WINDOW_STEPS, self.talk
        num_scenes = round(talk.scene_share * size)
        held: dict[int, tuple[Scene, torch.Tensor]] = {}
        for i in range(size - num_scenes):
            place = window * (size - num_scenes) + i
            index = talk.first_clip + (place if place < talk.num_clips else self.order[place])
            held[index] = self.clips[index]
        for i in range(num_scenes):
            assert self.scenes is not None
            place = window * num_scenes + i
            index = talk.first_scene + (place if place < talk.num_scenes else self.scene_order[place])
            held[_FIRST_SCENE + index] = self.scenes[index]
        return held

    def lengths(self, step: int) -> list[tuple[int, int]]:
        """List the clips of a step, then its reading sequences.

        The clips of eight steps are drawn together and sorted by length, since padding costs time.
        """
        window, place = divmod(step, _WINDOW_STEPS)
        if window != self.window:
            self.window, self.held = window, self._hold(window)
        keys = sorted(self.held, key=lambda key: (key >= _FIRST_SCENE, len(self.held[key][1]), key))
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
                section_weights=self.recipe.section_weights,
            )
            return encoded, torch.zeros(1, self.stack * BASE_ENCODER_WIDTH, dtype=torch.bfloat16)
        scene, states_AD = self.held[key]
        is_scene = key >= _FIRST_SCENE
        question, choices, completion, is_cut = self._ask_scene(scene, rng) if is_scene else self._ask(scene, rng)
        encoded = encode_sequence(
            self.tokenizer,
            question,
            choices,
            completion,
            spans=self.spans,
            rng=rng,
            is_cut=is_cut,
            targets_from=Section.ASR if is_cut else None,
            wrong_words=self.recipe.wrong_words,
            section_weights=self.recipe.section_weights,
            context=self._hint(scene, rng),
        )
        stacked_AD = stack_rows(states_AD, [len(states_AD)], self.stack)[0].clone()
        stacked_AD[torch.tensor([rng.random() < self.recipe.dropout_states for _ in range(len(stacked_AD))])] = 0.0
        return encoded, stacked_AD

    def _hint(self, scene: Scene, rng: random.Random) -> str:
        """Draw a context for a share of the clips; its wrong words come from another clip of the window."""
        if rng.random() >= self.talk.hint_share:
            return ""
        return draw_hint(scene.transcript, self.held[rng.choice(sorted(self.held))][0].transcript, rng)

    def _ask_scene(self, scene: Scene, rng: random.Random) -> tuple[str, tuple[str, ...], str, bool]:
        """Draw (question, choices, completion, is_cut) for a scene: any question, and the whole trace."""
        example = ask(scene, rng, wordings())
        return example.question, example.choices, render(example.trace), False

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
        cut = text[: text.index(_ASR_END) + len(_ASR_END)]
        if rng.random() < self.talk.foreign_share:
            # Choices must not replace words of the clip, so these belong to another one.
            other = ask(self.held[rng.choice(sorted(self.held))][0], rng, found)
            return other.question, other.choices, cut, True
        return rng.choice(found["anything"]), (), cut, True
