"""`/v1/files` over HTTP, with the official `openai` client and without: owners, limits, bad uploads, restarts."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from server import api_keys as keys
from server.api.files import display_name
from server.engines.protocol import GenerationRequest, ScriptedEngine, TokenChunk
from server.engines.scripted import scripted_checkpoint
from tests.serving import QUESTION, Live, assert_error, mp3, post_json, running, scripted, tone, wait_for

LINE = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {}}).encode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Service with small limits of files, and a folder of its own."""
    folder = tmp_path_factory.mktemp("state")
    limits = {"files_tenant_count": 50, "files_max_lifetime_s": 7200, "max_audio_bytes": 200_000}
    with running(scripted(state_dir=folder, files_max_bytes=400_000, **limits)) as found:
        yield found


@pytest.fixture
def client(service: Live) -> Iterator[OpenAI]:
    with openai_client(service) as found:
        yield found
        for file in found.files.list():
            found.files.delete(file.id)


def openai_client(service: Live, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0, timeout=60)


def post(service: Live, content: bytes | None = None, **fields: Any) -> httpx.Response:
    """Upload a file; `expires_anchor` stands for `expires_after[anchor]`, and `expires_seconds` likewise."""
    sent = {"purpose": "user_data", **fields}
    for part in ("anchor", "seconds"):
        if f"expires_{part}" in sent:
            sent[f"expires_after[{part}]"] = sent.pop(f"expires_{part}")
    return service.client.post("/v1/files", data=sent, files={"file": ("clip.wav", content or tone())})


def test_a_file_is_stored_listed_read_and_deleted(client: OpenAI) -> None:
    data = tone()
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    stored = client.files.create(file=("über.wav", data), purpose="user_data", expires_after=expiry)
    assert stored.id.startswith("file-") and stored.object == "file" and stored.status == "processed"
    assert (stored.bytes, stored.filename, stored.purpose) == (len(data), "über.wav", "user_data")
    assert stored.expires_at == stored.created_at + 3600 and abs(stored.created_at - time.time()) < 60
    assert client.files.retrieve(stored.id) == stored
    assert client.files.content(stored.id).content == data
    assert [file.id for file in client.files.list()] == [stored.id]
    assert client.files.wait_for_processing(stored.id) == stored
    deleted = client.files.delete(stored.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (stored.id, True, "file")
    for attempt in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError) as caught:
            attempt(stored.id)
        assert caught.value.code == "unknown_file"


def test_a_batch_file_is_json_lines(client: OpenAI) -> None:
    stored = client.files.create(file=("requests.jsonl", LINE + b"\n" + LINE), purpose="batch")
    assert client.files.content(stored.id).content.splitlines() == [LINE, LINE]
    for content in (b"custom_id,method\n", b'["a"]', tone(), b"[" * 100_000, b'{"a": "\xff"}'):
        with pytest.raises(openai.BadRequestError) as caught:
            client.files.create(file=("requests.jsonl", content), purpose="batch")
        assert caught.value.param == "file" and "JSON Lines" in caught.value.message


def test_the_client_turns_pages_and_deletes_as_it_lists(client: OpenAI) -> None:
    ids = [client.files.create(file=("a.mp3", mp3()), purpose="assistants").id for _ in range(5)]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == ids
    assert [file.id for file in client.files.list(limit=2)] == ids[::-1]
    assert client.files.list(limit=2).has_more
    assert not list(client.files.list(purpose="batch"))
    for file in client.files.list(limit=2):
        client.files.delete(file.id)
    assert not list(client.files.list())


def test_bad_uploads_are_refused_by_name_and_leave_nothing(service: Live, client: OpenAI) -> None:
    assert_error(post(service, purpose="fine-tune"), 400, "invalid_parameter", "purpose")
    assert_error(post(service, purpose="batch_output"), 400, "invalid_parameter", "purpose")
    assert_error(post(service, purpose=""), 400, "missing_parameter", "purpose")
    assert_error(post(service, b"a text, and no sound at all " * 9), 415, "unsupported_audio", "file")
    assert_error(post(service, b"%PDF-1.7" + bytes(99)), 415, "unsupported_audio", "file")
    assert_error(post(service, b"x" * 300_000), 413, "audio_too_large", "file")
    assert_error(post(service, b"x" * 410_000, purpose="batch"), 413, "body_too_large", "file")
    assert_error(post(service, b"x" * 2_000_000, purpose="batch"), 413, "body_too_large")
    assert_error(post(service, expires_seconds="60"), 400, "missing_parameter", "expires_after[anchor]")
    assert_error(post(service, expires_anchor="created_at"), 400, "missing_parameter", "expires_after[seconds]")
    for seconds in ("7201", "0", "-1", "nan", "9" * 5000):
        reply = post(service, expires_anchor="created_at", expires_seconds=seconds)
        assert_error(reply, 400, "invalid_parameter", "expires_after[seconds]")
    assert_error(post(service, expires_anchor="now"), 400, "invalid_parameter", "expires_after[anchor]")
    assert_error(post(service, question="Who?"), 400, "unknown_parameter", "question")
    reply = service.client.post("/v1/files", data={"purpose": "user_data"}, files={"clip": ("a", tone())})
    assert_error(reply, 400, "unknown_parameter", "file")
    reply = service.client.post("/v1/files", files={"purpose": (None, "user_data")})
    assert_error(reply, 400, "missing_parameter", "file")
    assert_error(service.client.post("/v1/files", json={"purpose": "batch"}), 415, "unsupported_media_type")
    assert_error(service.client.post("/v1/files?purpose=batch"), 400, "unknown_parameter", "purpose")
    reply = service.client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a", b"")})
    assert_error(reply, 400, "empty_audio", "file")
    assert not list(client.files.list())


