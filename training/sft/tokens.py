"""Encode examples as token ids and targets, with the prompt builder of the service.

This module depends on no model; the tokenizer belongs to the checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from tokenizers import Tokenizer

from hyper_model.errors import HyperError
from hyper_model.manifest import GATED_SECTIONS
from hyper_model.trace import PauseMode, Section, Trace, TraceTokenizer, build_prompt, render, train_tokenizer
from hyper_model.trace_parser import TraceFormat, parse_text
from training.data.questions import SceneExample
from training.data.sources.sentences import SLOTS, draw_line
from training.policy import IGNORED
from training.recipes import TraceStyle

MAX_SPANS = 3
"""Maximum number of spans in a training sequence; the useful range of the paper."""

_OF_WORDS = (Section.SPEAKER, Section.ASR)


@dataclass(frozen=True)
class Encoded:
    """One training sequence; the clip's states still have to replace the single AUDIO id.

    `targets` is already shifted: `targets[t]` is the token to predict at position t.

    Attributes:
        weights: Weight of each target that is not ignored, in order; None gives each the weight 1.
    """

    token_ids: list[int]
    targets: list[int]
    audio_at: int
    weights: list[float] | None = None

    @property
    def weight(self) -> float:
        """Return the sum of the weights of the targets."""
        return float(sum(target != IGNORED for target in self.targets)) if self.weights is None else sum(self.weights)


@dataclass(frozen=True)
class Spans:
    """Settings of latent spans in training sequences.

    Attributes:
        share: Share of sequences with spans.
        latent_tokens: Length of a span, without the two tags of a sampled span.
    """

    share: float
    latent_tokens: int
    mode: PauseMode = PauseMode.PARALLEL

    def draw(self, tokenizer: TraceTokenizer, words: Sequence[int], rng: random.Random) -> list[int]:
        """Return the tokens of a span.

        A sampled span holds the model's own future text, unknown at this point. The next words of the trace would teach
        the model to repeat an always correct draft. Words of the prompt in random order therefore fill the span; they
        carry no new information.

        Args:
            words: The prompt's tokens without special tokens.
        """
        assert tokenizer.pause_id is not None
        if self.mode is PauseMode.PARALLEL:
            return [*tokenizer.position_ids] or [tokenizer.pause_id] * self.latent_tokens
        assert tokenizer.pause_close_id is not None
        return [tokenizer.pause_id, *rng.choices(words, k=self.latent_tokens), tokenizer.pause_close_id]


def encode_sequence(
    tokenizer: TraceTokenizer,
    question: str,
    choices: Sequence[str],
    trace: str,
    *,
    spans: Spans,
    rng: random.Random,
    is_cut: bool = False,
    is_read: bool = False,
    targets_from: Section | None = None,
    wrong_words: float = 0.0,
    section_weights: Mapping[str, float] | None = None,
    context: str = "",
) -> Encoded:
    """Encode prompt and completion with the end-of-turn token, and insert latent spans in a share of the sequences.

    A span stands at a possible position of the gate: anywhere inside sections with pauses. The model does not choose
    it, so its tokens are no targets. The closing tag of a sampled span is no target either, since the gate forces it.
    The last token of the span predicts the next token.

    Args:
        is_cut: The trace is only a beginning; it gets no end-of-turn token and teaches no end.
        targets_from: The first section with targets; its opening tag and everything before it are no targets. A trace
            without its first sections then teaches no such form.
        is_read: The scene has no audio; the contents of CAPTION are input but no targets.
        wrong_words: Share of corrupted input words (`SftRecipe.wrong_words`); their targets stay correct.
        section_weights: Weights of the targets (`SftRecipe.section_weights`).
        context: Context in the prompt (`trace.build_prompt`).
    """
    prompt = build_prompt(tokenizer, question, choices, context=context)
    completion = tokenizer.encode_trace(trace) + ([] if is_cut else [tokenizer.im_end_id])
    words = [token_id for token_id in prompt if token_id not in tokenizer.special_ids]
    token_ids, targets = [*prompt], [IGNORED] * len(prompt)
    opened = set(_draw_places(tokenizer, completion, rng)) if rng.random() < spans.share else set()
    misheard = _misheard(tokenizer, completion, wrong_words, rng) if wrong_words else {}
    caption_open, caption_close = tokenizer.tag_ids[Section.CAPTION]
    first_target = 0 if targets_from is None else completion.index(tokenizer.tag_ids[targets_from][0]) + 1
    weight_of = section_weights or {}
    weights: list[float] = []
    sections = list(_sections(tokenizer, completion))
    is_inside = False
    for place, token_id in enumerate(completion):
        if place in opened:
            span = spans.draw(tokenizer, words, rng)
            token_ids += span
            targets += [IGNORED] * len(span)
        token_ids.append(misheard.get(place, token_id))
        is_ignored = place < first_target or (is_read and is_inside)
        targets.append(IGNORED if is_ignored else token_id)
        if not is_ignored:
            section = sections[place]
            weights.append(1.0 if section is None else weight_of.get(section.value, 1.0))
        is_inside = token_id == caption_open or (is_inside and token_id != caption_close)
    audio_at = prompt.index(tokenizer.audio_id)
    return Encoded(token_ids, [*targets[1:], IGNORED], audio_at, weights if section_weights else None)


def _sections(tokenizer: TraceTokenizer, completion: Sequence[int]) -> Iterator[Section | None]:
    """Yield the innermost open section at each token; a closing tag belongs to its section."""
    opening = {ids[0]: section for section, ids in tokenizer.tag_ids.items()}
    closing = {ids[1] for ids in tokenizer.tag_ids.values()}
    open_sections: list[Section] = []
    for token_id in completion:
        yield open_sections[-1] if open_sections else None
        if token_id in opening:
            open_sections.append(opening[token_id])
        elif token_id in closing and open_sections:
            open_sections.pop()


def _draw_places(tokenizer: TraceTokenizer, completion: Sequence[int], rng: random.Random) -> list[int]:
    """Draw positions for spans; half of them are the first of a section, the place of most uncertainty."""
    opening = {ids[0] for ids in tokenizer.tag_ids.values()}
    first: list[int] = []
    inside: list[int] = []
    for place, section in enumerate(_sections(tokenizer, completion)):
        if section in GATED_SECTIONS:
            (first if completion[place - 1] in opening else inside).append(place)
    pools = [pool for pool in (first, inside) if pool]
    return [rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, MAX_SPANS))] if pools else []


def _misheard(tokenizer: TraceTokenizer, completion: Sequence[int], share: float, rng: random.Random) -> dict[int, int]:
    """Draw wrong words for the transcript: position -> token of another position in the trace.

    Tokens of the same trace mislead a decoder with only its last words as a guide: it would continue at the other
    position. It learns to use the clip instead.
    """
    word_places = [
        place
        for place, section in enumerate(_sections(tokenizer, completion))
        if section in _OF_WORDS and completion[place] not in tokenizer.special_ids
    ]
    return {place: completion[rng.choice(word_places)] for place in word_places if rng.random() < share}


def in_style(trace: Trace, style: TraceStyle) -> str:
    """Render a trace in a style; every style parses, only `explicit` as strict.

    `short` has no CAPTION but keeps PLANNING, REASONING, SUMMARY and a reflection. `direct` answers at once; its
    RESPONSE is the answer alone. Both keep the tags of THINK, possibly empty: the weak form begins with them, so
    parser, rewards and service accept every style as a trace.
    """
    if style == "explicit":
        return render(trace)
    if style == "short":
        reduced = replace(trace, environment=None, speakers=(), transcript=None, description=None)
    else:
        answer = trace.response if trace.final_answer is None else trace.final_answer
        reduced = Trace(response=None if trace.response is None else answer, final_answer=trace.final_answer)
    text = render(reduced)
    opening, closing = Section.THINK.tags
    return text if text.startswith(opening) else opening + closing + text


def canonical_completion(text: str, answer: str, style: TraceStyle = "explicit") -> str:
    """Render a data set's gold completion in the trained grammar, with the answer as shown in prompts.

    A weak trace (such as R1-AQA's) keeps its sections.

    Raises:
        HyperError: The completion is no trace.
    """
    parsed = parse_text(text)
    if parsed.format is TraceFormat.MALFORMED:
        raise HyperError("the gold completion is no trace")
    return in_style(replace(parsed.trace, final_answer=answer), style)


def _texts(examples: Iterator[SceneExample]) -> Iterator[str]:
    for example in examples:
        yield "\n".join((example.question, *example.choices))
        yield render(example.trace).replace("<", " <").replace(">", "> ")
    rng = random.Random(0)
    for words in SLOTS.values():
        # Each word of the vocabulary occurs often enough, bare and after a space, to become one token.
        yield from (word for word in words for _ in range(20))
        yield from (f"a {word} b" for word in words for _ in range(20))
    for _ in range(20_000):
        yield draw_line(rng).text


def build_tokenizer(examples: Iterator[SceneExample], vocab_size: int, more: Iterable[str] = ()) -> Tokenizer:
    """Train the embedded checkpoint's byte-level BPE on questions, traces and lines of the training split.

    Args:
        more: Further training texts for the tokenizer.
    """
    return train_tokenizer(chain(_texts(examples), more), vocab_size)
