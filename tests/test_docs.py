"""The commands of the pages by task print the shown output, on a service over the scripted engine.

A page shows a command as `$ COMMAND`, continued by lines with `> `, and its output below. The commands print only the
parts of a reply that do not depend on the model.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.paths import ROOT
from tests.serving import Live

PAGES = ("ask.md", "stream.md", "transcribe.md", "openai.md", "files.md", "long-recordings.md", "jobs.md")
"""Pages by task; one that does not exist yet is left out."""

OWN_PAGES = ("ask.md", "stream.md", "transcribe.md")
"""Pages that show at least one command with its output."""

SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)
ADDRESS = "localhost:8000"


def commands(page: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a page with its output."""
    path = ROOT / "docs" / page
    for block in SHELL_BLOCK.findall(path.read_text(encoding="utf-8")) if path.exists() else ():
        lines: list[str] = []
        output: list[str] = []
        for line in block.splitlines():
            if line.startswith("$ "):
                if lines:
                    yield "\n".join(lines), "\n".join(output)
                lines, output = [line[2:]], []
            elif line.startswith("> ") and lines and not output:
                lines.append(line[2:])
            else:
                output.append(line)
        if lines:
            yield "\n".join(lines), "\n".join(output)


SHOWN = [(page, command, output) for page in PAGES for command, output in commands(page)]


@pytest.mark.parametrize(("page", "command", "output"), SHOWN, ids=[f"{n}-{each[0]}" for n, each in enumerate(SHOWN)])
def test_a_command_prints_what_its_page_shows(live: Live, page: str, command: str, output: str) -> None:
    run = subprocess.run(
        ["bash", "-c", command.replace(ADDRESS, live.url.removeprefix("http://"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == output.strip(), f"{page}: {command}"


@pytest.mark.parametrize("page", OWN_PAGES)
def test_a_page_by_task_shows_commands_with_output(page: str) -> None:
    shown = list(commands(page))
    assert len(shown) >= 3 and all(output.strip() for _, output in shown)
