"""Turns examples into token ids and targets: the training side of the one prompt builder.

Knows nothing of models; the tokenizer is the checkpoint's own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
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
"""Spans of one training sequence: the useful range of the paper."""

_OF_WORDS = (Section.SPEAKER, Section.ASR)


@dataclass(frozen=True)
class Encoded:
    """One training sequence; the single AUDIO id is still to be replaced by the clip's states.

    `targets` is already shifted: `targets[t]` is the token that position t must predict.
    """

    token_ids: list[int]
    targets: list[int]
    audio_at: int


@dataclass(frozen=True)
class Spans:
    """Says how latent spans are put into training sequences.

    Attributes:
        share: Of the sequences that hold any.
        latent_tokens: Length of a span, a sampled one's two tags not among them.
    """

    share: float
    latent_tokens: int
    mode: PauseMode = PauseMode.PARALLEL

    def draw(self, tokenizer: TraceTokenizer, words: Sequence[int], rng: random.Random) -> list[int]:
        """Returns a span's tokens.

        A sampled span holds what the model itself will write there, which nobody knows yet. Its own trace's next words
        in that place would teach to repeat a draft that is always right, so words of the prompt stand there in any
        order: they tell nothing new.

        Args:
            words: The prompt's tokens without the special ones.
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
    wrong_words: float = 0.0,
) -> Encoded:
    """Encodes prompt and completion, ended by the end-of-turn token, with latent spans in a share of the sequences.

    A trace that is cut ends without that token: it is a beginning, and teaches no end. Of one that is read, what
    CAPTION holds is there and no target: nobody could hear it.

    Where words stand wrong (`SftRecipe.wrong_words`), the target is the right one all the same.

    A span stands where a gate could open one: anywhere inside the sections that may pause. It is nobody's choice, so
    none of its tokens is a target, nor the tag that closes a sampled one, which the gate forces; what stands behind it
    is predicted from its last token.
    """
    prompt = build_prompt(tokenizer, question, choices)
    completion = tokenizer.encode_trace(trace) + ([] if is_cut else [tokenizer.im_end_id])
    words = [token_id for token_id in prompt if token_id not in tokenizer.special_ids]
    token_ids, targets = [*prompt], [IGNORED] * len(prompt)
    opened = set(_draw_places(tokenizer, completion, rng)) if rng.random() < spans.share else set()
    misheard = _misheard(tokenizer, completion, wrong_words, rng) if wrong_words else {}
    caption_open, caption_close = tokenizer.tag_ids[Section.CAPTION]
    is_inside = False
    for place, token_id in enumerate(completion):
        if place in opened:
            span = spans.draw(tokenizer, words, rng)
            token_ids += span
            targets += [IGNORED] * len(span)
        token_ids.append(misheard.get(place, token_id))
        targets.append(IGNORED if is_read and is_inside else token_id)
        is_inside = token_id == caption_open or (is_inside and token_id != caption_close)
    return Encoded(token_ids, [*targets[1:], IGNORED], prompt.index(tokenizer.audio_id))


def _sections(tokenizer: TraceTokenizer, completion: Sequence[int]) -> Iterator[Section | None]:
    """Yields the innermost section that is open where each token is written, the one that it closes included."""
    opening = {ids[0]: section for section, ids in tokenizer.tag_ids.items()}
    closing = {ids[1] for ids in tokenizer.tag_ids.values()}
    held: list[Section] = []
    for token_id in completion:
        yield held[-1] if held else None
        if token_id in opening:
            held.append(opening[token_id])
        elif token_id in closing and held:
            held.pop()


def _draw_places(tokenizer: TraceTokenizer, completion: Sequence[int], rng: random.Random) -> list[int]:
    """Draws the tokens in front of which spans are put: half of them the first of a section, where most is unsure."""
    opening = {ids[0] for ids in tokenizer.tag_ids.values()}
    first: list[int] = []
    inside: list[int] = []
    for place, section in enumerate(_sections(tokenizer, completion)):
        if section in GATED_SECTIONS:
            (first if completion[place - 1] in opening else inside).append(place)
    pools = [pool for pool in (first, inside) if pool]
    return [rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, MAX_SPANS))] if pools else []


def _misheard(tokenizer: TraceTokenizer, completion: Sequence[int], share: float, rng: random.Random) -> dict[int, int]:
    """Draws tokens of what was said that stand wrong, each by another of the trace: place -> what stands there.

    Tokens of the same trace, since these make a decoder that goes by its last words alone jump to where they were said.
    """
    said = [
        place
        for place, section in enumerate(_sections(tokenizer, completion))
        if section in _OF_WORDS and completion[place] not in tokenizer.special_ids
    ]
    return {place: completion[rng.choice(said)] for place in said if rng.random() < share}


def in_style(trace: Trace, style: TraceStyle) -> str:
    """Renders what a style keeps of a trace; every style parses, the explicit one alone as strict.

    `short` has no CAPTION; PLANNING, REASONING, SUMMARY and a reflection stay. `direct` answers at once, and has the
    answer alone for its RESPONSE. Both keep the tags of THINK, with nothing between them where nothing is thought: the
    weak form begins with it, so whoever reads, rewards or serves traces takes every style for one.
    """
    if style == "explicit":
        return render(trace)
    if style == "short":
        kept = replace(trace, environment=None, speakers=(), transcript=None, description=None)
    else:
        answer = trace.response if trace.final_answer is None else trace.final_answer
        kept = Trace(response=None if trace.response is None else answer, final_answer=trace.final_answer)
    text = render(kept)
    opening, closing = Section.THINK.tags
    return text if text.startswith(opening) else opening + closing + text


def canonical_completion(text: str, answer: str, style: TraceStyle = "explicit") -> str:
    """Renders a data set's gold completion in the one grammar that is trained, with the answer as prompts show it.

    A weak trace (R1-AQA's, say) keeps the sections that it has.

    Raises:
        HyperError: It cannot be read as a trace.
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
        # Every word of the vocabulary occurs often enough, bare and after a space, to become one token.
        yield from (word for word in words for _ in range(20))
        yield from (f"a {word} b" for word in words for _ in range(20))
    for _ in range(20_000):
        yield draw_line(rng).text


def build_tokenizer(examples: Iterator[SceneExample], vocab_size: int, more: Iterable[str] = ()) -> Tokenizer:
    """Train the embedded checkpoint's byte-level BPE on the questions, traces and lines of the training split.

    Args:
        more: Further texts that it should be good at.
    """
    return train_tokenizer(chain(_texts(examples), more), vocab_size)
