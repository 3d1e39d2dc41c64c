"""Reads data sets of any format of `training.data.formats` into one row type.

Rows come one at a time. A bad row is an `ExampleError` with its place; the caller decides whether reading ends there.
Reading opens no audio; `read_clip` decodes the clip of one row.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from hyper_model.audio import Waveform, decode, require_single_window
from hyper_model.errors import HyperError
from training.data.formats import FORMATS, detect_format
from training.data.formats.rows import Row, read_rows, shown
from training.data.formats.types import Example, ExampleError


def read_clip(example: Example) -> Waveform:
    """Decode the clip of a row.

    Raises:
        HyperError: It cannot be read, or is longer than one window; the message names row and file.
    """
    try:
        waveform = decode(example.audio.read_bytes())
        require_single_window(waveform)
    except OSError as error:
        raise HyperError(f"{example.source}: {example.audio}: {error.strerror}") from error
    except HyperError as error:
        raise HyperError(f"{example.source}: {example.audio}: {error}") from error
    return waveform


class Order:
    """A shuffled order of items in each epoch; place p is always the same item."""

    def __init__(self, num_items: int, seed: str) -> None:
        self.num_items, self.seed, self.epoch = num_items, seed, -1
        self.order: list[int] = []

    def __getitem__(self, place: int) -> int:
        epoch, place = divmod(place, self.num_items)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, list(range(self.num_items))
            random.Random(f"{self.seed}/epoch/{epoch}").shuffle(self.order)
        return self.order[place]


@dataclass(frozen=True)
class Summary:
    """Counts of a data set.

    Attributes:
        num_missing_audio: Files that do not exist, each counted once however many rows name it.
        by_category: Rows of each category, in order of appearance; rows without one are left out.
        faults: Errors of the unusable rows; these rows are counted nowhere else.
    """

    format: str
    num_examples: int
    num_with_choices: int
    num_missing_audio: int
    by_category: Mapping[str, int]
    faults: tuple[ExampleError, ...] = ()


def read_examples(
    path: str | Path,
    *,
    format: str | None = None,
    audio_root: str | Path | None = None,
    on_fault: Callable[[ExampleError], None] | None = None,
) -> Iterator[Example]:
    """Yield a data set's rows in order, each checked on the way.

    Args:
        format: A name of `FORMATS`; detected from the file's name and first row if None.
        audio_root: Start of relative audio paths; the file's own folder if None. Absolute paths stay unchanged.
        on_fault: Called with the error of each unusable row; published data sets have some. The row is left out.

    Raises:
        ExampleError: For a file that cannot be read as rows at all; without `on_fault`, at the first bad row.
    """
    found, rows = _open_rows(Path(path), format, audio_root)
    yield from _examples(found, rows, on_fault)


def check_examples(path: str | Path, *, format: str | None = None, audio_root: str | Path | None = None) -> Summary:
    """Read a whole data set and count its rows, its faults and its missing audio files.

    Raises:
        ExampleError: For a file that cannot be read as rows at all.
    """
    found, rows = _open_rows(Path(path), format, audio_root)
    num_examples = num_with_choices = 0
    missing: set[Path] = set()
    categories: Counter[str] = Counter()
    faults: list[ExampleError] = []
    for example in _examples(found, rows, faults.append):
        num_examples += 1
        num_with_choices += bool(example.choices)
        # os.path and not Path.is_file: a name that the file system cannot hold (too long) is no file either.
        if not os.path.isfile(example.audio):
            missing.add(example.audio)
        if example.category is not None:
            categories[example.category] += 1
    return Summary(found, num_examples, num_with_choices, len(missing), dict(categories), tuple(faults))


def _examples(found: str, rows: Iterable[Row], on_fault: Callable[[ExampleError], None] | None) -> Iterator[Example]:
    read = FORMATS[found].read
    for row in rows:
        try:
            example = read(row)
        except ExampleError as error:
            if on_fault is None:
                raise
            on_fault(error)
            continue
        yield example


def _open_rows(path: Path, format: str | None, audio_root: str | Path | None) -> tuple[str, Iterable[Row]]:
    """Return the format, detected from the first row if None, and all rows."""
    if format is not None and format not in FORMATS:
        raise ExampleError(str(path), f"the format is none of {', '.join(FORMATS)}", received=shown(format))
    is_table = None if format is None else FORMATS[format].is_table
    rows = read_rows(path, None if audio_root is None else Path(audio_root), is_table=is_table)
    first = next(rows, None)
    if first is None:
        raise ExampleError(str(path), "the file holds no rows")
    found = format or detect_format(first)
    return found, chain([first], rows)
<<<<<<< HEAD


class _Perception(TypedDict):
    environment: str | None
    transcript: str | None
    num_speakers: int | None


@dataclass(frozen=True)
class _Row:
    """Holds a row as the file has it, and takes typed values out of it."""

    path: Path
    audio_root: Path | None
    place: str
    number: int
    fields: Mapping[str, object]
    is_csv: bool = False

    @property
    def source(self) -> str:
        return f"{self.path}, {self.place} {self.number}"

    def error(self, field: str | None, problem: str, received: object = None) -> ExampleError:
        shown = None if received is None else _shown(received)
        return ExampleError(self.source, problem, field=field, received=shown)

    def present(self, *names: str) -> str:
        """Returns the first of these fields that the row has."""
        for name in names:
            if self.fields.get(name) is not None:
                return name
        others = f" (nor is there {' or '.join(names[1:])})" if names[1:] else ""
        raise self.error(names[0], f"is missing{others}")

    def value(self, name: str, kind: type[_T], wanted: str) -> _T | None:
        """Returns a field that must be of one type, None where it is absent or null."""
        value = self.fields.get(name)
        # To Python, true is a number; to whoever wrote the file it is not.
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise self.error(name, f"is not {wanted}", value)
        return value

    def optional_text(self, name: str) -> str | None:
        """Returns a field's text without white space at its ends."""
        text = self.value(name, str, "text")
        return None if text is None else self.clean(name, text)

    def text(self, name: str) -> str:
        """Returns the text of a field that the row must have; it may be empty."""
        return self.optional_text(self.present(name)) or ""

    def clean(self, name: str, text: str) -> str:
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text):
            raise self.error(name, "contains an invalid character (NUL or a lone surrogate)", text)
        return text.strip()

    def optional_list(self, name: str) -> list[object] | None:
        return cast("list[object] | None", self.value(name, list, "a list"))

    def choices(self, name: str) -> tuple[str, ...]:
        """Returns a list of texts; none where the field is absent."""
        items = self.optional_list(name) or []
        for item in items:
            if not isinstance(item, str):
                raise self.error(name, "holds a choice that is not text", item)
        return tuple(self.clean(name, item) for item in cast("list[str]", items))

    def id(self) -> str:
        value = self.fields.get("id")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.optional_text("id") or f"{self.path.stem}-{self.number}"

    def audio(self, name: str, text: str) -> Path:
        """Returns where a clip should be.

        A path that leaves `audio_root` by `..` is refused; one that comes back in is written without its `..`, which a
        link on the way would otherwise take elsewhere.
        """
        if not text:
            raise self.error(name, "the audio path is empty")
        if self.audio_root is None:
            return self.path.parent / text
        if ".." not in Path(text).parts:
            return self.audio_root / text
        root = os.path.abspath(self.audio_root)
        target = os.path.abspath(os.path.join(root, text))
        if not Path(target).is_relative_to(root):
            raise self.error(name, "the audio path leaves the audio root", text)
        return self.audio_root / os.path.relpath(target, root)

    def only_audio(self) -> Path:
        """Returns the clip of a row that lists its clips."""
        self.present("audios")
        paths = self.optional_list("audios") or []
        if len(paths) != 1:
            raise self.error("audios", f"holds {len(paths)} audio paths where one is supported", paths)
        if not isinstance(paths[0], str):
            raise self.error("audios", "holds an audio path that is not text", paths[0])
        return self.audio("audios", self.clean("audios", paths[0]))

    def perception(self) -> _Perception:
        """Returns what is true of the clip, where the row tells it: fields of our own, which any JSON row may have."""
        num_speakers = self.value("num_speakers", int, "a whole number")
        if num_speakers is not None and num_speakers < 0:
            raise self.error("num_speakers", "is below 0", num_speakers)
        return {
            "environment": self.optional_text("environment"),
            "transcript": self.optional_text("transcript"),
            "num_speakers": num_speakers,
        }

    def check(self, question: str, choices: Sequence[str], *, question_field: str, choices_field: str) -> None:
        """Refuses a question and choices that cannot become a prompt."""
        try:
            check_question(question, choices)
        except PromptError as error:
            is_question = error.param == "question"
            field, received = (question_field, question) if is_question else (choices_field, list(choices))
            raise self.error(field, error.message, received) from error

    def answer(self, name: str, choices: Sequence[str], *, is_index: bool = False) -> str:
        """Returns the gold answer, as the choice itself where it is given by its letter or its index from 0.

        Args:
            is_index: Whether the format says that a number is an index; elsewhere one that is a choice's words as well
                is refused.
        """
        self.present(name)
        value = self.fields[name]
        if isinstance(value, int) and not isinstance(value, bool):
            if not choices:
                raise self.error(name, "is an index, and there are no choices", value)
            if not 0 <= value < len(choices):
                raise self.error(name, f"is not an index of {len(choices)} choices", value)
            if not is_index and str(value) in choices:
                raise self.error(name, "may be a choice or the index of one: write the choice as text", value)
            return choices[value]
        text = self.text(name)
        if not text:
            raise self.error(name, "is empty", text)
        return self.chosen(name, text, choices)

    def chosen(self, name: str, text: str, choices: Sequence[str], *, is_sentence: bool = False) -> str:
        """Returns the choice that an answer means; the answer itself where there are no choices."""
        if not choices:
            return text
        found = _named_choice(text, choices) or (_stated_choice(text, choices) if is_sentence else None)
        if found is None:
            raise self.error(name, "the answer is none of the choices", text)
        return found

    def gold(self, name: str, text: str, choices: Sequence[str]) -> tuple[str, str | None]:
        """Returns what a completion answers, and the completion itself where it is a trace and not just an answer."""
        words, parsed = self.clean(name, text), parse_text(text)
        if not parsed.texts:
            if not words:
                raise self.error(name, "is empty", text)
            return self.chosen(name, words, choices, is_sentence=True), None
        if parsed.answer_text is None:
            raise self.error(name, "is a trace without an answer (FINAL_ANSWER or RESPONSE)", text)
        return self.chosen(name, self.clean(name, parsed.answer_text), choices, is_sentence=True), text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


