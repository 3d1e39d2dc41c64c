"""`hyper ask` for one clip, standard input, or a folder. Imports are inside functions, so `--help` stays quick."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

if TYPE_CHECKING:
    from hyper.client import Client
    from hyper.events import Event, EventStream
    from hyper.protocol import AskOptions
    from server.api.types import Answer, QaReply

EXIT_REFUSED = 1
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT)
MAX_PIPE_BYTES = 512 * 2**20
"""A pipe without an end, such as /dev/zero, would fill the memory."""

DEFAULT_URL = "http://127.0.0.1:8000"
STANDARD_INPUT = Path("-")
FOLDER_RETRIES = 5
"""Retries per clip of a folder: a run of many clips should survive a restart of the service."""


@click.command()
@click.argument("clip", type=click.Path(exists=True, allow_dash=True, path_type=Path))
@click.argument("question")
@click.option("--choice", "choices", multiple=True, help="One choice of a multiple-choice question; give at least two.")
@click.option("--url", default=DEFAULT_URL, envvar="HYPER_URL", show_default=True, help="Address of the service.")
@click.option("--key", envvar=["HYPER_API_KEY", "HYPER_KEY"], help="API key (HYPER_API_KEY), if the service needs one.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole reply as JSON; with --stream, each event.")
@click.option("--stream", is_flag=True, help="Print the trace while the model writes it.")
@click.option(
    "--long-audio",
    type=click.Choice(["error", "window", "chunk"]),
    help="Handling of recordings over one window: refuse, one window at --start, or all windows.  [default: error]",
)
@click.option("--start", "start_s", type=click.FloatRange(0), help="Start of the window in seconds.")
@click.option("--timeline", is_flag=True, help="Also print the windows of a recording; implies --long-audio chunk.")
@click.option(
    "--parallel", type=click.IntRange(1, 64), default=4, show_default=True, help="Requests at once per folder."
)
def ask(
    clip: Path,
    question: str,
    choices: tuple[str, ...],
    url: str,
    key: str | None,
    as_json: bool,
    stream: bool,
    long_audio: Literal["error", "window", "chunk"] | None,
    start_s: float | None,
    timeline: bool,
    parallel: int,
) -> None:
    """Ask the service QUESTION about the audio file CLIP.

    CLIP may be a pipe, or - for standard input. If CLIP is a folder, ask about each file in it and print one JSON
    object per line: the path as `clip`, and the `reply` or the `error`. The exit code is 1 if any clip has no answer.
    """
    from hyper import Client, Error

    is_folder = clip != STANDARD_INPUT and clip.is_dir()
    if is_folder and stream:
        raise click.UsageError("--stream needs one clip, and CLIP is a folder.")
    options: AskOptions = {}
    if long_audio is not None or timeline:
        options["long_audio"] = long_audio or "chunk"
    if start_s is not None:
        options["start_s"] = start_s
    try:
        with Client(url, api_key=key or None, timeout_s=None, max_retries=FOLDER_RETRIES if is_folder else 0) as client:
            if is_folder:
                ask_folder(client, clip, question, choices, parallel, options)
                return
            source = clip if clip.is_file() else read_pipe(clip)
            if stream:
                with client.ask(source, question, choices=choices, stream=True, **options) as events:
                    show_stream(events, as_json=as_json)
            else:
                reply = client.ask(source, question, choices=choices, **options)
                show_reply(reply, as_json=as_json, shows_timeline=timeline)
    except BrokenPipeError:
        # The reader of our output has seen enough.
        sys.stdout = None
        sys.exit(EXIT_REFUSED)
    except OSError as error:
        if error.errno in UNWRITABLE:
            refuse(f"the output cannot be written: {error.strerror}.")
        refuse(f"{clip} cannot be read: {error.strerror or error}.")
    except (Error, ValueError) as error:
        refuse(str(error))


def read_pipe(path: Path) -> bytes:
    """Read a pipe or standard input to its end.

    Raises:
        OSError: It cannot be read.
    """
    is_standard_input = path == STANDARD_INPUT
    name = "standard input" if is_standard_input else str(path)
    if is_standard_input and sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]
        refuse("standard input is closed.")
    with contextlib.nullcontext(sys.stdin.buffer) if is_standard_input else path.open("rb") as file:
        data = file.read(MAX_PIPE_BYTES + 1)
    if not data:
        refuse(f"{name} is empty.")
    if len(data) > MAX_PIPE_BYTES:
        refuse(f"{name} does not end within {MAX_PIPE_BYTES // 2**20} MiB.")
    return data


def ask_folder(
    client: Client, folder: Path, question: str, choices: Sequence[str], parallel: int, options: AskOptions
) -> None:
    """Print one line per clip in the order of the paths, and exit with 1 if a clip has no answer."""
    from concurrent.futures import ThreadPoolExecutor

    from hyper_model.sse import to_json

    # A link to nothing is named in the output, like any file that cannot be read.
    paths = sorted(
        path
        for path in folder.rglob("*")
        if (path.is_file() or (path.is_symlink() and not path.exists())) and not is_hidden(path.relative_to(folder))
    )
    if not paths:
        refuse(f"{folder} has no files.")
    num_refused = 0

    def ask_one(path: Path) -> dict[str, Any]:
        return outcome_of(client, path, question, choices, options)

    with ThreadPoolExecutor(parallel) as pool, progress(len(paths)) as advance, contextlib.ExitStack() as undo:
        # After an exception, clips in the queue are not asked.
        undo.callback(pool.shutdown, wait=False, cancel_futures=True)
        for path, outcome in zip(paths, pool.map(ask_one, paths), strict=True):
            num_refused += "error" in outcome
            click.echo(to_json({"clip": path.relative_to(folder).as_posix(), **outcome}))
            advance()
        undo.pop_all()
    if num_refused:
        refuse(f"{num_refused} of {len(paths)} clips have no answer.")


def is_hidden(path: Path) -> bool:
    """Return whether a part of a relative path begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def outcome_of(
    client: Client, path: Path, question: str, choices: Sequence[str], options: AskOptions
) -> dict[str, Any]:
    """Ask about one clip of a folder.

    Raises:
        Error: The service is not reachable, or refuses the key; the other clips would fail too.
    """
    from hyper import AuthenticationError, PermissionDeniedError, ServiceError, UnexpectedReplyError
    from hyper.protocol import dump

    try:
        return {"reply": dump(client.ask(path, question, choices=choices, **options))}
    except (AuthenticationError, PermissionDeniedError):
        raise
    except ServiceError as error:
        return {"error": dump(error.error)}
    except UnexpectedReplyError as error:
        return {"error": {"code": "unexpected_reply", "message": str(error)}}
    except OSError as error:
        return {"error": {"code": "unreadable_file", "message": f"The file cannot be read: {error.strerror}."}}


