"""The perceptual trace: its grammar, its text form, its tokenizer, and the prompt for a trace.

`render` writes a trace as text; `hyper_model.trace_parser` reads it as token ids. `TraceTokenizer` keeps words apart
from markup. `encode_text` never yields a special token, whatever the text. Only `encode_trace`, for traces rendered by
this project, may.

Escapes keep text from looking like markup in a rendered trace:
  - a markup string inside a section gets a backslash: `<THINK>` is written `<\\THINK>`, `<\\THINK>` is written
    `<\\\\THINK>`, and so on. All other text is unchanged. The parser removes one backslash again.
  - in a SPEAKER line, inside quotes, `"`, `\\` and a line break are written `\\"`, `\\\\` and `\\n`. In a speaker's
    description a colon is written `\\:` as well, so the first bare colon ends the head of the line.

The module is independent of torch, engines, HTTP and the parser.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hyper_model.errors import CheckpointError, PromptError

TRACE_SCHEMA_VERSION = 1


class Section(StrEnum):
    """Sections of a trace, in the order of a strict trace."""

    THINK = "THINK"
    PLANNING = "PLANNING"
    CAPTION = "CAPTION"
    ENV = "ENV"
    SPEAKER = "SPEAKER"
    ASR = "ASR"
    DESCRIPTION = "DESCRIPTION"
    REASONING = "REASONING"
    SUMMARY = "SUMMARY"
    RESPONSE = "RESPONSE"
    REFLECT = "REFLECT"
    FINAL_ANSWER = "FINAL_ANSWER"

    @property
    def tags(self) -> tuple[str, str]:
        """Return the opening and the closing tag."""
        return f"<{self.value}>", f"</{self.value}>"


PARENTS: Mapping[Section, Section | None] = {
    Section.THINK: None,
    Section.PLANNING: Section.THINK,
    Section.CAPTION: Section.THINK,
    Section.ENV: Section.CAPTION,
    Section.SPEAKER: Section.CAPTION,
    Section.ASR: Section.CAPTION,
    Section.DESCRIPTION: Section.CAPTION,
    Section.REASONING: Section.THINK,
    Section.SUMMARY: Section.THINK,
    Section.RESPONSE: None,
    Section.REFLECT: None,
    Section.FINAL_ANSWER: None,
}
OPTIONAL_SECTIONS = frozenset({Section.DESCRIPTION, Section.REFLECT})
REQUIRED_SECTIONS = tuple(section for section in Section if section not in OPTIONAL_SECTIONS)

END_OF_TEXT = "<|endoftext|>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
AUDIO_BOS, AUDIO, AUDIO_EOS = "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"
PAUSE, PAUSE_CLOSE = "<PAUSE>", "</PAUSE>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END, AUDIO_BOS, AUDIO, AUDIO_EOS)
# The order is part of the format: `train_tokenizer` numbers the special tokens of a checkpoint by it.
SPECIAL_TOKENS: tuple[str, ...] = (
    *CONTROL_TOKENS,
    *(tag for section in Section for tag in section.tags),
    PAUSE,
    PAUSE_CLOSE,
)
# Spellings of older data and adopted checkpoints, with their meanings. Accepted on input only.
TAG_ALIASES: Mapping[str, str] = {
    "<BGM>": "<ENV>",
    "</BGM>": "</ENV>",
    "<DESC>": "<DESCRIPTION>",
    "</DESC>": "</DESCRIPTION>",
    "<think>": "<THINK>",
    "</think>": "</THINK>",
    "<answer>": "<FINAL_ANSWER>",
    "</answer>": "</FINAL_ANSWER>",
    "<IMPLICIT_THINK>": PAUSE,
    "</IMPLICIT_THINK>": PAUSE_CLOSE,
}
MARKUP: tuple[str, ...] = (*SPECIAL_TOKENS, *TAG_ALIASES)
# The meaning of each tag spelling, in our own spelling.
TAG_MEANINGS: Mapping[str, str] = {tag: TAG_ALIASES.get(tag, tag) for tag in MARKUP if tag not in CONTROL_TOKENS}
_MARKUP_BODIES = "|".join(re.escape(markup[1:]) for markup in MARKUP)
_MARKUP = re.compile(rf"<({_MARKUP_BODIES})")
_ESCAPABLE = re.compile(rf"<(\\*(?:{_MARKUP_BODIES}))")

MAX_QUESTION_CHARS = 2000
MAX_CHOICE_CHARS = 500
MAX_CHOICES = 26
MAX_CONTEXT_CHARS = 2000


class TagStyle(StrEnum):
    """Form of a checkpoint's tags: one special token each, or plain text over several tokens."""

    TOKEN = "token"
    TEXT = "text"


