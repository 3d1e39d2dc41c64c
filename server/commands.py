"""The commands `hyper serve`, `ask` and `keys`; imports are inside the functions, for a fast `hyper --help`."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

EXIT_REFUSED = 1
DEFAULT_URL = "http://127.0.0.1:8000"


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Checkpoint directory (HYPER_CHECKPOINT).")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "scripted"]),
    help="Engine: vllm, or scripted without a model (HYPER_ENGINE).",
)
@click.option("--host", help="Listening address (HYPER_HOST).")
@click.option("--port", type=int, help="Listening port; 0 selects a free one (HYPER_PORT).")
def serve(**options: Any) -> None:
    """Answer questions about clips over HTTP.

    HYPER_* variables set all other options; docs/operations.md explains them. SIGTERM stops the service after the
    requests in flight, with exit code 0. Exit code 70: the engine cannot be kept running. Exit code 78: the checkpoint
    cannot be served.
    """
    from pydantic import ValidationError

    from server.serving import run
    from server.settings import Settings, platform_variables, unknown_variables

    # Removed here once, so that neither the settings nor the engine's processes read them.
    ignored = platform_variables(os.environ)
    for name in ignored:
        del os.environ[name]
    if unknown := unknown_variables(os.environ):
        raise click.UsageError("\n".join(unknown))
    try:
        settings = Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        faults = [f"HYPER_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in error.errors()]
        raise click.UsageError("\n".join(faults)) from None
    sys.exit(run(settings, ignored))


@click.command()
@click.argument("clip", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.argument("question")
@click.option("--choice", "choices", multiple=True, help="One choice of a multiple-choice question; give at least two.")
@click.option("--url", default=DEFAULT_URL, envvar="HYPER_URL", show_default=True, help="Address of the service.")
@click.option("--key", envvar="HYPER_KEY", help="API key (HYPER_KEY), if the service requires one.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole reply as JSON; with --stream, each event.")
@click.option("--stream", is_flag=True, help="Print the trace while the model writes it.")
def ask(
    clip: Path, question: str, choices: tuple[str, ...], url: str, key: str | None, as_json: bool, stream: bool
) -> None:
    """Ask the service QUESTION about the audio file CLIP.

    CLIP may be a pipe, or - for standard input.
    """
    import httpx

    from hyper_model.proxies import is_local, proxy_hint, unusable_proxy

    if problem := unusable_proxy(url):
        refuse(problem)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    fields: dict[str, Any] = {"question": question, "choices": list(choices), "stream": str(stream).lower()}
    require_text(question, *choices)
    try:
        with (
            open_clip(clip) as file,
            httpx.Client(
                base_url=url,
                headers=headers,
                timeout=httpx.Timeout(10.0, read=None),
                # No proxy reaches an address of this machine.
                trust_env=not is_local(url),
            ) as client,
            client.stream("POST", "/v1/audio/qa", data=fields, files={"file": ("clip", file)}) as response,
        ):
            if not response.is_success:
                response.read()
                refuse(error_message(response))
            if stream:
                show_stream(response, as_json=as_json)
            else:
                response.read()
                show_reply(response.json(), as_json=as_json)
    except httpx.InvalidURL as error:
        refuse(f"{url} is not a valid address: {error}.")
    except httpx.RequestError as error:
        refuse(f"no reply from {url}: {error}. {proxy_hint(url).strip() or 'Is `hyper serve` running?'}")
    except OSError as error:
        refuse(f"{clip} cannot be read: {error.strerror or error}.")
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        refuse(f"the reply from {url} is not one of `hyper serve`. Check the address (--url).")


def open_clip(path: Path) -> IO[bytes]:
    """Open a file, or read a pipe or standard input to its end: an upload needs a length.

    Raises:
        OSError: If it cannot be read.
    """
    if str(path) != "-" and path.is_file():
        return path.open("rb")
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    if not data:
        refuse("standard input is empty." if str(path) == "-" else f"{path} is empty.")
    return io.BytesIO(data)


def require_text(*texts: str) -> None:
    """Refuse arguments with bytes that are not UTF-8, which the shell passes on and JSON cannot hold."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            refuse(f"{text.encode(errors='surrogateescape')!r} is not UTF-8 text; write it in UTF-8.")


@click.group()
def keys() -> None:
    """Create, list and revoke the API keys of a service.

    A running service with this HYPER_KEY_FILE applies changes within a second.
    """


KEY_FILE_OPTION = click.option(
    "--file",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="HYPER_KEY_FILE",
    required=True,
    help="Key file (HYPER_KEY_FILE).",
)


