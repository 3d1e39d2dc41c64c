"""Texts for users stay plain: README, docs, CLI help, error messages, metric HELP, alerts and panel descriptions.

The rules are a list of banned wordings and a sentence length. docs/LOG.md is excluded, because
dated entries keep their wording.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import yaml

from hyper_model.cli import hyper
from loadtests.__main__ import main as loadtests
from server.telemetry.metrics import Metrics
from tests.prose import HISTORY, ROOT, Sentence, documents, markdown_lines, markdown_sentences, split_sentences

MAX_WORDS = 30
MAX_DOCUMENT_WORDS = 50
MAX_LONG_SHARE = 0.06
"""Largest share of document sentences over `MAX_WORDS`; none may exceed `MAX_DOCUMENT_WORDS`."""

BANNED = {
    # Archaic or ornate forms.
    r"whoever|whosoever|whomever|whichever|whatsoever": "name the actor or the thing",
    r"nobody|somebody|everybody": "name the actor, or use the passive",
    r"in vain|of late|lest|thereof|therein|wherein|whereby|hither|betwixt|albeit|ere long": "use the common word",
    r"whose turn|comes? to be|came of it|comes of it|what is theirs|or so it seems": "say the fact",
    r"an? \w+ (?:a|an) (?:second|minute|hour|day|clip|token|step|sample|completion|line)": "use 'per'",
    # Private words for things that have a common name.
    r"strangers?": "use 'untrusted client'",
    r"rivals?": "use 'baseline'",
    r"tortur\w+": "use 'stress'",
    r"knock\w*": "use 'request'",
    r"(?:the|a|our|into|out of|outside of) (?:box|door|house)": "use 'sandbox', 'endpoint' or 'service'",
    r"twins?": "use 'shadow' or 'copy'",
    r"liars?|lies about|lied": "use 'wrong' or 'invalid'",
    r"giv(?:es?|en|ing) up|gave up": "use 'aborted'",
    # Software decodes, stores, sends and reports.
    r"(?:service|server|engine|decoder|gate|client|checkpoint|endpoint|address|library|kernel|file|page|log)s? "
    r"(?:hears?|knows?|says?|asks?|thinks?|feels?|tells?|wants?|promises?|heeds?)": (
        "software reports, sends, stores, requires"
    ),
    r"(?:is|are|was|were|be|been) (?:told|begun)|begun otherwise|told apart": "use 'reported', 'started'",
}


@dataclass(frozen=True)
class Text:
    """A text for users with its place in the repository."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def violations(texts: Sequence[Text]) -> list[str]:
    """Return file, line, offending text and the remedy for each banned wording."""
    return [
        f"{text}\n    '{match[0]}': {remedy}"
        for text in texts
        for pattern, remedy in BANNED.items()
        if (match := re.search(rf"\b(?:{pattern})\b", text.text, re.IGNORECASE))
    ]


def too_long(texts: Sequence[Text], max_words: int = MAX_WORDS) -> list[str]:
    """Return file, line and text of each sentence over the limit."""
    sentences = [(text, sentence) for text in texts for sentence in split_sentences(text.text)]
    return [
        f"{text.file}:{text.line}: {sentence.num_words} words: {sentence.text}"
        for text, sentence in sentences
        if sentence.num_words > max_words
    ]


def document_lines() -> list[Text]:
    """Return the lines of all documents without code, docs/LOG.md excluded."""
    return [
        Text(str(path.relative_to(ROOT)), line, text)
        for path in documents()
        if path != HISTORY
        for line, text in markdown_lines(path.read_text(encoding="utf-8"))
    ]


def help_texts() -> list[Text]:
    """Return the help of all commands and options, and of the Makefile's targets."""
    texts = [text for command in (hyper, loadtests) for text in command_texts(command, command.name or "loadtests")]
    for number, line in enumerate((ROOT / "Makefile").read_text(encoding="utf-8").splitlines(), 1):
        if match := re.match(r"[a-z-]+:.*## (.*)", line):
            texts.append(Text("Makefile", number, match[1]))
    return texts


