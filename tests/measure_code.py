"""Measures of the code base and its prose: `python -m tests.measure_code` prints one JSON line.

It reads only syntax trees and Markdown, and imports nothing of the project. Tests are not measured.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from tests.prose import HISTORY, ROOT, documents, share_of_long_sentences, worst_files

PACKAGES = ("hyper_model", "server", "training", "loadtests", "client")
PROSE_PACKAGES = ("hyper_model", "server", "training", "loadtests")
WH_WORD = re.compile(r"\b(?:that|which|what|where)\b", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
MAX_FUNCTION_LINES = 60
MAX_SENTENCE_WORDS = 30

HELP = """
import_cycles                 groups of modules that import each other, imports inside functions included
training_modules_in_one_folder  largest number of modules (without __init__) in one folder below training/
public_docstrings             share of public modules, classes and functions that have a docstring
broad_excepts                 `except:`, `except Exception` and `except BaseException`
wh_words_per_1000             that/which/what/where per 1,000 docstring words, the largest over the packages
sentences_over_30_words       share in README, CHANGELOG, CONTRIBUTING, docs/, loadtests/ and the model cards.
                              docs/LOG.md is excluded, because its dated entries keep their wording;
                              sentences_over_30_words_with_log includes it. Code blocks, headings and
                              short fragments (below 4 words, in table cells below 8) are not sentences.
functions_over_60_lines       functions longer than 60 lines, signature and docstring included
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the measures as one JSON line; with `--by-file`, print the worst places before it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.measure_code",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--by-file", action="store_true", help="also list the worst files and functions, on stderr")
    if parser.parse_args(arguments).by_file:
        for title, lines in worst_places():
            print(f"\n{title}", *lines, sep="\n  ", file=sys.stderr)
    print(json.dumps(measure()))


def measure() -> dict[str, float | int]:
    """Return every measure by its name."""
    present, missing = public_names()
    without_log = [path for path in documents() if path != HISTORY]
    wh_words = {package: wh_words_per_1000(_modules_of(package)) for package in PROSE_PACKAGES}
    return {
        "import_cycles": len(import_cycles()),
        "training_modules_in_one_folder": max(modules_per_folder("training").values()),
        "public_docstrings": round(len(present) / (len(present) + len(missing)), 3),
        "broad_excepts": len(broad_excepts()),
        "wh_words_per_1000": max(wh_words.values()),
        **{f"wh_words_per_1000_{package}": rate for package, rate in wh_words.items()},
        "sentences_over_30_words": round(share_of_long_sentences(without_log, max_words=MAX_SENTENCE_WORDS), 3),
        "sentences_over_30_words_with_log": round(
            share_of_long_sentences(documents(), max_words=MAX_SENTENCE_WORDS), 3
        ),
        "functions_over_60_lines": len(long_functions()),
    }


def worst_places() -> Iterator[tuple[str, list[str]]]:
    """Yield a title and the worst files or functions for each measure."""
    yield "import cycles", [" - ".join(cycle) for cycle in import_cycles()]
    yield "public names without a docstring", public_names()[1]
    yield "broad excepts", broad_excepts()
    counts = {name: _wh_count(module) for name, module in modules().items() if name.split(".")[0] in PROSE_PACKAGES}
    by_excess = sorted(counts, key=lambda name: counts[name][0] - counts[name][1] * 0.02, reverse=True)
    yield (
        "wh-words per 1,000 docstring words (count of words), by their number above 20 per 1,000",
        [
            f"{1000 * wh / max(1, words):5.1f}  ({words:5d})  {name}"
            for name in by_excess
            for wh, words in [counts[name]]
            if wh > words * 0.02
        ],
    )
    yield (
        f"share of sentences over {MAX_SENTENCE_WORDS} words",
        [f"{share:.3f}  {path}" for share, path in worst_files(documents(), max_words=MAX_SENTENCE_WORDS) if share],
    )
    yield f"functions over {MAX_FUNCTION_LINES} lines", [f"{lines:4d}  {name}" for lines, name in long_functions()]


@cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of every module of the packages by its dotted name; a package means its `__init__`."""
    found: dict[str, ast.Module] = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


def modules_per_folder(package: str) -> Counter[Path]:
    """Count the modules of each folder of a package, without `__init__`."""
    paths = (ROOT / package).rglob("*.py")
    return Counter(path.parent.relative_to(ROOT) for path in paths if path.name != "__init__.py")


def import_cycles() -> list[list[str]]:
    """Return the strongly connected groups of two or more modules, imports inside functions included."""
    graph = {name: _imports(name) for name in modules()}
    reach: dict[str, set[str]] = {}
    for name in graph:
        todo, seen = list(graph[name]), set[str]()
        while todo:
            current = todo.pop()
            if current not in seen:
                seen.add(current)
                todo.extend(graph[current])
        reach[name] = seen
    groups = {frozenset({name, *(other for other in reach[name] if name in reach[other])}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _imports(module: str) -> set[str]:
    """Return our own modules imported by a module; a name from a package counts as its sub-module if it is one."""
    names: set[str] = set()
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(target if target in modules() else node.module for target in targets)
    return {name for name in names if name in modules()} - {module}


def public_names() -> tuple[list[str], list[str]]:
    """Return the public modules, classes, functions and methods with a docstring, and those without one."""
    present: list[str] = []
    missing: list[str] = []
    for module, tree in modules().items():
        for name, node in _public(module, tree):
            (present if ast.get_docstring(node) else missing).append(name)
    return present, missing


def _public(name: str, node: Documented) -> Iterator[tuple[str, Documented]]:
    """Yield a definition and the public ones directly inside modules and classes; not those inside functions."""
    yield name, node
    for child in [] if isinstance(node, Function) else node.body:
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            yield from _public(f"{name}.{child.name}", child)


def broad_excepts() -> list[str]:
    """Return module and line of each handler for Exception, BaseException or all exceptions."""
    return [
        f"{module}:{node.lineno}"
        for module, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and _is_broad(node.type)
    ]


def _is_broad(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(_is_broad(element) for element in caught.elts)
    return caught is None or (isinstance(caught, ast.Name) and caught.id in {"Exception", "BaseException"})


def wh_words_per_1000(trees: Mapping[str, ast.Module]) -> float:
    """Return the number of wh-words per 1,000 docstring words of some modules; 0.0 without any docstring."""
    counts = [_wh_count(tree) for tree in trees.values()]
    words = sum(words for _, words in counts)
    return round(1000 * sum(wh for wh, _ in counts) / words, 1) if words else 0.0


def _wh_count(tree: ast.Module) -> tuple[int, int]:
    """Count the wh-words and all words of a module's docstrings, strings below attributes included."""
    texts = [
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return sum(len(WH_WORD.findall(text)) for text in texts), sum(len(WORD.findall(text)) for text in texts)


def _modules_of(package: str) -> dict[str, ast.Module]:
    return {name: tree for name, tree in modules().items() if name.split(".")[0] == package}


def long_functions() -> list[tuple[int, str]]:
    """Return (lines, name) of each function over `MAX_FUNCTION_LINES` lines, the longest first."""
    lengths: dict[str, int] = {}
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, Function) and node.end_lineno:
                lengths[f"{module}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
    return sorted(((lines, name) for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES), reverse=True)


if __name__ == "__main__":
    main()