class PauseMode(StrEnum):
    """Form of a pause among the token ids.

    PARALLEL is a run of PAUSE ids, or PAUSE and one id per further position. SAMPLED is PAUSE, PAUSE_CLOSE and
    everything between.
    """

    PARALLEL = "parallel"
    SAMPLED = "sampled"


class Termination(StrEnum):
    """Way in which a trace ended."""

    COMPLETE = "complete"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    MALFORMED = "malformed"


@dataclass(frozen=True)
class Speaker:
    """One voice: its id ("S1"), its description ("woman"), and its words, quote by quote."""

    id: str
    description: str = ""
    quotes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch("S[0-9]+", self.id):
            raise ValueError(f"a speaker's id is S and a number, not {self.id!r}")


@dataclass(frozen=True)
class Trace:
    """Content of a trace by section; None for an absent section ("" for an empty one).

    In a trace without sub-sections (R1-AQA), `reasoning` is the whole text of THINK.
    """

    planning: str | None = None
    environment: str | None = None
    speakers: tuple[Speaker, ...] = ()
    transcript: str | None = None
    description: str | None = None
    reasoning: str | None = None
    summary: str | None = None
    response: str | None = None
    reflection: str | None = None
    final_answer: str | None = None


def canonical_text(text: str) -> str:
    """Return text in NFC without white space at its ends, a form preserved by tokenizing and parsing."""
    return unicodedata.normalize("NFC", text).strip()


def escape_markup(text: str) -> str:
    """Add a backslash to every markup-like string; the parser removes it."""
    return _ESCAPABLE.sub(r"<\\\1", text)


def render(trace: Trace) -> str:
    """Write a trace as compact text for `TraceTokenizer.encode_trace`.

    Sections with field None are omitted. THINK and CAPTION are written if they have content. SPEAKER is written with
    every CAPTION (it is empty for a clip without speech). `parse(render(t)) == t` for every trace with canonical texts
    (see `canonical_text`) and quotes in NFC.
    """
    caption = _section(Section.ENV, trace.environment)
    has_caption = bool(trace.speakers) or any(
        text is not None for text in (trace.environment, trace.transcript, trace.description)
    )
    if has_caption:
        caption += _section(Section.SPEAKER, render_speakers(trace.speakers))
    caption += _section(Section.ASR, trace.transcript) + _section(Section.DESCRIPTION, trace.description)
    think = _section(Section.PLANNING, trace.planning)
    if has_caption:
        think += caption.join(Section.CAPTION.tags)
    think += _section(Section.REASONING, trace.reasoning) + _section(Section.SUMMARY, trace.summary)
    return (
        (think.join(Section.THINK.tags) if think else "")
        + _section(Section.RESPONSE, trace.response)
        + _section(Section.REFLECT, trace.reflection)
        + _section(Section.FINAL_ANSWER, trace.final_answer)
    )


def _section(section: Section, text: str | None) -> str:
    return "" if text is None else escape_markup(canonical_text(text)).join(section.tags)


def render_speakers(speakers: Sequence[Speaker]) -> str:
    """Write one line per speaker: `S1 woman: "words one" "words two"`."""
    return "\n".join(
        " ".join(
            (
                f"{speaker.id} {_backslash(canonical_text(speaker.description), ':')}".rstrip(" ") + ":",
                *(f'"{_backslash(quote)}"' for quote in speaker.quotes),
            )
        )
        for speaker in speakers
    )


def _backslash(text: str, extra: str = "") -> str:
    return re.sub(rf'([\\"{extra}])', r"\\\1", unicodedata.normalize("NFC", text)).replace("\n", "\\n")


def environment_labels(text: str) -> list[str]:
    """Split an ENV text such as "rain, engine and birds" into its labels, in order and without repeats."""
    parts = re.split(r"[,;\n]|\band\b", text.strip().rstrip("."))
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def choice_label(index: int) -> str:
    """Return the letter of a choice: 0 is "A", 25 is "Z"."""
    if not 0 <= index < MAX_CHOICES:
        raise ValueError(f"choices are numbered 0 to {MAX_CHOICES - 1}, not {index}")
    return string.ascii_uppercase[index]


def render_choice(index: int, choices: Sequence[str]) -> str:
    """Write a choice in the form of prompts and final answers: `B. two`, on one line."""
    return f"{choice_label(index)}. {' '.join(choices[index].split())}"


