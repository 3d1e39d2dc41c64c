"""Read rows from JSON and CSV files, and typed values from rows.

Rows come one at a time. JSON lines and CSV are never held whole; a JSON array is, up to `MAX_ARRAY_BYTES`.
"""

from __future__ import annotations

import csv
import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import TypedDict, TypeVar, cast

from hyper_model.errors import PromptError
from hyper_model.trace import check_question
from hyper_model.trace_parser import parse_text
from training.data.formats.audio_marks import AudioMarkError, remove_marks, require_no_marks
from training.data.formats.choices import gold_choice, stated_choice
from training.data.formats.types import ExampleError

MAX_ARRAY_BYTES = 256 * 2**20
"""Maximum size of a file with one JSON array; MMAU's 10,000 items are 6 MB."""

MAX_LINE_BYTES = 16 * 2**20
"""Maximum size of one line; a file without line breaks is refused before it fills the memory."""

MAX_SHOWN_CHARS = 80
"""Maximum length of a bad value in a message."""

CSV_COLUMNS = ("audio", "question", "answer")
"""Required columns of a CSV file."""

_T = TypeVar("_T")


class Perception(TypedDict):
    environment: str | None
    transcript: str | None
    num_speakers: int | None


@dataclass(frozen=True)
class Row:
    """A row with the values of its file, and typed access to them."""

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
        return ExampleError(self.source, problem, field=field, received=None if received is None else shown(received))

    def present(self, *names: str) -> str:
        """Return the name of the first of these fields in the row."""
        for name in names:
            if self.fields.get(name) is not None:
                return name
        others = f" (nor is there {' or '.join(names[1:])})" if names[1:] else ""
        raise self.error(names[0], f"is missing{others}")

    def value(self, name: str, kind: type[_T], wanted: str) -> _T | None:
        """Return a field of one type, None if it is absent or null."""
        value = self.fields.get(name)
        # In Python, true is a number; in JSON it is not.
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise self.error(name, f"is not {wanted}", value)
        return value

    def optional_text(self, name: str) -> str | None:
        """Return a field's text without surrounding white space."""
        text = self.value(name, str, "text")
        return None if text is None else self.clean(name, text)

    def text(self, name: str) -> str:
        """Return the text of a required field; it may be empty."""
        return self.optional_text(self.present(name)) or ""

    def clean(self, name: str, text: str) -> str:
        if any(char == "\0" or "\ud800" <= char <= "\udfff" for char in text):
            raise self.error(name, "contains an invalid character (NUL or a lone surrogate)", text)
        return text.strip()

    def without_marks(self, name: str, text: str) -> str:
        """Return a question without the mark of its clip."""
        try:
            return remove_marks(text)
        except AudioMarkError as error:
            raise self.error(name, str(error), text) from error

    def question(self, name: str) -> str:
        """Return the question of a required field, without the mark of its clip."""
        return self.without_marks(name, self.text(name))

    def optional_list(self, name: str) -> list[object] | None:
        return cast("list[object] | None", self.value(name, list, "a list"))

    def choices(self, name: str) -> tuple[str, ...]:
        """Return a list of texts; none if the field is absent."""
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
        """Return the path of a clip.

        A path outside `audio_root` is refused. A path that leaves it and comes back is returned without its `..`: a
        symbolic link on the way could lead elsewhere.
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
        """Return the one clip of a row with a list of clips."""
        self.present("audios")
        paths = self.optional_list("audios") or []
        if len(paths) != 1:
            raise self.error("audios", f"holds {len(paths)} audio paths where one is supported", paths)
        if not isinstance(paths[0], str):
            raise self.error("audios", "holds an audio path that is not text", paths[0])
        return self.audio("audios", self.clean("audios", paths[0]))

    def perception(self) -> Perception:
        """Return the truth about the clip: optional fields of our own in any JSON row."""
        num_speakers = self.value("num_speakers", int, "a whole number")
        if num_speakers is not None and num_speakers < 0:
            raise self.error("num_speakers", "is below 0", num_speakers)
        return {
            "environment": self.optional_text("environment"),
            "transcript": self.optional_text("transcript"),
            "num_speakers": num_speakers,
        }

    def check(self, question: str, choices: Sequence[str], *, question_field: str, choices_field: str) -> None:
        """Refuse a question and choices invalid for a prompt, or with marks of clips in them."""
        for field, text in ((question_field, question), *((choices_field, choice) for choice in choices)):
            try:
                require_no_marks(text)
            except AudioMarkError as error:
                raise self.error(field, str(error), text) from error
        try:
            check_question(question, choices)
        except PromptError as error:
            is_question = error.param == "question"
            field, received = (question_field, question) if is_question else (choices_field, list(choices))
            raise self.error(field, error.message, received) from error

    def answer(self, name: str, choices: Sequence[str], *, is_index: bool = False) -> str:
        """Return the gold answer; a letter or an index from 0 becomes the choice itself.

        Args:
            is_index: True if a number is an index in this format. In others, a number equal to a choice's text is
                refused.
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
        """Return the choice of an answer; the answer itself if there are no choices."""
        if not choices:
            return text
        found = gold_choice(text, choices) or (stated_choice(text, choices) if is_sentence else None)
        if found is None:
            raise self.error(name, "the answer is none of the choices", text)
        return found

    def gold(self, name: str, text: str, choices: Sequence[str]) -> tuple[str, str | None]:
        """Return a completion's answer, and the completion itself if it is a trace and not only an answer."""
        words, parsed = self.clean(name, text), parse_text(text)
        if not parsed.texts:
            if not words:
                raise self.error(name, "is empty", text)
            try:
                require_no_marks(words)
            except AudioMarkError as error:
                raise self.error(name, str(error), text) from error
            return self.chosen(name, words, choices, is_sentence=True), None
        if parsed.answer_text is None:
            raise self.error(name, "is a trace without an answer (FINAL_ANSWER or RESPONSE)", text)
        return self.chosen(name, self.clean(name, parsed.answer_text), choices, is_sentence=True), text


