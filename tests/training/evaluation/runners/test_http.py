"""Evaluation over HTTP: with our own real service, and with a small server for failures.

test_plain_vllm.py has the test with vLLM's own server, because it runs one.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hyper_model.trace_parser import parse_text
from tests.paths import CLIPS
from tests.serving import Live
from training.data.truth import Truth
from training.evaluation.runners.http import Endpoint, EndpointError, Received, ask, openai_body, read, to_wav
from training.evaluation.suites.data_file import data_items
from training.evaluation.suites.item import Item


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return data_items(CLIPS / "truth.json", num_items=5)[0]


Step = tuple[int, dict[str, str], bytes]
"""The server's next reply: status, headers, body."""


@contextlib.contextmanager
def answering(steps: Sequence[Step]) -> Iterator[tuple[str, list[Any]]]:
    """Serve these steps, one per request, the last one forever; yield the requests too."""
    asked: list[Any] = []
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with lock:
                status, headers, content = steps[min(len(asked), len(steps) - 1)]
                asked.append((self.path, dict(self.headers), json.loads(body)))
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join(10)


def chat(text: Any) -> Step:
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
    return 200, {"content-type": "application/json"}, body


def stream(*deltas: dict[str, Any]) -> Step:
    lines = [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas]
    lines += [json.dumps({"choices": [], "usage": {"total_tokens": 3}}), "[DONE]"]
    return 200, {"content-type": "text/event-stream"}, "".join(f"data: {line}\n\n" for line in lines).encode()


def openai(url: str, **fields: Any) -> Endpoint:
    return Endpoint(url, "openai", "some-model", **{"num_tries": 3, "concurrency": 1, **fields})


def test_our_service_is_asked_and_an_interrupted_run_goes_on(live: Live, items: list[Item], tmp_path: Path) -> None:
    kept = tmp_path / "run/replies.jsonl"
    endpoint = Endpoint(live.url, concurrency=2)
    first, model = ask(endpoint, items[:3], kept=kept, use_tqdm=False)
    assert model == live.service.checkpoint.manifest.name
    for item, reply in zip(items, first, strict=False):
        assert reply.error is None and reply.choice is not None
        assert reply.prediction == item.truth.choices[reply.choice]
        assert reply.parsed.texts and reply.num_pauses is not None
        assert reply.ttft_s is not None and reply.e2e_s is not None and reply.ttft_s <= reply.e2e_s
    with kept.open("a") as file:
        file.write('{"key": "torn')
    second, _ = ask(endpoint, items, kept=kept, use_tqdm=False)
    assert second[:3] == first and len(kept.read_text().splitlines()) == len(items)
    assert [reply.error for reply in second] == [None] * len(items)
    # Another question about the same clip, other settings or another address are not taken from the file.
    other = replace(items[0], truth=replace(items[0].truth, question="What else?"))
    keys = {
        each.fingerprint(item, "m", cuts_long=cuts_long)
        for each in (endpoint, replace(endpoint, api="openai"), replace(endpoint, url="http://127.0.0.1:1"))
        for item in (items[0], other)
        for cuts_long in (False, True)
    }
    assert len(keys) == 12