def position_tokens(latent_tokens: int) -> tuple[str, ...]:
    """Return the tokens for positions 2 and up of a parallel pause; position 1 has the pause token itself.

    They are not markup: they occur in no text or trace.
    """
    return tuple(f"<PAUSE_{place}>" for place in range(2, latent_tokens + 1))


def add_position_tokens(tokenizer: Tokenizer, latent_tokens: int) -> None:
    """Add the `position_tokens` to a tokenizer, after all its tokens."""
    tokens: list[str | AddedToken] = [
        AddedToken(token, special=True, normalized=False) for token in position_tokens(latent_tokens)
    ]
    tokenizer.add_special_tokens(tokens)  # pyright: ignore[reportUnknownMemberType]


def parse_tokenizer(data: bytes, name: str = "tokenizer.json") -> Tokenizer:
    """Build a tokenizer from the bytes of its file.

    Raises:
        CheckpointError: The bytes are not a tokenizer.
    """
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise CheckpointError(f"{name} is not a tokenizer file") from error


class TraceTokenizer:
    """Tokenizer for text without markup, for traces with markup, and for each token's bytes.

    Args:
        tokenizer: A byte-level BPE tokenizer; it is not changed.
        tag_style: Whether the tags are added tokens of this tokenizer or plain text.
        tags: The (open, close) spellings of sections with non-default tags, such as `<BGM>`.
        pause_tags: The same for a pause, such as `<IMPLICIT_THINK>`.
        position_ids: The id at each position of a parallel pause, if each has its own (see `with_positions`).

    Attributes:
        tag_ids: The (open, close) token ids of each section's tags; empty for plain-text tags (see `open_ids`).
        pause_id: The id to open a pause; None for plain-text pauses. `pause_close_id` closes it.
        position_ids: The argument; empty if a parallel pause repeats `pause_id`.
        latent_ids: The ids of a parallel pause.
        pause_ids: All ids of pauses. Only the gate may permit them.
        special_ids: Every added token, flagged special or not; no text encodes to one.
        control_ids: Special tokens never shown to readers (turns, audio, further positions of a pause), without tags.
        stop_ids: The ids at the end of a completion.

    Raises:
        CheckpointError: If the tokenizer is not byte-level or lacks a token, or a spelling is not in `MARKUP`. Also if
            a position's id is not a special token, or has another meaning.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tag_style: TagStyle = TagStyle.TOKEN,
        *,
        tags: Mapping[Section, tuple[str, str]] | None = None,
        pause_tags: tuple[str, str] = (PAUSE, PAUSE_CLOSE),
        position_ids: Sequence[int] = (),
    ) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise CheckpointError("the tokenizer is not a byte-level BPE")
        self.tokenizer = tokenizer
        self.tag_style = tag_style
        self.tags = {section: (tags or {}).get(section, section.tags) for section in Section}
        self.pause_tags = pause_tags
        # Added tokens are matched in the text before BPE runs, so the same model without them never produces one.
        # (`encode_special_tokens` would still match the added tokens not flagged special.)
        self._plain = Tokenizer(tokenizer.model)
        if tokenizer.normalizer is not None:
            self._plain.normalizer = tokenizer.normalizer
        if tokenizer.pre_tokenizer is not None:
            self._plain.pre_tokenizer = tokenizer.pre_tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added_texts = {token_id: token.content for token_id, token in added.items()}
        self._added_ids = {token.content: token_id for token_id, token in added.items()}
        self.special_ids = frozenset(self._added_texts)
        self.control_ids = frozenset(
            token_id for token_id, token in added.items() if token.special and token.content not in TAG_MEANINGS
        )
        self.end_of_text_id, self.im_start_id, self.im_end_id = map(self._added_id, (END_OF_TEXT, IM_START, IM_END))
        self.audio_bos_id, self.audio_id, self.audio_eos_id = map(self._added_id, (AUDIO_BOS, AUDIO, AUDIO_EOS))
        self.stop_ids = (self.im_end_id, self.end_of_text_id)
        self.tag_ids: dict[Section, tuple[int, int]] = {}
        if tag_style is TagStyle.TOKEN:
            self.tag_ids = {s: (self._added_id(a), self._added_id(b)) for s, (a, b) in self.tags.items()}
        self.pause_id = self._added_ids.get(pause_tags[0])
        self.pause_close_id = self._added_ids.get(pause_tags[1])
        self.position_ids = tuple(position_ids)
        for token_id in self.position_ids[1:]:
            if token_id not in self.control_ids or self._added_texts[token_id] in CONTROL_TOKENS:
                raise CheckpointError(f"token {token_id} is no special token that a position of a pause could have")
        ends = (self.pause_id, *self.position_ids, self.pause_close_id)
        self.pause_ids = frozenset(token_id for token_id in ends if token_id is not None)
        self.latent_ids = self.pause_ids - {self.pause_close_id}
        spellings = {section.tags: self.tags[section] for section in Section} | {(PAUSE, PAUSE_CLOSE): pause_tags}
        tag_of = {meaning: tag for pair, ours in spellings.items() for meaning, tag in zip(pair, ours, strict=True)}
        for meaning, tag in tag_of.items():
            if TAG_MEANINGS.get(tag) != meaning:
                raise CheckpointError(f"{tag!r} is not a known spelling of {meaning}")
        self._markup_ids = {
            markup: self._encode_tag(tag_of[TAG_MEANINGS[markup]])
            if markup in TAG_MEANINGS
            else [self._added_ids[markup]]
            for markup in MARKUP
        }
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def from_file(cls, path: str | Path, tag_style: TagStyle = TagStyle.TOKEN) -> TraceTokenizer:
        """Open a `tokenizer.json`.

        Raises:
            CheckpointError: If the file is missing or is not a tokenizer for traces.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read the tokenizer {Path(path).name}") from error
        return cls(parse_tokenizer(data, Path(path).name), tag_style)

    def with_positions(self, latent_tokens: int) -> TraceTokenizer:
        """Return the same tokenizer for parallel pauses with one token per position.

        Raises:
            CheckpointError: If it lacks one of the `position_tokens`.
        """
        ids = [self._added_id(token) for token in (self.pause_tags[0], *position_tokens(latent_tokens))]
        return TraceTokenizer(
            self.tokenizer, self.tag_style, tags=self.tags, pause_tags=self.pause_tags, position_ids=ids
        )

    @property
    def vocab_size(self) -> int:
        """Return the number of used ids; a model's output layer may be padded beyond it."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode_text(self, text: str) -> list[int]:
        """Encode words, without any id of `special_ids`, whatever the text."""
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if self.special_ids.isdisjoint(ids):
            return ids
        # Only if the BPE vocabulary itself contains an added token's text, as some trainers' do.
        return [token_id for char in text for token_id in self._plain.encode(char, add_special_tokens=False).ids]

    def encode_trace(self, text: str) -> list[int]:
        """Encode a rendered trace, each markup string on its own; never use it for external text.

        Aliases (`<BGM>`) are encoded as their tag.
        """
        ids: list[int] = []
        end = 0
        for match in _MARKUP.finditer(text):
            ids += self.encode_text(text[end : match.start()])
            ids += self._markup_ids[match[0]]
            end = match.end()
        return ids + self.encode_text(text[end:])

    def open_ids(self, section: Section) -> list[int]:
        """Return the ids to open a section: one for token tags, several for plain text."""
        return self._encode_tag(self.tags[section][0])

    def close_ids(self, section: Section) -> list[int]:
        """Return the ids to close a section."""
        return self._encode_tag(self.tags[section][1])

    def close_pause_ids(self) -> list[int]:
        """Return the ids to close a sampled pause."""
        return self._encode_tag(self.pause_tags[1])

    def label_ids(self, num_choices: int) -> list[int]:
        """Return the single token of each label "A", "B", ... directly after the FINAL_ANSWER tag.

        Raises:
            CheckpointError: If a label is not one token, because one engine step could then not score the choices.
        """
        ids = [self.encode_text(f"{choice_label(index)}. x")[0] for index in range(num_choices)]
        if self.decode(ids) != string.ascii_uppercase[:num_choices]:
            raise CheckpointError("the tokenizer does not write a choice's letter as a token of its own")
        return ids

    def choice_ids(self, choices: Sequence[str], *, by_letter: bool) -> list[list[int]]:
        """Return the continuation after the FINAL_ANSWER tag to score for each choice.

        Args:
            choices: The choices in the prompt.
            by_letter: Whether the checkpoint answers with the choice's letter, one token, or with its words. Words end
                with the closing tag if tags are tokens. Otherwise a choice with the beginning of another would gain.
        """
        if by_letter:
            return [[label_id] for label_id in self.label_ids(len(choices))]
        closing = self.close_ids(Section.FINAL_ANSWER) if self.tag_style is TagStyle.TOKEN else []
        return [[*self.encode_text(escape_markup(" ".join(choice.split()))), *closing] for choice in choices]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; none for an id outside the vocabulary."""
        cached = self._token_bytes.get(token_id)
        if cached is None:
            cached = self._token_bytes[token_id] = self._look_up_bytes(token_id)
        return cached

    def decode(self, token_ids: Iterable[int]) -> str:
        """Decode ids to text with all their markup; bytes outside UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", errors="replace")

    def _look_up_bytes(self, token_id: int) -> bytes:
        if token_id in self._added_texts:
            return self._added_texts[token_id].encode()
        token = self.tokenizer.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        if all(char in _BYTE_OF_CHAR for char in token):
            return bytes(_BYTE_OF_CHAR[char] for char in token)
        return token.encode()

    def _added_id(self, content: str) -> int:
        try:
            return self._added_ids[content]
        except KeyError:
            raise CheckpointError(f"the tokenizer has no token {content}") from None

    def _encode_tag(self, tag: str) -> list[int]:
        return [self._added_ids[tag]] if tag in self._added_ids else self.encode_text(tag)


def _byte_level_alphabet() -> dict[str, int]:
    """Map each printable character of byte-level BPE (GPT-2) to its byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


