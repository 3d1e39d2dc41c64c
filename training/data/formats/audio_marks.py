"""Recognise the placeholders of clips in the text of published data sets, and refuse broken ones.

Data sets mark the place of a clip in their text:

- `<audio>` (LLaMA-Factory, ms-swift)
- `<|AUDIO|>` between `<|audio_bos|>` and `<|audio_eos|>`, after "Audio 1: " (Qwen2-Audio)
- `<|audio_pad|>` (Qwen-Omni)
- `<Speech><SpeechHere></Speech>` (SALMONN)
- `<sound>` (Audio Flamingo)
- `<|audio_1|>` (Phi-4)
- `<audio_soft_token>` (Gemma)
- `[AUDIO]` (Voxtral)
- `(<audio>./</audio>)` (MiniCPM-o)

There are others. A mark left in a question would be trained as words.
"""

from __future__ import annotations

import re

_OPEN, _CLOSE = r"(?:<|&lt;|\\u003c)", r"(?:>|&gt;|\\u003e)"
_NOUN = r"(?:audio|speech|sound|music|voice|wav|clip)"
_SPACE = r"[\s_-]*"
_NAME = (
    rf"(?:(?:start|begin|end|beginning){_SPACE}of{_SPACE}{_NOUN}"
    rf"|{_NOUN}{_SPACE}(?:here|token|soft{_SPACE}token|placeholder|pad|bos|eos|start|begin|end|input|file|clip|path|\d+)?"
    rf"|(?:begin|end|start){_SPACE}{_NOUN}|im{_SPACE}media{_SPACE}\w+|sosp|eosp)"
)
_MARK = re.compile(rf"{_OPEN}\s*/?\s*\|?\s*/?{_NAME}\s*\|?\s*/?\s*{_CLOSE}", re.IGNORECASE)
# Other nouns in brackets are words of subtitles: "[music]".
_BRACKETED = re.compile(
    r"\[/?(?:BEGIN_|END_)?AUDIO(?:[_ ]\w+)?\]|\$?\{\{?\s*audio\s*\}?\}|%audio%|\$audio\b", re.IGNORECASE
)
_BEGINS = re.compile(rf"bos|start|begin|sosp|{_OPEN}\s*\|?\s*{_NOUN}\s*\|?\s*{_CLOSE}", re.IGNORECASE)
_ENDS = re.compile(r"eos\b|eos\||end|eosp|/\s*\|?\s*[a-z]", re.IGNORECASE)
_PATH = re.compile(r"[^\s<>]{1,300}")
_LABEL = re.compile(r"(?:^|(?<=\n))[ \t]*(?:audio|sound|clip|speech)\s*\d*\s*:[ \t]*$", re.IGNORECASE)
_NAMED_BEFORE = re.compile(rf"\b(?:{_NOUN}|recording|file|excerpt)s?\W{{0,3}}$", re.IGNORECASE)
# Remains of a mark after a cut or partial escaping, and marks of other media and of chat templates.
_BROKEN = re.compile(
    rf"{_OPEN}\s*/?\s*\|?\s*{_NOUN}\b[^\s<>&]{{0,20}}|\|?\b{_NOUN}\s*(?:_\w+)?\s*\|\s*{_CLOSE}|\b{_NOUN}{_CLOSE}",
    re.IGNORECASE,
)
_OTHER_MEDIA = re.compile(
    rf"{_OPEN}\s*/?\|?\s*(?:vision{_SPACE}\w+|(?:image|video|picture|img){_SPACE}(?:pad|here|token|start|end|bos|eos|\d+)?)"
    rf"\s*\|?\s*{_CLOSE}",
    re.IGNORECASE,
)
# Tags with attributes, other names with a noun of sound in them, and links to a file.
_OTHER_MARK = re.compile(
    r"[<＜](?=\S)[^<>＜＞\n]{0,60}?(?:audio|speech|sound|voice|wav|media)[^<>＜＞\n]{0,60}?(?<=\S)[>＞]"
    r"|!?\[[^\]\n]{0,60}\]\([^)\s]{1,200}\.(?:wav|mp3|flac|ogg|opus|m4a|webm)\)",
    re.IGNORECASE,
)
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>\n]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:bos|eos|start_of_turn|end_of_turn)>")
# Characters without width, and line breaks that were escaped twice.
_REMAINS = re.compile(r"^(?:[\u200b\u200c\u200d\u2060\ufeff]|\\[nrt])+|(?:[\u200b\u200c\u200d\u2060\ufeff]|\\[nrt])+$")
_NEEDS_NOUN = re.compile(r"\b(?:in|of|to|from|with|on|about|for|at|into|by)\s*$", re.IGNORECASE)
_WORDS = "the audio"