def test_a_kept_reply_is_used_only_for_the_same_clip_and_checkpoint(
    live: Live, items: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[Item] = []
    for number, item in enumerate(items[:2]):
        path = tmp_path / f"{number}.wav"
        path.write_bytes(to_wav(item, cuts_long=False))
        files.append(replace(item, clip=path))
    kept, endpoint, said = tmp_path / "replies.jsonl", Endpoint(live.url), list[str]()
    ask(endpoint, files, kept=kept, use_tqdm=False, say=said.append)
    assert said == []
    ask(endpoint, files, kept=kept, use_tqdm=False, say=said.append)
    assert said == ["2 of 2 replies are reused from the earlier run."]
    # Another clip under the same name, then another checkpoint at the same address.
    (tmp_path / "1.wav").write_bytes(to_wav(items[2], cuts_long=False))
    ask(endpoint, files, kept=kept, use_tqdm=False, say=said.append)
    assert said[1].startswith("1 of 2 replies are reused") and f"changed: {files[1].id}." in said[1]
    monkeypatch.setattr(live.service, "checkpoint", replace(live.service.checkpoint, manifest_sha256="another"))
    ask(endpoint, files, kept=kept, use_tqdm=False, say=said.append)
    assert said[2].startswith("0 of 2 replies are reused") and files[0].id in said[2] and files[1].id in said[2]
    assert len(kept.read_text().splitlines()) == 5


def test_a_file_that_holds_something_else_is_not_taken_for_replies(items: list[Item], tmp_path: Path) -> None:
    (tmp_path / "replies.jsonl").write_text("notes\n")
    with pytest.raises(EndpointError, match="line 1"):
        ask(Endpoint("http://127.0.0.1:1"), items, kept=tmp_path / "replies.jsonl", use_tqdm=False)


def test_what_may_pass_is_tried_again_and_what_may_not_is_an_item_without_a_reply(items: list[Item]) -> None:
    busy = 503, {"retry-after": "0"}, json.dumps({"error": {"message": "overloaded"}}).encode()
    refused = 400, {}, json.dumps({"error": {"message": "audio too long"}}).encode()
    answer = items[0].truth.answer
    with answering([busy, (429, {"retry-after": "0"}, b"slow down"), chat(answer), refused, busy]) as (url, asked):
        replies, model = ask(openai(url), items[:3], use_tqdm=False)
    assert model == "some-model"
    assert replies[0].choice == items[0].truth.choices.index(answer)
    assert replies[1].error == "400: audio too long" and replies[1].choice is None
    assert replies[2].error == "503: overloaded, 3 tries"
    assert len(asked) == 3 + 1 + 3


@pytest.mark.parametrize("status", [401, 404])
def test_what_fails_for_every_item_ends_the_run(items: list[Item], status: int) -> None:
    with answering([(status, {}, b'{"error": "no such key or model"}')]) as (url, asked):
        with pytest.raises(EndpointError, match="no such key or model"):
            ask(openai(url, concurrency=3), items, use_tqdm=False)
        assert len(asked) <= 3
    with pytest.raises(EndpointError, match="no server at this address"):
        ask(openai("http://127.0.0.1:9", num_tries=1), items[:1], use_tqdm=False)
    with pytest.raises(EndpointError, match="not a valid address"):
        ask(openai("nonsense"), items[:1], use_tqdm=False)
    with pytest.raises(EndpointError, match="name one with --model"):
        ask(Endpoint("http://127.0.0.1:9", "openai"), items[:1], use_tqdm=False)


def test_a_request_is_what_openai_documents_and_can_be_changed(items: list[Item]) -> None:
    with answering([stream({"role": "assistant"}, {"reasoning_content": "hm"}, {"content": "A"}, {})]) as (url, asked):
        endpoint = openai(f"{url}/v1/", api_key="secret", extra={"temperature": None, "seed": 3})
        (reply,), _ = ask(endpoint, items[:1], use_tqdm=False)
    path, headers, body = asked[0]
    assert (
        path == "/v1/chat/completions"
        and {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer secret"
    )
    clip, text = body["messages"][0]["content"]
    assert clip["type"] == "input_audio" and clip["input_audio"]["format"] == "wav"
    truth = items[0].truth
    assert text["text"].splitlines()[:2] == [truth.question, f"A. {truth.choices[0]}"]
    assert text["text"].endswith(endpoint.instruction)
    assert "temperature" not in body and body["seed"] == 3 and body["model"] == "some-model"
    assert reply.choice == 0 and reply.prediction == truth.choices[0] and reply.ttft_s is not None
    free = replace(items[0], truth=Truth("What is heard?", "rain"))
    assert openai_body(endpoint, "m", free, b"")["messages"][0]["content"][1]["text"] == "What is heard?"


@pytest.mark.parametrize("text", [None, [{"type": "text", "text": "two"}], "two"])
def test_a_message_may_be_empty_or_in_parts(items: list[Item], text: Any) -> None:
    with answering([chat(text)]) as (url, _):
        (reply,), _ = ask(openai(url), items[:1], use_tqdm=False)
    assert reply.parsed.raw == ((text and "two") or "") and reply.error is None


def test_a_stream_that_breaks_off_or_fails_is_tried_again(items: list[Item]) -> None:
    broken = 200, {"content-type": "text/event-stream"}, b'data: {"error": {"message": "worker died"}}\n\n'
    nonsense = 200, {"content-type": "application/json"}, b"<html>"
    with answering([broken, nonsense, chat("A")]) as (url, asked):
        (reply,), _ = ask(openai(url), items[:1], use_tqdm=False)
    assert reply.choice == 0 and len(asked) == 3


def test_another_service_is_not_taken_for_ours(items: list[Item]) -> None:
    done = 200, {"content-type": "text/event-stream"}, b'event: done\ndata: {"id": 1}\n\n'

    class Plain(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(done[0])
            self.send_header("content-type", done[1]["content-type"])
            self.send_header("content-length", str(len(done[2])))
            self.end_headers()
            self.wfile.write(done[2])

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Plain) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(EndpointError, match="--api openai"):
            ask(Endpoint(f"http://127.0.0.1:{server.server_port}", concurrency=1), items[:1], use_tqdm=False)
        thread.join(10)


@pytest.mark.parametrize(
    "text, choice, prediction",
    [
        ("<think>The dog barks twice.</think><answer>B</answer>", 1, "two"),
        ("<THINK><SUMMARY>one</SUMMARY></THINK><FINAL_ANSWER>two</FINAL_ANSWER>", 1, "two"),
        ("There are (b) two of them", None, None),
        ("I hear two voices.", 1, "I hear two voices."),
        ("one or two", None, "one or two"),
    ],
)
def test_traces_and_prose_are_read_by_one_rule(text: str, choice: int | None, prediction: str | None) -> None:
    item = Item("main/1", "main", Truth("How many?", "two", ("one", "two", "three")), CLIPS / "x.wav", "v", "b")
    reply = read(item, Received(text), "openai")
    if prediction is not None:
        assert (reply.choice, reply.prediction) == (choice, prediction)
    assert reply.parsed == parse_text(text)


def test_a_clip_that_cannot_be_read_is_an_item_without_a_reply() -> None:
    item = Item("main/1", "main", Truth("What?", "rain"), CLIPS / "no-such.wav", "v", "b")
    with answering([chat("rain")]) as (url, asked):
        (reply,), _ = ask(openai(url), [item], use_tqdm=False)
    assert reply.error is not None and "no-such.wav" in reply.error and not asked