def build_prompt(
    tokenizer: TraceTokenizer, question: str, choices: Sequence[str] = (), num_clips: int = 1, context: str = ""
) -> list[int]:
    """Write the prompt for serving and training: the clips, then the context, the question and the choices.

    One AUDIO id stands for each clip; the engine or the trainer's processor repeats it to the clip's length.

    Args:
        context: A text that may help with the words of the clip, such as names or another recogniser's transcript. Its
            whitespace becomes single spaces, so it is one line.

    Raises:
        PromptError: If the question, the choices or the context are invalid.
    """
    if num_clips < 1:
        raise ValueError(f"a prompt asks about at least one clip, not {num_clips}")
    check_question(question, choices, context)
    ids = [tokenizer.im_start_id, *tokenizer.encode_text("user\n")]
    for number in range(1, num_clips + 1):
        ids += tokenizer.encode_text(f"Audio {number}: ")
        ids += [tokenizer.audio_bos_id, tokenizer.audio_id, tokenizer.audio_eos_id]
        ids += tokenizer.encode_text("\n")
    hint = [f"Context: {' '.join(context.split())}"] if context.strip() else []
    lines = [*hint, question.strip(), *(render_choice(index, choices) for index in range(len(choices)))]
    ids += tokenizer.encode_text("".join(f"{line}\n" for line in lines))
    return [
        *ids,
        tokenizer.im_end_id,
        *tokenizer.encode_text("\n"),
        tokenizer.im_start_id,
        *tokenizer.encode_text("assistant\n"),
    ]