@keys.command()
@click.argument("name")
@KEY_FILE_OPTION
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["ask", "metrics"]),
    multiple=True,
    help="Endpoints of the key: questions or /metrics.  [default: ask]",
)
@click.option(
    "--priority",
    type=click.Choice(["interactive", "batch"]),
    default="interactive",
    show_default=True,
    help="Class of the key's requests; batch requests wait behind interactive ones.",
)
@click.option("--requests-per-minute", type=float, help="Maximum requests per minute; as many may arrive at once.")
@click.option("--concurrent", type=int, help="Maximum requests in flight.")
@click.option("--audio-s-per-day", type=float, help="Maximum seconds of audio per day.")
@click.option("--days", type=click.IntRange(min=1), help="Days until the key expires.")
def add(name: str, path: Path, scopes: tuple[str, ...], days: int | None, **limits: Any) -> None:
    """Create a key for NAME and print it once; the file stores only its hash."""
    from datetime import UTC, datetime, timedelta

    from server import api_keys as keys

    expires = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    click.echo(keys.add(path, name=name, scopes=scopes or ("ask",), expires=expires, **limits))


@keys.command("list")
@KEY_FILE_OPTION
def list_keys(path: Path) -> None:
    """List the keys with their scopes and limits."""
    from server import api_keys as keys

    for key in keys.read(path).keys:
        limits = {
            "requests/min": key.requests_per_minute,
            "in flight": key.concurrent,
            "audio s/day": key.audio_s_per_day,
        }
        bounds = ", ".join(f"{value:g} {name}" for name, value in limits.items() if value is not None)
        end = "expired" if key.is_expired() else f"until {key.expires:%Y-%m-%d}" if key.expires else ""
        facts = [key.starts + "...", "+".join(key.scopes), key.priority, bounds or "no limits", end]
        click.echo(f"{key.name:<20} {'  '.join(filter(None, facts))}")


@keys.command()
@click.argument("name")
@KEY_FILE_OPTION
def revoke(name: str, path: Path) -> None:
    """Revoke the key of NAME."""
    from server import api_keys as keys

    keys.revoke(path, name)


def show_reply(reply: dict[str, Any], *, as_json: bool) -> None:
    """Print the answer and its basis."""
    if reply["object"] != "audio.qa":
        raise ValueError
    if as_json:
        click.echo(json.dumps(reply, indent=2, ensure_ascii=False))
        return
    click.echo(answer_line(reply["answer"]))
    perception = reply["perception"]
    for title, text in (
        ("background", perception["environment_text"]),
        *((voice["id"], f"{voice['description']}: {' '.join(voice['quotes'])}") for voice in perception["speakers"]),
        ("words", perception["transcript"]),
        ("because", reply["reasoning"]["summary"]),
    ):
        if text:
            click.echo(f"  {title + ':':<12} {text}")
    for warning in reply["warnings"]:
        click.echo(f"  warning: {warning['message']}", err=True)


def show_stream(response: httpx.Response, *, as_json: bool) -> None:
    """Print events as they arrive: one JSON object per line, or the text of a trace."""
    from hyper_model.sse import to_json

    name = ""
    for name, data in events(response):
        if name == "error":
            refuse(data["error"]["message"])
        if as_json:
            click.echo(to_json({"event": name, **data}))
            continue
        match name:
            case "section.start":
                click.echo(f"\n[{data['section']}] ", nl=False)
            case "section.delta":
                click.echo(data["text"], nl=False)
            case "pause":
                click.echo(" ... ", nl=False)
            case "answer.done":
                click.echo(f"\n\n{answer_line(data)}")
            case _:
                pass
    if name != "done":
        refuse("the stream ended without a complete answer, or does not come from `hyper serve`.")


def events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and data of a reply's server-sent events, without pings."""
    from hyper_model.sse import read_events

    for name, data in read_events(response.iter_bytes()):
        yield name, json.loads(data)


def answer_line(answer: dict[str, Any]) -> str:
    """Return the answer, with its probability if the question had choices."""
    confidence = answer["confidence"]
    return answer["text"] if confidence is None else f"{answer['text']}  ({confidence:.0%})"


def error_message(response: httpx.Response) -> str:
    """Return the service's error in one line."""
    try:
        error = response.json()["error"]
        return " ".join(part for part in (error["message"], error["hint"]) if part)
    except (ValueError, KeyError, TypeError):
        return f"the service returned status {response.status_code} without an error object"


def refuse(message: str) -> None:
    """Print an error and exit."""
    click.echo(f"error: {message}", err=True)
    sys.exit(EXIT_REFUSED)