_LABELLED_ANSWER = re.compile(r"\(?([A-Za-z])(?:(?:\)[.:]?|[.:])\s*|\s+|\Z)(.*)", re.DOTALL)
# Bare letters only in upper case: "the answer is a dog" names no letter.
_STATED_LETTER = re.compile(
    r"(?i:\banswer\s*(?:is|:)?\s*(?:option\s+)?)\**(?:\(([A-Za-z])\)|([A-Z])(?=\s*(?:[.,;:()*]|\Z)))"
    r"|<LETTER>\s*([A-Za-z])\s*</LETTER>"
)


def _named_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that a gold answer is: its words, its letter ("B", "(b)", "B."), or both ("B. two").

    The very words come first; after them a letter and words in other case may not point at two choices.
    """
    wanted = _canonical(text)
    for choice in choices:
        if _canonical(choice) == wanted:
            return choice
    found = {choice for choice in choices if _folded(choice) == _folded(text)}
    labelled = _LABELLED_ANSWER.fullmatch(wanted)
    index = _letter_index(labelled[1]) if labelled else len(choices)
    if labelled and index < len(choices) and (not labelled[2] or _folded(labelled[2]) == _folded(choices[index])):
        found.add(choices[index])
    return found.pop() if len(found) == 1 else None


def _stated_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the one choice whose letter a text states ("The answer is B."), else the one that it ends in ("is B.").

    PAQA's responses are such texts: of 1,500 published ones, 1,490 are read by the first rule, 3 by the second.
    """
    text = _canonical(text)
    letters = {(match[1] or match[2] or match[3]).upper() for match in _STATED_LETTER.finditer(text)}
    if not letters:
        return _named_choice(text.rpartition(" is ")[2], choices)
    index = _letter_index(letters.pop()) if len(letters) == 1 else len(choices)
    return choices[index] if index < len(choices) else None