def command_texts(command: click.Command, name: str) -> Iterator[Text]:
    """Yield the help of a command, its options and its sub-commands; the file is the command line."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        # After \b, click keeps the lines, each an item of its own.
        items = paragraph.splitlines() if paragraph.startswith("\b") else [paragraph]
        yield from (Text(f"{name} --help", 1, " ".join(item.split())) for item in items)
    context = click.Context(command)
    for option in command.params:
        if isinstance(option, click.Option) and (record := option.get_help_record(context)):
            yield Text(f"{name} {option.opts[-1]}", 1, record[1])
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from command_texts(found, f"{name} {child}")


def error_texts() -> list[Text]:
    """Return the messages and hints of raised errors, and strings assigned to `message` and `hint`."""
    texts: list[Text] = []
    for package in ("hyper_model", "server", "training", "client"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                texts += [
                    Text(str(path.relative_to(ROOT)), value.lineno, text)
                    for value in error_values(node)
                    if (text := template(value))
                ]
    return texts


def error_values(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions of a node that hold an error's message or hint."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if re.search(
            r"(?:Error|Exception|BadParameter)$", name
        ):
            yield from node.args
            yield from (keyword.value for keyword in node.keywords if keyword.arg in ("message", "hint"))
        case ast.Assign(targets=[ast.Name(id="message" | "hint")]):
            yield node.value
        case _:
            pass


def template(value: ast.expr) -> str:
    """Return a string literal or f-string with VALUE for each replacement field; empty for other expressions."""
    match value:
        case ast.Constant(value=str(text)) if " " in text:
            return text
        case ast.JoinedStr(values=parts):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "VALUE" for part in parts)
        case _:
            return ""


def operator_texts() -> list[Text]:
    """Return metric HELP, alert annotations and the descriptions of dashboard panels."""
    exposition = Metrics().render().decode()
    texts = [
        Text(f"HELP {name}", 1, text)
        for name, text in re.findall(r"^# HELP (hyper_\S+) (.*)$", exposition, re.MULTILINE)
    ]
    rules = "deploy/prometheus/rules.yml"
    for group in yaml.safe_load((ROOT / rules).read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            texts += [Text(f"{rules} {rule['alert']}", 1, text) for text in rule.get("annotations", {}).values()]
    dashboard = "deploy/grafana/dashboards/hyper.json"
    panels = json.loads((ROOT / dashboard).read_text(encoding="utf-8"))["panels"]
    return texts + [Text(f"{dashboard} {panel['title']}", 1, panel.get("description") or "") for panel in panels]


@pytest.mark.parametrize("texts", [document_lines, help_texts, error_texts, operator_texts], ids=lambda f: f.__name__)
def test_texts_have_no_banned_wording(texts: type[Sequence[Text]]) -> None:
    found = texts()
    assert len(found) > 50, "the collector finds no texts"
    assert not (wrong := violations(found)), "\n" + "\n".join(wrong)


@pytest.mark.parametrize("texts", [help_texts, error_texts, operator_texts], ids=lambda f: f.__name__)
def test_sentences_of_help_errors_and_metrics_are_short(texts: type[Sequence[Text]]) -> None:
    assert not (wrong := too_long(texts())), "\n" + "\n".join(wrong)


def test_sentences_of_documents_are_short() -> None:
    """Few sentences exceed the limit, and none by far."""
    sentences: list[tuple[Path, Sentence]] = [
        (path, sentence)
        for path in documents()
        if path != HISTORY
        for sentence in markdown_sentences(path.read_text(encoding="utf-8"))
    ]
    long = [(path, sentence) for path, sentence in sentences if sentence.num_words > MAX_WORDS]
    listing = "\n".join(
        f"{path.relative_to(ROOT)}:{sentence.line}: {sentence.num_words} words: {sentence.text}"
        for path, sentence in long
    )
    assert len(long) <= MAX_LONG_SHARE * len(sentences), "\n" + listing
    assert all(sentence.num_words <= MAX_DOCUMENT_WORDS for _, sentence in long), "\n" + listing


def test_paths_and_links_in_documents_exist() -> None:
    """A path is a code span such as `server/app.py`; a link is relative, with or without an anchor."""
    missing: list[str] = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target and not (path.parent / target).exists():
                missing.append(f"{path.relative_to(ROOT)}: link {target}")
        if path == HISTORY:
            continue
        for target in re.findall(
            r"`((?:hyper_model|server|training|loadtests|tests|client|deploy|docs)/[\w./-]+)`", text
        ):
            if "NAME" not in target and not (ROOT / target).exists():
                missing.append(f"{path.relative_to(ROOT)}: path {target}")
    assert not missing, "\n" + "\n".join(missing)


def test_anchors_in_documents_exist() -> None:
    """GitHub's anchor of a heading: lower case, without punctuation, hyphens for spaces."""
    missing: list[str] = []
    for path in documents():
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8")):
            page = path.parent / target if target else path
            if "://" in target or not page.exists():
                continue
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            if anchor not in anchors:
                missing.append(f"{path.relative_to(ROOT)}: {target}#{anchor}")
    assert not missing, "\n" + "\n".join(missing)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Whoever sends it gets 422.", 1),
        ("The service knows the rival.", 2),
        ("The service reports three requests per second.", 0),
    ],
)
def test_banned_wordings_are_found(text: str, number: int) -> None:
    assert len(violations([Text("example.md", 1, text)])) == number


def test_a_long_sentence_is_named_with_its_line() -> None:
    markdown = "# Title\n\nShort one here now.\n" + "word " * (MAX_WORDS + 1) + "\n\n    code is not prose\n"
    (first, second) = markdown_sentences(markdown)
    assert (first.line, second.line) == (3, 4) and second.num_words == MAX_WORDS + 1