def test_bad_addresses_and_queries_are_refused_by_name(service: Live) -> None:
    def get(path: str) -> httpx.Response:
        return service.client.get(f"/v1/files{path}")

    for name in ("file-1", "file-" + "0" * 32, "%00", "%FF", "file-" + "a" * 5000):
        assert_error(get(f"/{name}"), 404, "unknown_file", "file_id")
        assert_error(get(f"/{name}/content"), 404, "unknown_file", "file_id")
        assert_error(service.client.delete(f"/v1/files/{name}"), 404, "unknown_file", "file_id")
    assert_error(get("?limit=0"), 400, "invalid_parameter", "limit")
    assert_error(get("?limit=many"), 400, "invalid_parameter", "limit")
    assert_error(get("?order=up"), 400, "invalid_parameter", "order")
    assert_error(get("?after=file-" + "0" * 32), 400, "invalid_parameter", "after")
    assert_error(get("?after=%ED%A0%80"), 400, "invalid_parameter", "after")
    assert_error(get("?before=x"), 400, "unknown_parameter", "before")
    assert_error(get("/file-1?limit=1"), 400, "unknown_parameter", "limit")
    for path, methods in (("", "GET, POST"), ("/file-1", "DELETE, GET"), ("/file-1/content", "GET")):
        reply = service.client.put(f"/v1/files{path}")
        assert_error(reply, 405, "method_not_allowed")
        assert reply.headers["allow"] == methods