@contextlib.contextmanager
def progress(length: int) -> Generator[Callable[[], None]]:
    """Show a progress bar on a terminal's standard error, if the lines go elsewhere."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        yield lambda: None
        return
    with click.progressbar(length=length, label="clips", file=sys.stderr, show_pos=True) as bar:
        yield lambda: bar.update(1)


def show_reply(reply: QaReply, *, as_json: bool, shows_timeline: bool = False) -> None:
    """Print the answer and its evidence."""
    from hyper.protocol import dump

    if as_json:
        click.echo(json.dumps(dump(reply), indent=2, ensure_ascii=False))
        return
    click.echo(answer_line(reply.answer))
    for title, text in evidence(reply):
        if text:
            click.echo(f"  {title + ':':<12} {text}")
    for line in timeline_lines(reply) if shows_timeline else ():
        click.echo(line)
    for warning in (*reply.warnings, *(warning for clip in reply.audio for warning in clip.warnings)):
        click.echo(f"  warning: {warning.message}", err=True)


def evidence(reply: QaReply) -> Iterator[tuple[str, str | None]]:
    """Yield the lines below an answer: title and text."""
    for place in reply.answer.evidence:
        yield "evidence", f"{clock(place.start_s)} to {clock(place.end_s)}: {place.quote or 'no words'}"
    if reply.answer.evidence:
        return
    if reply.perception is not None:
        yield "background", reply.perception.environment_text
        for voice in reply.perception.speakers:
            yield voice.id, f"{voice.description}: {' '.join(voice.quotes)}"
        yield "words", reply.perception.transcript
    if reply.reasoning is not None:
        yield "because", reply.reasoning.summary


def timeline_lines(reply: QaReply) -> Iterator[str]:
    """Yield one line per window of a recording: its place, status, background and words."""
    for window in reply.timeline:
        parts = [", ".join(window.environment), window.transcript or "", window.error or ""]
        perceived = " | ".join(part for part in parts if part) or window.status
        mark = "*" if window.relistened else " "
        yield f"{mark} {clock(window.start_s)} to {clock(window.end_s)}  {perceived}"


def clock(seconds: float) -> str:
    """Return a time as minutes and seconds."""
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{int(minutes)}:{rest:04.1f}"


def show_stream(events: EventStream, *, as_json: bool) -> None:
    """Print events as they arrive: as one JSON object per line, or as the text of a trace."""
    from hyper import AnswerDone, Pause, SectionDelta, SectionStart, WindowDone
    from hyper_model.sse import to_json

    for event in events:
        match event:
            case _ if as_json:
                click.echo(to_json(event_object(event)))
            case SectionStart(section):
                click.echo(f"\n[{section}] ", nl=False)
            case SectionDelta(_, text):
                click.echo(text, nl=False)
            case Pause():
                click.echo(" ... ", nl=False)
            case WindowDone(_, status, done, of):
                click.echo(f"window {done} of {of}: {status}")
            case AnswerDone(answer):
                click.echo(f"\n\n{answer_line(answer)}")
            case _:
                pass


def event_object(event: Event) -> dict[str, Any]:
    """Return an event as the service sent it, with its name as `event`."""
    from hyper import AnswerDone, Done, UsageReport
    from hyper.protocol import dump

    match event:
        case AnswerDone(content) | UsageReport(content) | Done(content):
            data = dump(content)
        case _:
            data = dataclasses.asdict(event)
    return {"event": event.name, **data}


def answer_line(answer: Answer) -> str:
    """Return the answer, with its probability for a multiple-choice question."""
    return answer.text if answer.confidence is None else f"{answer.text}  ({answer.confidence:.0%})"


def refuse(message: str) -> NoReturn:
    """Print an error and exit."""
    click.echo(f"error: {message}", err=True)
    sys.exit(EXIT_REFUSED)