def shown(value: object) -> str:
    """Return a value for a message, cut to `MAX_SHOWN_CHARS`."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def read_rows(path: Path, audio_root: Path | None, *, is_table: bool | None) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        audio_root: Start of relative audio paths; the file's own folder if None.
        is_table: True for a CSV file; guessed from its name and first byte if None.

    Raises:
        ExampleError: The file cannot be read as rows.
    """
    try:
        with path.open("rb") as file:
            start = file.peek(1).removeprefix(BOM_UTF8).lstrip()[:1]
            if is_table is None:
                is_table = path.suffix.lower() == ".csv" or start not in (b"[", b"{", b"")
            if is_table:
                yield from _read_table(file, path, audio_root)
            elif start == b"[":
                yield from _read_array(file, path, audio_root)
            else:
                yield from _read_json_lines(file, path, audio_root)
    except OSError as error:
        raise ExampleError(str(path), f"cannot read the file ({error.strerror or error})") from error


def _read_lines(file: BufferedReader, path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers and ends, decoded one by one to report a bad byte by its line."""
    for number in count(1):
        raw = file.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_LINE_BYTES:
            raise ExampleError(f"{path}, line {number}", f"the line has more than {MAX_LINE_BYTES} bytes")
        yield number, _decode(raw, path, number)


def _decode(raw: bytes, path: Path, line: int) -> str:
    """Decode bytes from the beginning of a line."""
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        # Counted in the codec's input, without the byte order mark.
        seen = error.object
        source = f"{path}, line {line + seen.count(10, 0, error.start)}"
        byte = error.start - seen.rfind(10, 0, error.start)
        bad = shown(seen[error.start : error.start + 1])
        raise ExampleError(source, f"not UTF-8 at byte {byte}", received=bad) from error


def _read_json_lines(file: BufferedReader, path: Path, audio_root: Path | None) -> Iterator[Row]:
    for number, line in _read_lines(file, path):
        if line.strip():
            yield _json_row(_load_json(line, path, number), path, audio_root, "line", number)


def _read_array(file: BufferedReader, path: Path, audio_root: Path | None) -> Iterator[Row]:
    raw = file.read(MAX_ARRAY_BYTES + 1)
    if len(raw) > MAX_ARRAY_BYTES:
        problem = f"the JSON array has more than {MAX_ARRAY_BYTES} bytes, and arrays are loaded whole"
        raise ExampleError(str(path), f"{problem}: write one object a line instead")
    for number, item in enumerate(cast("list[object]", _load_json(_decode(raw, path, 1), path, None)), 1):
        yield _json_row(item, path, audio_root, "item", number)


def _load_json(text: str, path: Path, line: int | None) -> object:
    """Parse a line, or a whole file if `line` is None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        source = f"{path}, line {error.lineno if line is None else line}"
        rest = text[error.pos : error.pos + MAX_SHOWN_CHARS].partition("\n")[0]
        problem = f"not JSON at column {error.colno} ({error.msg})"
        raise ExampleError(source, problem, received=shown(rest) if rest else "nothing more") from error
    except (ValueError, RecursionError) as error:
        # A number with thousands of digits, or thousands of nested brackets.
        source = str(path) if line is None else f"{path}, line {line}"
        raise ExampleError(source, "not JSON that can be read", received=shown(text[:MAX_SHOWN_CHARS])) from error


def _json_row(item: object, path: Path, audio_root: Path | None, place: str, number: int) -> Row:
    if not isinstance(item, dict):
        raise ExampleError(f"{path}, {place} {number}", "the row is no object", received=shown(item))
    return Row(path, audio_root, place, number, cast("dict[str, object]", item))


def _read_table(file: BufferedReader, path: Path, audio_root: Path | None) -> Iterator[Row]:
    records = _read_records(file, path)
    number, header = next(records, (1, list[str]()))
    if not header:
        return
    header = [name.strip() for name in header]
    source = f"{path}, line {number}"
    for name in CSV_COLUMNS:
        if name not in header:
            raise ExampleError(source, "the header has no such column", field=name, received=shown(header))
    for name in header:
        if header.count(name) > 1:
            raise ExampleError(source, "the header has this column twice", field=name)
    for number, record in records:
        if len(record) != len(header):
            problem = f"the row has {len(record)} values where the header has {len(header)}"
            raise ExampleError(f"{path}, line {number}", problem)
        yield Row(path, audio_root, "line", number, dict(zip(header, record, strict=True)), is_csv=True)


def _read_records(file: BufferedReader, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield each non-blank record with the number of its first line."""
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