class RecordingEngine(ScriptedEngine):
    """Scripted engine that keeps its requests."""

    def __init__(self) -> None:
        super().__init__(scripted_checkpoint().tokenizer)
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Keep the request, and answer it."""
        self.requests.append(request)
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


def test_every_way_of_asking_about_a_file_reuses_the_work_on_its_sound(tmp_path: Path) -> None:
    engine = RecordingEngine()
    with running(scripted(state_dir=tmp_path), engine) as service, openai_client(service) as client:
        stored = client.files.create(file=("a.wav", tone()), purpose="user_data")
        engine.requests.clear()
        replies = [
            service.client.post("/v1/audio/qa", data={"question": QUESTION, "file_id": stored.id}),
            service.client.post("/v1/audio/qa", files={"question": (None, "How long?"), "file_id": (None, stored.id)}),
            post_json(service, {"question": QUESTION, "audio": {"file_id": stored.id}}),
            post_json(service, {"question": QUESTION, "audio": {"audio_id": stored.id}}),
            service.ask(tone()),
        ]
        assert [reply.status_code for reply in replies[1:]] == [200] * 4
        # An HTML form without a file is no multipart form, and has no place for a clip either.
        assert_error(replies[0], 415, "unsupported_media_type")
        content: Any = [{"type": "file", "file": {"file_id": stored.id}}, {"type": "text", "text": QUESTION}]
        completion: Any = client.chat.completions.create(model="hyper", messages=[{"role": "user", "content": content}])
        assert completion.hyper["answer"] == replies[-1].json()["answer"]
        assert completion.hyper["audio"] == replies[-1].json()["audio"]
        assert len(engine.requests) == 5
        assert len({request.clip_keys for request in engine.requests}) == 1
        assert len({request.cache_salt for request in engine.requests}) == 1
        assert stored.id not in str(engine.requests[0].clip_keys)


def test_a_file_that_cannot_be_asked_about_is_refused_by_name(service: Live, client: OpenAI) -> None:
    batch = client.files.create(file=("a.jsonl", LINE), purpose="batch")
    noise = client.files.create(file=("a.mp3", b"\xff\xfb\x90\x00" + bytes(500)), purpose="user_data")
    clip = client.files.create(file=("a.wav", tone()), purpose="user_data")

    def ask(**fields: Any) -> httpx.Response:
        return service.client.post("/v1/audio/qa", files={name: (None, value) for name, value in fields.items()})

    def chat(**file: Any) -> httpx.Response:
        content = [{"type": "file", "file": file}, {"type": "text", "text": QUESTION}]
        body = {"model": "hyper", "messages": [{"role": "user", "content": content}]}
        return service.client.post("/v1/chat/completions", json=body)

    for file_id in ("file-" + "0" * 32, "a.wav", "../../etc/passwd", "x" * 5000):
        assert_error(ask(question=QUESTION, file_id=file_id), 404, "unknown_file", "file_id")
        assert_error(chat(file_id=file_id), 404, "unknown_file", "file_id")
    assert_error(post_json(service, {"question": QUESTION, "audio": {"file_id": ""}}), 404, "unknown_file", "file_id")
    assert_error(ask(question=QUESTION, file_id=batch.id), 400, "invalid_parameter", "file_id")
    assert_error(ask(question=QUESTION, file_id=noise.id), 400, "damaged_audio", "file")
    assert_error(ask(question=" ", file_id=clip.id), 400, "invalid_prompt", "question")
    assert_error(ask(question=QUESTION, file_id=clip.id, files="x"), 400, "unknown_parameter", "files")
    assert_error(ask(question=QUESTION, file_id=""), 400, "missing_parameter", "file")
    assert_error(service.ask(tone(), file_id=clip.id), 400, "invalid_parameter", "file_id")
    data = base64.b64encode(tone()).decode()
    for audio in ({}, {"data": data, "file_id": clip.id}, {"file_id": clip.id, "audio_id": clip.id}):
        reply = post_json(service, {"question": QUESTION, "audio": audio})
        assert_error(reply, 400, "invalid_parameter" if audio else "missing_parameter", "audio")
    surrogate = b'{"question": "What?", "audio": {"file_id": "\\ud800"}}'
    assert_error(post_json(service, surrogate), 404, "unknown_file", "file_id")
    assert_error(chat(), 400, "invalid_parameter", "messages.content.file")
    assert_error(chat(file_id=clip.id, file_data=data), 400, "invalid_parameter", "messages.content.file")
    assert_error(chat(file_data="%%%"), 400, "invalid_parameter", "messages.content.file.file_data")
    assert chat(file_data=f"data:audio/wav;base64,{data}", filename="a.wav").status_code == 200
    client.files.delete(clip.id)
    assert_error(ask(question=QUESTION, file_id=clip.id), 404, "unknown_file", "file_id")


def test_files_belong_to_a_key_and_count_against_its_limits(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    anna, ben = (keys.add(path, name=name) for name in ("anna", "ben"))
    slow = keys.add(path, name="slow", requests_per_minute=1)
    settings = scripted(state_dir=tmp_path / "state", key_file=path, files_tenant_count=2)
    with running(settings) as service, openai_client(service, anna) as hers, openai_client(service, ben) as his:
        stored = [hers.files.create(file=("a.wav", tone()), purpose="user_data") for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            hers.files.create(file=("a.wav", tone()), purpose="user_data")
        assert caught.value.code == "file_quota_exceeded"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert int(caught.value.response.headers["retry-after"]) > 86_400
        for attempt in (his.files.retrieve, his.files.content, his.files.delete):
            with pytest.raises(openai.NotFoundError):
                attempt(stored[0].id)
        assert not list(his.files.list())
        reply = service.client.post(
            "/v1/audio/qa",
            files={"question": (None, QUESTION), "file_id": (None, stored[0].id)},
            headers={"authorization": f"Bearer {ben}"},
        )
        assert_error(reply, 404, "unknown_file", "file_id")
        assert his.files.create(file=("a.wav", tone()), purpose="user_data").id
        with openai_client(service, slow) as limited:
            assert not list(limited.files.list())
            with pytest.raises(openai.RateLimitError):
                limited.files.list()
        assert_error(service.client.get("/v1/files"), 401, "invalid_api_key")


def test_files_survive_a_restart_and_expire(tmp_path: Path) -> None:
    settings = scripted(state_dir=tmp_path)
    expiry: Any = {"anchor": "created_at", "seconds": 1}
    with running(settings) as service, openai_client(service) as client:
        stored = client.files.create(file=("a.wav", tone()), purpose="user_data")
        brief = client.files.create(file=("a.wav", tone()), purpose="user_data", expires_after=expiry)
    with running(settings) as service, openai_client(service) as client:
        assert client.files.content(stored.id).content == tone()
        wait_for(lambda: time.time() >= (brief.expires_at or 0))
        with pytest.raises(openai.NotFoundError) as caught:
            client.files.retrieve(brief.id)
        assert caught.value.code == "file_expired"
        assert service.run(service.service.files.sweep()).num_files == 1
        assert len(list((tmp_path / "files").iterdir())) == 1


def test_without_a_usable_folder_only_files_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    with running(scripted()) as service:
        assert service.ask().status_code == 200
        assert_error(post(service), 503, "storage_unavailable")
        assert_error(service.client.get("/v1/files"), 503, "storage_unavailable")


def test_a_name_is_shown_without_folders_and_control_characters() -> None:
    assert display_name("C:\\clips\\a.wav") == display_name("../../a.wav") == "a.wav"
    assert display_name("a\r\nb\0.wav") == "ab.wav"
    assert display_name("/") == display_name("\u202e") == display_name(None) == "file"
    assert len(display_name("a" * 1000)) == 255
