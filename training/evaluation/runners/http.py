"""Run the items of a suite over HTTP, on a HyPeR service or a server with OpenAI's chat API and `input_audio`.

Any audio model behind such a server can be compared with ours. Every model receives the same clip: 16 kHz, 16 bit, one
channel, WAV. Replies are stored unchanged in a file, one line per item. An interrupted run therefore resumes, and
stored replies can be scored again without requests.

Transient failures (no connection, a timeout, 408, 429, 5xx) are retried with increasing delay. An item refused by the
server has no reply. An error for every item (an unreachable address, a wrong key or model) ends the run.

This module depends only on the public names of the API, and on no truth or figure.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
from tqdm import tqdm

from hyper_model.audio import Waveform
from hyper_model.errors import HyperError
from hyper_model.proxies import is_local, proxy_hint, unusable_proxy
from hyper_model.sse import read_events_async
from hyper_model.trace import render_choice
from hyper_model.trace_parser import parse_text
from training.evaluation.score import Reply
from training.evaluation.suites.item import Item
from training.text_metrics import chosen, named_choice

Api = Literal["hyper", "openai"]

INSTRUCTION = "Answer with the letter and the words of one choice."
"""Text after the choices in a request to an OpenAI-compatible server."""

FIRST_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
_MAX_NAMES = 10

_PASSING_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_HOPELESS_STATUS = frozenset({401, 403, 404, 405})


class EndpointError(HyperError):
    """The endpoint is unreachable or refuses every item; the message names the cause."""


@dataclass(frozen=True)
class Endpoint:
    """Address, API and request settings of a server.

    Attributes:
        url: With or without `/v1`.
        model: Name of the model on the server; None takes the first listed one. A HyPeR service has one model.
        extra: Fields to add to the body of an OpenAI request, or to replace in it; None removes a field.
        instruction: Text after the choices in an OpenAI request.
        num_tries: Tries per item.
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
        """Return the address up to and including `/v1`."""
        base = self.url.rstrip("/").removesuffix("/chat/completions").removesuffix("/audio/qa")
        return base if base.endswith("/v1") else f"{base}/v1"

    def fingerprint(self, item: Item, model: str | None, *, cuts_long: bool) -> str:
        """Return the key of a stored reply, a hash of the item with its sound, the model and all request settings."""
        settings = [self.base, self.api, model, self.max_tokens, self.instruction, dict(self.extra), cuts_long]
        return hashlib.sha256(json.dumps([item.id, item.digest(), *settings], sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Received:
    """The reply to one item, as stored.

    Attributes:
        text: The model's own text; from a HyPeR service, the trace with its tags.
        answer, choice_index, confidence, num_pauses, is_aborted: Further fields of a HyPeR service.
        ttft_s, e2e_s: Latencies of the successful try.
    """

    text: str = ""
    answer: str | None = None
    choice_index: int | None = None
    confidence: float | None = None
    num_pauses: int | None = None
    is_aborted: bool | None = None
    model: str | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    error: str | None = None


class _PassingError(Exception):
    """A transient failure, with the server's requested waiting time."""

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
    say: Callable[[str], object] = lambda text: None,
) -> tuple[list[Reply], str]:
    """Send every item to the server.

    Args:
        kept: File of stored replies. A reply of an earlier run is reused if clip, question, model and settings are the
            same.
        say: Called with a sentence about reused and repeated items.

    Returns:
        The replies in the items' order, and the server's name of the model.

    Raises:
        EndpointError: The endpoint is unreachable or refuses every item.
    """
    if problem := unusable_proxy(endpoint.url):
        raise EndpointError(problem)
    return asyncio.run(_ask(endpoint, items, kept, cuts_long=cuts_long, use_tqdm=use_tqdm, say=say))


async def _ask(
    endpoint: Endpoint,
    items: Sequence[Item],
    kept: Path | None,
    *,
    cuts_long: bool,
    use_tqdm: bool,
    say: Callable[[str], object],
) -> tuple[list[Reply], str]:
    headers = {"authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    limits = httpx.Limits(max_connections=endpoint.concurrency)
    async with httpx.AsyncClient(
        headers=headers, timeout=endpoint.timeout_s, limits=limits, trust_env=not is_local(endpoint.url)
    ) as client:
        model = endpoint.model or await _first_model(client, endpoint)
        is_named = endpoint.api == "openai" or kept is None
        served = model if is_named else await _checkpoint(client, endpoint)
        keys = [endpoint.fingerprint(item, served, cuts_long=cuts_long) for item in items]
        known, known_ids = _read_kept(kept) if kept is not None else ({}, set[str]())
        replies = {key: known[key] for key in keys if key in known}
        if known:
            say(_kept_and_repeated(items, keys, replies, known_ids))
        todo = iter([(key, item) for key, item in zip(keys, items, strict=True) if key not in replies])
        with tqdm(total=len(items), initial=len(replies), desc="questions", disable=not use_tqdm) as bar:

            async def work() -> None:
                for key, item in todo:
                    replies[key] = await _ask_one(client, endpoint, model, item, cuts_long=cuts_long)
                    if kept is not None and replies[key].error is None:
                        _keep(kept, key, item, replies[key])
                    bar.update()

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(endpoint.concurrency):
                        group.create_task(work())
            except* EndpointError as failures:
                # An error for every item cancelled all workers.
                raise EndpointError(str(failures.exceptions[0])) from failures
    received = [replies[key] for key in keys]
    name = next((reply.model for reply in received if reply.model), None) or model or endpoint.base
    return [read(item, reply, endpoint.api) for item, reply in zip(items, received, strict=True)], name


def read(item: Item, received: Received, api: Api) -> Reply:
    """Convert a stored reply: find its choice, and its trace if it has one.

    A HyPeR service returns the index of its choice. In any other reply, the answer is the text of FINAL_ANSWER,
    RESPONSE or `<answer>`, else the whole text. `training.text_metrics.chosen` matches it to a choice.
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
        # A letter alone would match no rule on words.
        answer.strip() if named is None else choices[named],
        received.confidence,
        num_pauses=received.num_pauses,
        is_aborted=received.is_aborted,
        ttft_s=received.ttft_s,
        e2e_s=received.e2e_s,
    )


def _kept_and_repeated(
    items: Sequence[Item], keys: Sequence[str], replies: Mapping[str, Received], known_ids: Collection[str]
) -> str:
    """Return a sentence with the number of reused replies and the names of repeated items."""
    text = f"{sum(key in replies for key in keys)} of {len(items)} replies are reused from the earlier run."
    again = [item.id for item, key in zip(items, keys, strict=True) if key not in replies and item.id in known_ids]
    if again:
        names = ", ".join(again[:_MAX_NAMES]) + (
            f" and {len(again) - _MAX_NAMES} more" if len(again) > _MAX_NAMES else ""
        )
        text += f" {len(again)} are sent again, because their clip, question, model or settings changed: {names}."
    return text


def _read_kept(path: Path) -> tuple[dict[str, Received], set[str]]:
    """Return the replies of earlier runs and the ids of their items; remove an incomplete last line from the file."""
    stored: dict[str, Received] = {}
    ids: set[str] = set()
    if not path.exists():
        return stored, ids
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        path.write_bytes(whole)
    for number, line in enumerate(whole.decode("utf-8").removesuffix("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            stored[row["key"]] = Received(**row["received"])
            ids.add(str(row.get("id")))
        except (ValueError, TypeError, KeyError) as error:
            raise EndpointError(f"{path}, line {number}: no kept reply ({_reason(error)})") from error
    return stored, ids


def _keep(path: Path, key: str, item: Item, received: Received) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"key": key, "id": item.id, "received": {k: v for k, v in vars(received).items() if v is not None}}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


async def _checkpoint(client: httpx.AsyncClient, endpoint: Endpoint) -> str | None:
    """Return the identity of a HyPeR service's checkpoint, since it may change at one address; None if unknown."""
    try:
        response = await client.get(f"{endpoint.base}/info")
        response.raise_for_status()
        checkpoint = response.json()["checkpoint"]
        return json.dumps([checkpoint["name"], checkpoint["manifest_sha256"]])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError, AttributeError):
        # The first question reports an unreachable service.
        return None


async def _first_model(client: httpx.AsyncClient, endpoint: Endpoint) -> str | None:
    """Return the first model listed by an OpenAI-compatible server; a HyPeR service names its model in each reply."""
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
    # Seeded per item, so that one item's delay does not depend on the others.
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
            raise EndpointError(f"{endpoint.url}: not a valid address ({_reason(error)})") from error
        except httpx.TransportError as error:
            reason, is_there = _reason(error), not isinstance(error, httpx.ConnectError)
    if not is_there:
        hint = proxy_hint(endpoint.base).rstrip(".")
        raise EndpointError(f"{endpoint.base}: no server at this address ({reason}){hint}")
    return Received(error=f"{reason}, {endpoint.num_tries} tries")


def to_wav(item: Item, *, cuts_long: bool) -> bytes:
    """Return an item's clip as a WAV file: 16 kHz, 16 bit, one channel.

    Raises:
        HyperError: As in `Item.load`.
    """
    return Waveform(item.load(cuts_long=cuts_long)).to_wav()


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
        async for name, text in read_events_async(response.aiter_bytes()):
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
            confidence=reply["answer"]["confidence"],
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
        async for _, text in read_events_async(response.aiter_bytes()):
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
    """Return the body of a chat request: first the clip, then question, choices and instruction as one text."""
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
    """Return the final refusal of an item as its reply, or None for a successful response.

    Raises:
        _PassingError: The server may answer later.
        EndpointError: The server refuses every item.
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
    except ValueError:  # A date; few servers send one.
        return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise _PassingError(f"a reply that is no JSON ({text[:80]!r})") from error


def _part(reply: Any, name: str) -> dict[str, Any]:
    """Return the `message` or `delta` of a reply's first choice; empty if absent, as in a usage chunk."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    part = choices[0].get(name) if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
    return part if isinstance(part, dict) else {}


def _content(message: Mapping[str, Any]) -> str:
    """Return the text of a message; some servers send it in parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def _error_text(text: str) -> str:
    """Return the message of an error object of either API, else the beginning of the text."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, LookupError, TypeError):
        return text[:200] or "an error without words"


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
