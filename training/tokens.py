"""Turns an example into token ids, loss mask and audio position: the training side of the one prompt builder.

Knows nothing of models; the tokenizer is the checkpoint's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from hyper_model.trace import Section, TraceTokenizer, build_prompt, render, train_tokenizer
from training.lines import SLOTS, draw_line
from training.questions import SceneExample

IGNORED = -100
"""Label of a position without loss: the prompt, the audio and every latent token."""

# Where the trace says what is hard to hear: a pause stands right after the opening tag.
_PAUSE_SECTIONS = (Section.SPEAKER, Section.ENV)


@dataclass(frozen=True)
class Sequence:
    """One training sequence; the single AUDIO id is still to be replaced by the clip's states.

    `labels` is already shifted: `labels[t]` is the token that position t must predict.
    """

    token_ids: list[int]
    labels: list[int]
    audio_position: int


def encode_example(tokenizer: TraceTokenizer, example: SceneExample, *, latent_tokens: int) -> Sequence:
    """Encode prompt and completion, with the example's pauses, ended by the end-of-turn token."""
    prompt = build_prompt(tokenizer, example.question, example.choices)
    completion = [*tokenizer.encode_trace(render(example.trace)), tokenizer.im_end_id]
    assert tokenizer.pause_id is not None
    is_latent = [False] * len(completion)
    for section in _PAUSE_SECTIONS[: example.num_pauses]:
        at = completion.index(tokenizer.tag_ids[section][0]) + 1
        completion[at:at] = [tokenizer.pause_id] * latent_tokens
        is_latent[at:at] = [True] * latent_tokens
    token_ids = prompt + completion
    targets = [IGNORED] * len(prompt) + [
        IGNORED if latent else token for token, latent in zip(completion, is_latent, strict=True)
    ]
    return Sequence(token_ids, [*targets[1:], IGNORED], prompt.index(tokenizer.audio_id))


def _texts(examples: Iterator[SceneExample]) -> Iterator[str]:
    for example in examples:
        yield "\n".join((example.question, *example.choices))
        yield render(example.trace).replace("<", " <").replace(">", "> ")
    rng = random.Random(0)
    for words in SLOTS.values():
        # Every word of the vocabulary occurs often enough, bare and after a space, to become one token.
        yield from (word for word in words for _ in range(20))
        yield from (f"a {word} b" for word in words for _ in range(20))
    for _ in range(20_000):
        yield draw_line(rng).text


def build_tokenizer(examples: Iterator[SceneExample], vocab_size: int) -> Tokenizer:
    """Train the embedded checkpoint's byte-level BPE on the questions, traces and lines of the training split."""
    return train_tokenizer(_texts(examples), vocab_size)
