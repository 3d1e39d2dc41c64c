"""Batches over HTTP, with the official `openai` client, over SQLite and PostgreSQL."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from server.api.batch_lines import split_lines
from server.errors import RequestError
from server.jobs.spool import Spool, pack
from tests.batches import QA, client_of, create, ended, line, lines_of, upload
from tests.serving import QUESTION, Live, assert_error, json_question, slow_down, tone, wait_for

CHAT = "/v1/chat/completions"


@pytest.fixture
def client(shared: Live) -> Iterator[OpenAI]:
    with client_of(shared) as found:
        yield found


def test_a_broken_line_fails_by_name_and_the_rest_is_done(shared: Live, client: OpenAI) -> None:
    clip_id = client.files.create(file=("clip.wav", tone()), purpose="user_data").id
    no_clip = line("no-clip", question=QUESTION, audio={"file_id": "file-" + "0" * 32})
    file_id = upload(
        client,
        line("first"),
        line("stored", question=QUESTION, choices=["a tone", "rain"], audio={"file_id": clip_id}),
        "{not json",
        {**line("other"), "url": CHAT},
        no_clip,
        line("streamed", **json_question(stream=True)),
        {**line("last"), "method": "GET"},
    )
    batch = create(client, file_id, metadata={"run": "nightly"})
    assert batch.object == "batch" and batch.status == "validating"
    assert batch.request_counts.total == 7 and batch.metadata == {"run": "nightly"}
    # The file is not needed any more.
    client.files.delete(file_id)
    batch = ended(client, batch.id)
    assert batch.status == "completed" and batch.input_file_id == file_id
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (7, 2, 5)
    replies = lines_of(client, batch.output_file_id)
    assert [each["custom_id"] for each in replies] == ["first", "stored"]
    direct = shared.ask(choices=["a tone", "rain"]).json()
    for each in replies:
        assert set(each) == {"id", "custom_id", "response", "error"} and each["error"] is None
        assert each["response"]["status_code"] == 200 and each["response"]["request_id"]
    assert replies[1]["response"]["body"]["answer"] == direct["answer"]
    failures = lines_of(client, batch.error_file_id)
    assert [each["custom_id"] for each in failures] == [None, "other", "no-clip", "streamed", "last"]
    broken = [(each["error"]["line"], each["response"]) for each in failures if each["error"]]
    assert broken == [(3, None), (4, None), (6, None), (7, None)]
    assert failures[1]["error"]["message"] == f"Line 4: `url` must be the endpoint of the batch, {QA}."
    assert failures[2]["response"]["status_code"] == 404
    assert failures[2]["response"]["body"]["error"]["code"] == "unknown_file"
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert not list((shared.service.settings.state_path / "jobs/clips").iterdir())


def test_lines_of_chat_are_completions(client: OpenAI) -> None:
    clip = base64.b64encode(tone()).decode()
    parts = [{"type": "input_audio", "input_audio": {"data": clip, "format": "wav"}}, {"type": "text", "text": "What?"}]
    body = {"model": "hyper", "messages": [{"role": "user", "content": parts}]}
    file_id = upload(client, line("one", CHAT, **body), line("two", CHAT, **{**body, "model": "other"}))
    batch = ended(client, create(client, file_id, CHAT).id)
    reply = lines_of(client, batch.output_file_id)[0]["response"]["body"]
    assert reply["object"] == "chat.completion" and reply["choices"][0]["message"]["content"]
    failure = lines_of(client, batch.error_file_id)[0]
    assert (failure["custom_id"], failure["response"]["body"]["error"]["code"]) == ("two", "model_not_found")


def test_a_batch_is_cancelled_and_listed(shared: Live, client: OpenAI) -> None:
    slow_down(shared, 0.05)
    batch = create(client, upload(client, *(line(str(number)) for number in range(200))))
    wait_for(lambda: client.batches.retrieve(batch.id).status == "in_progress", 90)
    cancelled = client.batches.cancel(batch.id)
    slow_down(shared, 0.0)
    assert cancelled.status == "cancelled" and cancelled.cancelled_at and cancelled.output_file_id is None
    assert client.batches.cancel(batch.id) == cancelled
    shared.wait_until_idle(90)
    other = create(client, upload(client, line("1")))
    page = client.batches.list(limit=1)
    assert [each.id for each in page.data] == [other.id] and page.has_more
    assert next(iter(client.batches.list(limit=1, after=other.id))).id == batch.id
    # Jobs and batches are apart.
    assert batch.id not in [each["id"] for each in shared.client.get("/v1/jobs").json()["data"]]
    assert_error(shared.client.get(f"/v1/jobs/{batch.id}"), 404, "not_found")
    assert_error(shared.client.delete(f"/v1/jobs/{batch.id}"), 404, "not_found")
    assert ended(client, other.id).request_counts.completed == 1


def test_files_with_a_fault_are_refused_by_name(shared: Live, client: OpenAI) -> None:
    good = upload(client, line("1"))
    for lines, said in (
        ((line("1"), line("2"), line("1")), "Lines 1 and 3 have the same `custom_id`."),
        (("{}", *["{}"] * 50_000), "The batch file has 50001 lines; the limit is 50000."),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            create(client, upload(client, *lines))
        assert said in refused.value.message and refused.value.param == "input_file_id"
    with pytest.raises(RequestError, match="no line"):
        split_lines(b" \n\n")
    clip_id = client.files.create(file=("clip.wav", tone()), purpose="user_data").id
    body = {"input_file_id": good, "endpoint": QA, "completion_window": "24h"}
    for change, status, code, param in (
        ({"endpoint": "/v1/embeddings"}, 400, "invalid_parameter", "endpoint"),
        ({"completion_window": "1h"}, 400, "invalid_parameter", "completion_window"),
        ({"input_file_id": clip_id}, 400, "invalid_parameter", "input_file_id"),
        ({"input_file_id": "file-none"}, 404, "unknown_file", "file_id"),
        ({"model": "x"}, 400, "unknown_parameter", "model"),
    ):
        assert_error(shared.client.post("/v1/batches", json=body | change), status, code, param)
    assert_error(shared.client.get("/v1/batches/batch_none"), 404, "not_found")


def test_a_part_is_read_without_the_others(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    parts = [b"one", b"", b"three" * 1000]
    name = spool.write(pack(parts))
    assert [spool.read_part(name, index) for index in range(3)] == parts