def _letter_index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _canonical(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _folded(text: str) -> str:
    return _canonical(text).casefold().rstrip(" .")


# At the start of a line or sentence: "what are his options: tea, or coffee?" lists no choices.
_CHOICES_HEADER = re.compile(
    r"(?im)(?:^|(?<=[.?!])\s)[ \t]*(?:please choose the answer from the following options|choices|options)\s*:\s*"
)
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_QUOTED_LIST = re.compile(rf"\[\s*({_QUOTED}(?:\s*,\s*{_QUOTED})+)\s*\]")
_PARENTHESISED = re.compile(r"(?<!\w)\(([A-Za-z])\)\s*")
_PARENTHESISED_ANYWHERE = re.compile(r"\(([A-Za-z])\)\s*")
_LINE_LABEL = re.compile(r"(?m)^[ \t]*\(?([A-Za-z])[.):][ \t]+")
_INLINE_LABEL = re.compile(r"(?<!\S)\(?([A-Z])[.):]\s+")


def split_question(text: str) -> tuple[str, tuple[str, ...]]:
    """Takes the choices out of an instruction that holds them, and the `<audio>` marks with them.

    Choices are known by letters in a row from A: "(a) x (b) y" anywhere, "A. x" and the like at the start of lines; or
    by "Choices:" or "Options:" before letters, a quoted list, lines, or texts parted by `|`, `;` or commas.
    """
    text = text.replace("<audio>", " ").strip()
    header = _CHOICES_HEADER.search(text)
    if header is not None:
        rest = text[header.end() :]
        choices, after = _listed(rest)
        if choices:
            return f"{text[: header.start()].strip()}\n{after}".strip(), choices
    # Marks inside words ("speaker(s)", but "one(b) two" as well) are looked at only where there are no others.
    for label in (_PARENTHESISED, _LINE_LABEL, _PARENTHESISED_ANYWHERE):
        before, choices, after = _labelled(text, label)
        if choices:
            return f"{before}\n{after}".strip(), choices
    return text, ()


def _listed(text: str) -> tuple[tuple[str, ...], str]:
    """Returns the choices at the start of what follows "Choices:", and what follows them."""
    quoted = _QUOTED_LIST.match(text)
    if quoted is not None:
        items = [re.sub(r"\\(.)", r"\1", item[1:-1]) for item in re.findall(_QUOTED, quoted[1])]
        return tuple(items), text[quoted.end() :].removeprefix(".").strip()
    for label in (_PARENTHESISED, _LINE_LABEL, _INLINE_LABEL):
        before, choices, after = _labelled(text, label)
        if choices and not before:
            return choices, after
    lines = [line.strip().lstrip("-*•").strip() for line in text.splitlines() if line.strip()]
    if len(lines) == 1:
        separator = next((mark for mark in "|;," if mark in lines[0]), None)
        lines = [] if separator is None else [part.strip() for part in lines[0].rstrip(". ").split(separator)]
    return (tuple(lines) if len(lines) > 1 else ()), ""


def _labelled(text: str, label: re.Pattern[str]) -> tuple[str, tuple[str, ...], str]:
    """Returns what stands before, in and after the last run of texts that are labelled A, B, C and so on."""
    marks = list(label.finditer(text))
    starts = [place for place, mark in enumerate(marks) if mark[1] in "Aa"]
    run = marks[starts[-1] :] if starts else []
    if len(run) < 2 or any(_letter_index(mark[1]) != place for place, mark in enumerate(run)):
        return text, (), ""
    ends = [*(mark.start() for mark in run[1:]), len(text)]
    parts = [text[mark.end() : end] for mark, end in zip(run, ends, strict=True)]
    # Where choices are lines, further lines (such as "Answer with the letter.") are none of the last choice.
    parts[-1], _, after = parts[-1].partition("\n") if label is _LINE_LABEL else (parts[-1], "", "")
    choices = tuple(part.strip().rstrip(",;") for part in parts)
    before = re.sub(rf"{_CHOICES_HEADER.pattern}\Z", "", text[: run[0].start()]).strip()
    return (before, choices, after.strip()) if all(choices) else (text, (), "")


def _paqa(row: _Row) -> Example:
    """Reads PAQA: LLaMA-Factory's alpaca columns with `audios`, and the clip's truth as `hyper data export` adds it.

    From `datasets/multispeaker_choice_part1_sft.jsonl` of github.com/JOY-SWang/HyPeR (at f7c95ac): choices stand inside
    `instruction` as "(a) x (b) y", and a RESPONSE may be a sentence that ends in "The answer is B.".
    """
    instruction = "\n".join(filter(None, (row.text("instruction"), row.optional_text("input"))))
    row.present("output")
    return _asked_in_text(row, "instruction", instruction, "output", row.value("output", str, "text") or "")


def _asked_in_text(row: _Row, question_field: str, instruction: str, answer_field: str, output: str) -> Example:
    question, choices = split_question(instruction)
    row.check(question, choices, question_field=question_field, choices_field=question_field)
    answer, completion = row.gold(answer_field, output, choices)
    return Example(
        id=row.id(),
        audio=row.only_audio(),
        question=question,
        answer=answer,
        choices=choices,
        completion=completion,
        category=row.optional_text("category"),
        source=row.source,
        **row.perception(),
    )


_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def _sharegpt(row: _Row) -> Example:
    """Reads LLaMA-Factory's sharegpt format, of one question each.

    From `data/README.md` and `data/mllm_audio_demo.json` of github.com/hiyouga/LLaMA-Factory: `messages` of `role` and
    `content`, or `conversations` of `from` and `value`. An assistant's text without tags is the answer itself. What a
    system message says is left out: our prompts have none.
    """
    field = row.present("messages", "conversations")
    said: dict[str, list[str]] = {"user": [], "assistant": [], "system": []}
    for message in row.optional_list(field) or []:
        if not isinstance(message, dict):
            raise row.error(field, "holds a message that is no object", message)
        parts = cast("dict[str, object]", message)
        role, text = parts.get("role", parts.get("from")), parts.get("content", parts.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise row.error(field, f"holds a role that is none of {', '.join(_ROLES)}", role)
        if not isinstance(text, str):
            raise row.error(field, "holds a message whose content is not text", text)
        said[_ROLES[role]].append(text)
    for role in ("user", "assistant"):
        if len(said[role]) != 1:
            raise row.error(field, f"holds {len(said[role])} messages of the {role} where one is supported")
    return _asked_in_text(row, field, row.clean(field, said["user"][0]), field, said["assistant"][0])


def _avqa(row: _Row) -> Example:
    """Reads AVQA as R1-AQA trains on it; a number as answer is an index from 0.

    From the README and `src/dataset/dataset.py` of github.com/xiaomi-research/r1-aqa. The question is left as it is:
    R1-AQA writes "audio" for "video" in it when it builds its prompt. A `video_name` alone gets the suffix `.wav`.
    """
    choices_field = row.present("multi_choice", "choices")
    choices = row.choices(choices_field)
    question_field = row.present("question_text", "question")
    question = row.text(question_field)
    row.check(question, choices, question_field=question_field, choices_field=choices_field)
    audio_field = row.present("audio_path", "audio", "video_name")
    audio = row.text(audio_field)
    if audio_field == "video_name" and audio and not Path(audio).suffix:
        audio += ".wav"
    return Example(
        id=row.id(),
        audio=row.audio(audio_field, audio),
        question=question,
        answer=row.answer("answer", choices, is_index=True),
        choices=choices,
        category=row.optional_text("question_type"),
        source=row.source,
    )


def _benchmark(row: _Row, audio_field: str, *category_fields: str) -> Example:
    row.present("choices")
    choices = row.choices("choices")
    question = row.text("question")
    row.check(question, choices, question_field="question", choices_field="choices")
    categories = [text for name in category_fields if (text := row.optional_text(name))]
    return Example(
        id=row.id(),
        audio=row.audio(audio_field, row.text(audio_field)),
        question=question,
        answer=row.answer("answer", choices),
        choices=choices,
        category="/".join(categories) or None,
        difficulty=row.optional_text("difficulty"),
        source=row.source,
    )


def _mmau(row: _Row) -> Example:
    """Reads MMAU, with the category "task/sub-category".

    From `mmau-test-mini.json` of github.com/Sakshi113/MMAU. The 9,000 questions of its test split are published without
    answers and are refused.
    """
    return _benchmark(row, "audio_id", "task", "sub-category")


def _mmar(row: _Row) -> Example:
    """Reads MMAR, with the category "modality/category".

    From `MMAR-meta.json` of huggingface.co/datasets/BoJack/MMAR, as others' loaders describe it.
    """
    return _benchmark(row, "audio_path", "modality", "category")


def _csv(row: _Row) -> Example:
    """Reads a table of our own: the columns `CSV_COLUMNS`, and where wanted those that a plain list may have.

    An empty cell says nothing; that a clip is without speech, a table says by `num_speakers` 0.
    """
    cells = cast("Mapping[str, str]", row.fields)
    fields: dict[str, object] = {name: text for name, text in cells.items() if text.strip() or name in CSV_COLUMNS}
    if "choices" in fields:
        fields["choices"] = cells["choices"].split("|")
    if "num_speakers" in fields:
        number = cells["num_speakers"].strip()
        if not re.fullmatch("[0-9]{1,6}", number):
            raise row.error("num_speakers", "is not a whole number from 0", number)
        fields["num_speakers"] = int(number)
    return _own(replace(row, fields=fields), "audio")


def _plain(row: _Row) -> Example:
    """Reads our own list, such as `tests/assets/clips/truth.json`; without `answer`, the answer is ""."""
    return _own(row, "file")


def _own(row: _Row, audio_field: str) -> Example:
    choices = row.choices("choices")
    question = row.text("question")
    row.check(question, choices, question_field="question", choices_field="choices")
    return Example(
        id=row.id(),
        audio=row.audio(audio_field, row.text(audio_field)),
        question=question,
        answer="" if row.fields.get("answer") is None else row.answer("answer", choices),
        choices=choices,
        category=row.optional_text("category"),
        source=row.source,
        **row.perception(),
    )


_READERS: Mapping[Format, Callable[[_Row], Example]] = {
    "paqa": _paqa,
    "sharegpt": _sharegpt,
    "avqa": _avqa,
    "mmau": _mmau,
    "mmar": _mmar,
    "csv": _csv,
    "plain": _plain,
}
_TELLING_FIELDS: Mapping[str, Format] = {
    "messages": "sharegpt",
    "conversations": "sharegpt",
    "instruction": "paqa",
    "audio_id": "mmau",
    "multi_choice": "avqa",
    "question_text": "avqa",
    "video_name": "avqa",
    "modality": "mmar",
    "file": "plain",
}
"""Fields that one format alone has."""

_NAMED_FORMATS: tuple[Format, ...] = ("paqa", "sharegpt", "avqa", "mmau", "mmar")
"""Formats that files are named after; "plain" and "csv" stand in too many other names."""


def _detect(row: _Row) -> Format:
    """Tells a format by a field that it alone has, else by the file's name, else by where the audio stands."""
    if row.is_csv:
        return "csv"
    for field, found in _TELLING_FIELDS.items():
        if field in row.fields:
            return found
    stem = row.path.stem.lower()
    for found in _NAMED_FORMATS:
        if found in stem:
            return found
    if "question" in row.fields and ("audio_path" in row.fields or "audio" in row.fields):
        return "avqa"
    problem = f"the first row is of no known format; name one of {', '.join(FORMATS)}"
    raise row.error(None, problem, list(row.fields))


def _read_rows(path: Path, format: Format | None, audio_root: Path | None) -> Iterator[_Row]:
    try:
        with path.open("rb") as file:
            start = file.peek(1).removeprefix(BOM_UTF8).lstrip()[:1]
            if format == "csv" or (
                format is None and (path.suffix.lower() == ".csv" or start not in (b"[", b"{", b""))
            ):
                yield from _read_table(file, path, audio_root)
            elif start == b"[":
                yield from _read_array(file, path, audio_root)
            else:
                yield from _read_json_lines(file, path, audio_root)
    except OSError as error:
        raise ExampleError(str(path), f"cannot read the file ({error.strerror or error})") from error


def _read_lines(file: BufferedReader, path: Path) -> Iterator[tuple[int, str]]:
    """Yields the lines with their numbers and ends; decoded one by one, so that a bad byte is told by its line."""
    for number in count(1):
        raw = file.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_LINE_BYTES:
            raise ExampleError(f"{path}, line {number}", f"the line has more than {MAX_LINE_BYTES} bytes")
        yield number, _decode(raw, path, number)


def _decode(raw: bytes, path: Path, line: int) -> str:
    """Decodes what starts at the beginning of a line."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        # Counted in what the codec saw, which is without the mark at the file's beginning.
        seen = error.object
        source = f"{path}, line {line + seen.count(10, 0, error.start)}"
        byte = error.start - seen.rfind(10, 0, error.start)
        bad = _shown(seen[error.start : error.start + 1])
        raise ExampleError(source, f"not UTF-8 at byte {byte}", received=bad) from error


def _read_json_lines(file: BufferedReader, path: Path, audio_root: Path | None) -> Iterator[_Row]:
    for number, line in _read_lines(file, path):
        if line.strip():
            yield _json_row(_load_json(line, path, number), path, audio_root, "line", number)


def _read_array(file: BufferedReader, path: Path, audio_root: Path | None) -> Iterator[_Row]:
    raw = file.read(MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        problem = f"the JSON array has more than {MAX_ARRAY_BYTES} bytes, and arrays are loaded whole"
        raise ExampleError(str(path), f"{problem}: write one object a line instead")
    for number, item in enumerate(cast("list[object]", _load_json(_decode(raw, path, 1), path, None)), 1):
        yield _json_row(item, path, audio_root, "item", number)


def _load_json(text: str, path: Path, line: int | None) -> object:
    """Parses a line, or a whole file where `line` is None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        source = f"{path}, line {error.lineno if line is None else line}"
        rest = text[error.pos : error.pos + MAX_SHOWN_CHARS].partition("\n")[0]
        problem = f"not JSON at column {error.colno} ({error.msg})"
        raise ExampleError(source, problem, received=_shown(rest) if rest else "nothing more") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or thousands of brackets inside each other.
        source = str(path) if line is None else f"{path}, line {line}"
        raise ExampleError(source, "not JSON that can be read", received=_shown(text[:MAX_SHOWN_CHARS])) from error


def _json_row(item: object, path: Path, audio_root: Path | None, place: str, number: int) -> _Row:
    if not isinstance(item, dict):
        raise ExampleError(f"{path}, {place} {number}", "the row is no object", received=_shown(item))
    return _Row(path, audio_root, place, number, cast("dict[str, object]", item))


def _read_table(file: BufferedReader, path: Path, audio_root: Path | None) -> Iterator[_Row]:
    records = _read_records(file, path)
    number, header = next(records, (1, list[str]()))
    if not header:
        return
    header = [name.strip() for name in header]
    source = f"{path}, line {number}"
    for name in CSV_COLUMNS:
        if name not in header:
            raise ExampleError(source, "the header has no such column", field=name, received=_shown(header))
    for name in header:
        if header.count(name) > 1:
            raise ExampleError(source, "the header has this column twice", field=name)
    for number, record in records:
        if len(record) != len(header):
            problem = f"the row has {len(record)} values where the header has {len(header)}"
            raise ExampleError(f"{path}, line {number}", problem)
        yield _Row(path, audio_root, "line", number, dict(zip(header, record, strict=True)), is_csv=True)


def _read_records(file: BufferedReader, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields each record that is not blank, with the line on which it starts."""
    reader = csv.reader((line for _, line in _read_lines(file, path)), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ExampleError(f"{path}, line {number}", f"not CSV ({error})") from error
        if record:
            yield number, record
=======
>>>>>>> fa0a1cb (wip formats suites)
