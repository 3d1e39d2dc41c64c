"""Asks a suite's items over HTTP: of a HyPeR service, or of a server of OpenAI's chat API that takes `input_audio`.

So newer audio models can be put beside ours by whoever runs them. Every model hears the same: 16 kHz, 16 bit, one
channel, WAV. What came back is kept in a file, a line an item, as it came: a run that was interrupted goes on where it
stopped, and replies can be scored again without asking again. What failed for a moment (no connection, a timeout, 408,
429, 5xx) is tried again, later each time; what the server says it will never take is an item without a reply; what
would fail for every item (an address where nobody answers, a wrong key or model) ends the run.

Knows the API by its public names alone, and nothing of truths and figures.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import soundfile
from tqdm import tqdm

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.errors import HyperError
from hyper_model.trace import render_choice
from hyper_model.trace_parser import parse_text
from training.evaluation.score import Reply
from training.evaluation.suites import Item
from training.text_metrics import chosen, named_choice

Api = Literal["hyper", "openai"]

INSTRUCTION = "Answer with the letter and the words of one choice."
"""What is put behind the choices that an OpenAI-compatible server is given."""

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0

_PASSING_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_HOPELESS_STATUS = frozenset({401, 403, 404, 405})


class EndpointError(HyperError):
    """Nobody answers there, or whoever does will answer no item; says what to look at."""


@dataclass(frozen=True)
class Endpoint:
    """Says whom to ask, and how.

    Attributes:
        url: With or without `/v1`.
        model: As the server names it; the first that it lists when None. A HyPeR service has one.
        extra: Fields laid over an OpenAI request's body; one whose value is None is left out of it.
        instruction: What follows the choices in an OpenAI request.
        num_tries: Of each item.
    """

    url: str
    api: Api = "hyper"
    model: str | None = None
    api_key: str | None = None
    concurrency: int = 4
    timeout_s: float = 120.0
    num_tries: int = 6
    max_tokens: int = 512
    instruction: str = INSTRUCTION
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def base(self) -> str:
        """The address up to and with `/v1`."""
        base = self.url.rstrip("/").removesuffix("/chat/completions").removesuffix("/audio/qa")
        return base if base.endswith("/v1") else f"{base}/v1"

    def fingerprint(self, item: Item, model: str | None, *, cuts_long: bool) -> str:
        """Returns what a kept reply must have been asked with to stand for this item's."""
        asked = [self.base, self.api, model, self.max_tokens, self.instruction, dict(self.extra), cuts_long]
        return hashlib.sha256(json.dumps([item.id, item.digest(), *asked], sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Received:
    """Holds what came back for one item, as it is kept.

    Attributes:
        text: The model's own words: of a HyPeR service the trace with its tags.
        answer, choice_index, num_pauses, is_aborted: What a HyPeR service says beside them.
        ttft_s, e2e_s: Of the try that succeeded.
    """

    text: str = ""
    answer: str | None = None
    choice_index: int | None = None
    num_pauses: int | None = None
    is_aborted: bool | None = None
    model: str | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    error: str | None = None


class _PassingError(Exception):
    """A failure that may pass, and how long the server asks to wait."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


def ask(
    endpoint: Endpoint,
    items: Sequence[Item],
    *,
    kept: Path | None = None,
    cuts_long: bool = False,
    use_tqdm: bool = True,
) -> tuple[list[Reply], str]:
    """Asks every item.

    Args:
        kept: The file in which replies are kept, and from which an earlier run's are taken.

    Returns:
        The replies in the items' order, and the model's name as the server has it.

    Raises:
        EndpointError: Nobody answers, or whoever does will answer no item.
    """
    return asyncio.run(_ask(endpoint, items, kept, cuts_long=cuts_long, use_tqdm=use_tqdm))


async def _ask(
    endpoint: Endpoint, items: Sequence[Item], kept: Path | None, *, cuts_long: bool, use_tqdm: bool
) -> tuple[list[Reply], str]:
    headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    limits = httpx.Limits(max_connections=endpoint.concurrency)
    async with httpx.AsyncClient(headers=headers, timeout=endpoint.timeout_s, limits=limits) as client:
        model = endpoint.model or await _first_model(client, endpoint)
        keys = [endpoint.fingerprint(item, model, cuts_long=cuts_long) for item in items]
        known = _read_kept(kept) if kept is not None else {}
        found = {key: known[key] for key in keys if key in known}
        todo = iter([(key, item) for key, item in zip(keys, items, strict=True) if key not in found])
        with tqdm(total=len(items), initial=len(found), desc="questions", disable=not use_tqdm) as bar:

            async def work() -> None:
                for key, item in todo:
                    found[key] = await _ask_one(client, endpoint, model, item, cuts_long=cuts_long)
                    if kept is not None and found[key].error is None:
                        _keep(kept, key, item, found[key])
                    bar.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(endpoint.concurrency):
                        group.create_task(work())
            except* EndpointError as failures:
                # One that no item can escape ended all of them.
                raise EndpointError(str(failures.exceptions[0])) from failures
    received = [found[key] for key in keys]
    name = next((each.model for each in received if each.model), None) or model or endpoint.base
    return [read(item, each, endpoint.api) for item, each in zip(items, received, strict=True)], name


def read(item: Item, received: Received, api: Api) -> Reply:
    """Reads what came back: which choice it means, and the trace if it is one.

    A HyPeR service says itself which choice it took. Of any other reply the answer is what stands in FINAL_ANSWER,
    RESPONSE or `<answer>`, else the whole text; `training.text_metrics.chosen` says how a choice is read from it.
    """
    if received.error is not None:
        return Reply.failed(received.error)
    parsed, choices = parse_text(received.text), item.truth.choices
    answer = received.answer if received.answer is not None else (parsed.answer_text or received.text)
    choice = received.choice_index
    if api == "openai" and choices:
        choice = chosen(answer, choices)
    named = named_choice(answer, choices)
    return Reply(
        parsed,
        choice,
        # By a letter alone no rule by words could be met.
        answer.strip() if named is None else choices[named],
        num_pauses=received.num_pauses,
        is_aborted=received.is_aborted,
        ttft_s=received.ttft_s,
        e2e_s=received.e2e_s,
    )


def _read_kept(path: Path) -> dict[str, Received]:
    """Returns the replies of earlier runs; a last line that was cut off when a run ended is taken away."""
    found: dict[str, Received] = {}
    if not path.exists():
        return found
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        path.write_bytes(whole)
    for number, line in enumerate(whole.decode("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            found[row["key"]] = Received(**row["received"])
        except (ValueError, TypeError, KeyError) as error:
            raise EndpointError(f"{path}, line {number}: no kept reply ({_reason(error)})") from error
    return found


def _keep(path: Path, key: str, item: Item, received: Received) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"key": key, "id": item.id, "received": {k: v for k, v in vars(received).items() if v is not None}}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


async def _first_model(client: httpx.AsyncClient, endpoint: Endpoint) -> str | None:
    """Returns the first model that an OpenAI-compatible server lists; a HyPeR service names its own in each reply."""
    if endpoint.api == "hyper":
        return None
    url = f"{endpoint.base}/models"
    try:
        response = await client.get(url)
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise EndpointError(f"{url}: no list of models ({_reason(error)}); name one with --model") from error


async def _ask_one(
    client: httpx.AsyncClient, endpoint: Endpoint, model: str | None, item: Item, *, cuts_long: bool
) -> Received:
    try:
        clip = await asyncio.to_thread(lambda: to_wav(item, cuts_long=cuts_long))
    except HyperError as error:
        return Received(error=str(error))
    ask_once = _ask_hyper if endpoint.api == "hyper" else _ask_openai
    # The item's own, so that what one item waits does not depend on the others.
    rng = random.Random(item.id)
    reason, is_there, wait_s = "", True, 0.0
    for number in range(endpoint.num_tries):
        if number:
            await asyncio.sleep(wait_s)
        wait_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**number) * rng.uniform(0.5, 1.0)
        try:
            return await ask_once(client, endpoint, model, item, clip)
        except _PassingError as failure:
            reason, is_there = str(failure), True
            wait_s = wait_s if failure.wait_s is None else min(MAX_BACKOFF_S, failure.wait_s)
        except httpx.TimeoutException:
            reason, is_there = f"no reply in {endpoint.timeout_s:g} s", True
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise EndpointError(f"{endpoint.url}: no address ({_reason(error)})") from error
        except httpx.TransportError as error:
            reason, is_there = _reason(error), not isinstance(error, httpx.ConnectError)
    if not is_there:
        raise EndpointError(f"{endpoint.base}: nobody answers ({reason})")
    return Received(error=f"{reason}, {endpoint.num_tries} tries")


def to_wav(item: Item, *, cuts_long: bool) -> bytes:
    """Returns an item's clip as a WAV file: 16 kHz, 16 bit, one channel.

    Raises:
        HyperError: As `Item.load`.
    """
    file = io.BytesIO()
    soundfile.write(file, item.load(cuts_long=cuts_long), SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return file.getvalue()


async def _ask_hyper(
    client: httpx.AsyncClient, endpoint: Endpoint, model: str | None, item: Item, clip: bytes
) -> Received:
    started_s = time.perf_counter()
    fields = {"question": item.truth.question, "choices": list(item.truth.choices), "stream": "true"}
    ttft_s: float | None = None
    files = {"file": ("clip.wav", clip, "audio/wav")}
    async with client.stream("POST", f"{endpoint.base}/audio/qa", data=fields, files=files) as response:
        if (refusal := await _refusal(response)) is not None:
            return refusal
        async for name, text in _events(response.aiter_lines()):
            if ttft_s is None and name in ("section.start", "section.delta", "answer.delta"):
                ttft_s = time.perf_counter() - started_s
            if name == "error":
                raise _PassingError(_error_text(text))
            if name == "done":
                return _from_service(_parsed(text), ttft_s, time.perf_counter() - started_s)
    raise _PassingError("the stream ended before the reply did")


def _from_service(reply: Any, ttft_s: float | None, e2e_s: float) -> Received:
    try:
        return Received(
            text=reply["trace"]["raw"] or "",
            answer=reply["answer"]["text"],
            choice_index=reply["answer"]["choice_index"],
            num_pauses=reply["pause"]["count"],
            is_aborted=reply["termination"] == "aborted",
            model=reply["model"],
            ttft_s=ttft_s,
            e2e_s=e2e_s,
        )
    except (LookupError, TypeError) as error:
        raise EndpointError(f"no reply of a HyPeR service ({_reason(error)}): is it --api openai?") from error


async def _ask_openai(
    client: httpx.AsyncClient, endpoint: Endpoint, model: str | None, item: Item, clip: bytes
) -> Received:
    started_s = time.perf_counter()
    body = openai_body(endpoint, model, item, clip)
    ttft_s: float | None = None
    parts: list[str] = []
    async with client.stream("POST", f"{endpoint.base}/chat/completions", json=body) as response:
        if (refusal := await _refusal(response)) is not None:
            return refusal
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            message = _part(_parsed((await response.aread()).decode(errors="replace")), "message")
            return Received(_content(message), model=model, e2e_s=time.perf_counter() - started_s)
        async for _, text in _events(response.aiter_lines()):
            if text == "[DONE]":
                break
            chunk = _parsed(text)
            if isinstance(chunk, dict) and "error" in chunk:
                raise _PassingError(_error_text(text))
            delta = _part(chunk, "delta")
            if ttft_s is None and (_content(delta) or delta.get("reasoning_content") or delta.get("reasoning")):
                ttft_s = time.perf_counter() - started_s
            parts.append(_content(delta))
    return Received("".join(parts), model=model, ttft_s=ttft_s, e2e_s=time.perf_counter() - started_s)


def openai_body(endpoint: Endpoint, model: str | None, item: Item, clip: bytes) -> dict[str, Any]:
    """Returns the body of a chat request: the clip first, then question, choices and instruction as one text."""
    truth = item.truth
    lines = [truth.question, *(render_choice(index, truth.choices) for index in range(len(truth.choices)))]
    if truth.choices and endpoint.instruction:
        lines.append(endpoint.instruction)
    audio = {"data": base64.b64encode(clip).decode(), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": audio}, {"type": "text", "text": "\n".join(lines)}]
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": endpoint.max_tokens,
        "stream": True,
        **endpoint.extra,
    }
    return {name: value for name, value in body.items() if value is not None}


async def _refusal(response: httpx.Response) -> Received | None:
    """Returns why an item will never be answered, None where it is being answered.

    Raises:
        _PassingError: The server may answer later.
        EndpointError: It will answer no item.
    """
    if response.is_success:
        return None
    text = (await response.aread()).decode(errors="replace")
    reason = f"{response.status_code}: {_error_text(text)}"
    if response.status_code in _PASSING_STATUS:
        raise _PassingError(reason, _wait_s(response.headers.get("retry-after")))
    if response.status_code in _HOPELESS_STATUS:
        raise EndpointError(f"{response.request.url} answers {reason}")
    return Received(error=reason)


def _wait_s(header: str | None) -> float | None:
    try:
        return max(0.0, float(header)) if header else None
    except ValueError:  # A date, which few servers send.
        return None


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[tuple[str, str]]:
    """Yields (name, data) of each server-sent event; comments, which keep a connection alive, are passed over."""
    name, data = "message", list[str]()
    async for line in lines:
        if not line:
            if data:
                yield name, "\n".join(data)
            name, data = "message", []
        elif line.startswith("event:"):
            name = line.removeprefix("event:").strip()
        elif line.startswith("data:"):
            data.append(line.removeprefix("data:").removeprefix(" "))
    if data:
        yield name, "\n".join(data)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _PassingError(f"a reply that is no JSON ({text[:80]!r})") from error


def _part(reply: Any, name: str) -> dict[str, Any]:
    """Returns the `message` or `delta` of a reply's first choice; an empty one where there is none (a usage chunk)."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    part = choices[0].get(name) if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    return part if isinstance(part, dict) else {}


def _content(message: Mapping[str, Any]) -> str:
    """Returns a message's text; some servers send it in parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def _error_text(text: str) -> str:
    """Returns the message of an error object of either API, else the beginning of what came."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, LookupError, TypeError):
        return text[:200] or "an error without words"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