class AudioMarkError(ValueError):
    """A text names several clips or another medium, or contains a broken mark; the message names the mark."""


def remove_marks(text: str) -> str:
    """Return a text without the mark of its one clip.

    A mark at the beginning or the end is removed with its label ("Audio 1: "). A mark inside a sentence becomes "the
    audio", unless the words before it already name the clip.

    Raises:
        AudioMarkError: The text has marks of several clips or of other media, a broken mark, or a special token.
    """
    plain = _REMAINS.sub("", text)
    slots = _slots(plain)
    if len(slots) > 1:
        raise AudioMarkError(f"has marks of {len(slots)} clips where one is supported")
    if slots:
        start, end = slots[0]
        before, after = plain[:start], plain[end:]
        if label := _LABEL.search(before):
            before = before[: label.start()]
        is_inside = bool(before.strip()) and not re.search(r"\n[ \t]*$", before)
        is_inside &= re.match(r"[ \t]*(?:[,;]?[ \t]*\w|[?!])", after) is not None
        if _NEEDS_NOUN.search(before) or (
            is_inside and not _NAMED_BEFORE.search(before) and not re.search(r"[.?!:]\s*$", before)
        ):
            text = before + _WORDS + after
        else:
            gap = "" if re.match(r"\s*[.,;:?!]", after) else " "
            text = f"{before.rstrip(' ')}{gap}{after.lstrip(' ')}" if before.strip() else after.lstrip(" \t\n:,.;-")
        text = _REMAINS.sub("", text.strip())
    require_no_marks(text)
    return text.strip()


def require_no_marks(text: str) -> None:
    """Refuse a text with any mark, whole or broken.

    Raises:
        AudioMarkError: The text has a mark.
    """
    for pattern, problem in (
        (_OTHER_MEDIA, "has the mark of a picture or a video"),
        (_MARK, "has the mark of a clip at a place where none is supported"),
        (_BROKEN, "has a broken mark of a clip"),
        (_OTHER_MARK, "has a mark of a clip that is not supported"),
        (_SPECIAL_TOKEN, "has a special token of a chat template"),
    ):
        if (match := pattern.search(text)) is not None:
            raise AudioMarkError(f"{problem}, {match[0]!r}")


def _slots(text: str) -> list[tuple[int, int]]:
    """Return the span of each clip: a single mark, or all marks from an opening to a closing one."""
    marks = [match.span() for match in _MARK.finditer(text)]
    marks += [match.span() for match in _BRACKETED.finditer(text)]
    marks.sort()
    slots: list[tuple[int, int]] = []
    is_open = False
    for start, end in marks:
        mark = text[start:end]
        between = text[slots[-1][1] : start] if slots else ""
        ends = _ENDS.search(mark) is not None
        # Adjacent marks, or marks around a path, belong to one clip; `<audio><audio>` are two.
        if slots and (is_open or ends) and (not between.strip() or (ends and _PATH.fullmatch(between.strip()))):
            slots[-1] = (slots[-1][0], end)
            is_open = not ends
            continue
        slots.append((start, end))
        is_open = _BEGINS.search(mark) is not None and _ENDS.search(mark) is None and _is_wrapper(mark)
    return [_with_parentheses(text, slot) for slot in slots]


def _is_wrapper(mark: str) -> bool:
    """Return True if a mark begins a clip and needs further marks."""
    return re.search(r"bos|start|begin|sosp|speech\s*>", mark, re.IGNORECASE) is not None


def _with_parentheses(text: str, slot: tuple[int, int]) -> tuple[int, int]:
    start, end = slot
    if text[start - 1 : start] == "(" and text[end : end + 1] == ")":
        return start - 1, end + 1
    return slot