def check_question(question: str, choices: Sequence[str] = (), context: str = "") -> None:
    """Check a question, its choices and its context before any costly work.

    Raises:
        PromptError: With `param` "question", "choices" or "context".
    """
    _check_text(question, "question", MAX_QUESTION_CHARS)
    if context.strip():
        _check_text(context, "context", MAX_CONTEXT_CHARS)
    if choices and not 2 <= len(choices) <= MAX_CHOICES:
        raise PromptError(f"{len(choices)} choices given; the number must be 0 or 2 to {MAX_CHOICES}", param="choices")
    for choice in choices:
        _check_text(choice, "choices", MAX_CHOICE_CHARS)
    if len({unicodedata.normalize("NFC", " ".join(choice.split())) for choice in choices}) < len(choices):
        raise PromptError("two choices are equal; make them different", param="choices")


# Spaces, line ends, control characters and characters without width.
_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})


def _check_text(text: str, param: str, max_chars: int) -> None:
    name = {"question": "the question", "context": "the context"}.get(param, "a choice")
    if not any(unicodedata.category(char) not in _INVISIBLE for char in text):
        raise PromptError(f"{name} is empty", param=param)
    if len(text) > max_chars:
        raise PromptError(f"{name} has {len(text)} characters; the limit is {max_chars}", param=param)
    if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text):
        raise PromptError(f"{name} contains an invalid character (NUL or a lone surrogate); remove it", param=param)


# Qwen2's rule to split text into words before BPE: digits one by one, a line break never with letters.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer in Qwen2's form, with all SPECIAL_TOKENS after the learned vocabulary.

    Any text can be encoded, because all 256 bytes are in the vocabulary.

    Args:
        texts: The texts for the merges, without markup.
        vocab_size: Total size with special tokens. The result is smaller if the texts have too few merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    special_tokens: list[str | AddedToken] = [AddedToken(s, special=True, normalized=False) for s in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special_tokens)  # pyright: ignore[reportUnknownMemberType]
    return tokenizer
