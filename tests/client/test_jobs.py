"""Jobs and webhooks of both clients, against the real service over the scripted engine."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import hyper
from hyper.webhooks import TOLERANCE_S
from server.api.job_types import JobReply
from server.jobs.records import Job as StoredJob
from server.jobs.webhooks import event_body, new_secret, signed_headers
from tests.client.replies import Canned, error_reply, replying, stream_of
from tests.jobs import wait_until_up
from tests.serving import QUESTION, Live, running, scripted, slow_down, tone

QUESTIONS = ["Who?", {"question": "What?", "choices": ["a tone", "rain"]}, "Where?"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A running service with jobs."""
    settings = scripted(jobs=True, state_dir=tmp_path_factory.mktemp("state"), webhook_allowed_hosts="127.0.0.1")
    with running(settings) as live:
        wait_until_up(live.client)
        yield live


class Blocking:
    """An object of the client for asyncio, with coroutines as plain methods and iterators as lists."""

    def __init__(self, target: Any, runner: asyncio.Runner) -> None:
        self.target = target
        self.runner = runner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.target, name)
        if isinstance(found, (hyper.jobs.AsyncJobs, hyper.webhooks.AsyncWebhooks, hyper.webhooks.AsyncSecrets)):
            return Blocking(found, self.runner)
        return self.called(found) if inspect.ismethod(found) else found

    def called(self, method: Any) -> Any:
        def call(*args: Any, **fields: Any) -> Any:
            result = method(*args, **fields)
            if inspect.isasyncgen(result):

                async def collect() -> list[Any]:
                    return [each async for each in result]

                return self.runner.run(collect())
            found = self.runner.run(result)
            return Blocking(found, self.runner) if isinstance(found, hyper.AsyncJob) else found

        return call


class Clients:
    """Makes clients of one kind."""

    def __init__(self, *, is_async: bool) -> None:
        self.runner = asyncio.Runner() if is_async else None
        self.made: list[Any] = []

    def make(self, url: str, **options: Any) -> Any:
        if self.runner is None:
            self.made.append(hyper.Client(url, **options))
        else:
            self.made.append(Blocking(hyper.AsyncClient(url, **options), self.runner))
        return self.made[-1]

    def close(self) -> None:
        for each in self.made:
            if self.runner is None:
                each.close()
            else:
                each.aclose()
        if self.runner is not None:
            self.runner.close()


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def clients(request: pytest.FixtureRequest) -> Iterator[Clients]:
    found = Clients(is_async=request.param)
    yield found
    found.close()


def job_reply(status: str = "queued", **fields: Any) -> dict[str, Any]:
    job = {"id": "job_1", "status": status, "progress": {"done": 0, "of": 3}, "created_at": 1, **fields}
    return JobReply.model_validate(job).model_dump(mode="json")


def canned_job(status: str = "queued") -> Canned:
    return Canned(json.dumps(job_reply(status)).encode())


def progress(done: int) -> tuple[str, Any]:
    return "job.progress", {"id": "job_1", "status": "running", "progress": {"done": done, "of": 3}}


def test_a_job_is_sent_awaited_listed_and_deleted(service: Live, clients: Clients) -> None:
    client = clients.make(service.url)
    sent = client.jobs.create(tone(), QUESTION, choices=["a tone", "rain"], keep_s=60)
    job = sent.wait(timeout_s=120, poll_s=0.05)
    assert (job.id, job.status, job.progress) == (sent.id, "succeeded", hyper.JobProgress(done=1, of=1))
    assert isinstance(job.result, hyper.QaReply) and job.result.answer.text in ("a tone", "rain")
    assert job.expires_at is not None and job.ended_at is not None and job.expires_at - job.ended_at == 60
    assert client.jobs.list(limit=1, status="succeeded").data[0].id == job.id
    assert client.jobs.list(after=job.id).data == [] or client.jobs.list(after=job.id).data[0].id != job.id
    assert client.jobs.deliveries(job.id).data == []
    assert client.jobs.delete(job.id) == hyper.JobDeleted(id=job.id)
    with pytest.raises(hyper.NotFoundError):
        client.jobs.get(job.id)
    with pytest.raises(hyper.NotFoundError):
        sent.wait(poll_s=0.05)


def test_several_questions_are_steps_with_typed_events(service: Live, clients: Clients) -> None:
    client = clients.make(service.url)
    file = service.client.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("clip.wav", tone())})
    job = client.jobs.create(file_id=file.json()["id"], questions=QUESTIONS)
    *steps, last = client.jobs.events(job.id)
    assert [each.progress for each in steps] == [hyper.JobProgress(done=number, of=3) for number in (1, 2, 3)]
    assert last.name == "job.succeeded" and isinstance(last.job.result, hyper.QuestionResults)
    assert [each.question for each in last.job.result.data] == ["Who?", "What?", "Where?"]
    assert list(client.jobs.events(job.id, after=2)) == [steps[2], last]


def test_a_job_is_cancelled_and_a_wait_can_end_before_it(service: Live, clients: Clients) -> None:
    client = clients.make(service.url)
    slow_down(service, 0.05)
    try:
        job = client.jobs.create(tone(), questions=[f"Question {number}?" for number in range(20)])
        with pytest.raises(hyper.WaitTimeoutError, match="of 20 steps") as caught:
            job.wait(timeout_s=0.1, poll_s=0.05)
        assert isinstance(caught.value, TimeoutError) and isinstance(caught.value, hyper.Error)
        assert client.jobs.cancel(job.id).status == "cancelled"
    finally:
        slow_down(service, 0.0)
    assert job.wait(poll_s=0.05).status == "cancelled"
    service.wait_until_idle(90)


def test_an_idempotency_key_names_one_job(service: Live, clients: Clients) -> None:
    client = clients.make(service.url)
    key = f"key-{id(clients)}"
    first, again = (client.jobs.create(tone(), QUESTION, idempotency_key=key) for _ in range(2))
    assert first.id == again.id
    with pytest.raises(hyper.IdempotencyMismatchError):
        client.jobs.create(tone(), "Another?", idempotency_key=key)
    # Without one, equal jobs are different.
    assert len({first.id, *(client.jobs.create(tone(), QUESTION).id for _ in range(2))}) == 3


def test_a_retry_of_a_job_has_the_key_of_the_first_try(clients: Clients) -> None:
    with replying(Canned(None), canned_job(), canned_job()) as sent:
        client = clients.make(sent.url)
        for _ in range(2):
            assert client.jobs.create(tone(), QUESTION, webhook_url="https://x.example/hook").status == "queued"
    keys = [headers["idempotency-key"] for headers in sent.headers]
    assert keys[0] == keys[1] != keys[2]
    assert all(b'name="webhook[url]"' in body for body in sent.bodies)


def test_a_wrong_call_sends_nothing(clients: Clients) -> None:
    client = clients.make("http://127.0.0.1:9")
    calls: list[dict[str, Any]] = [{}, {"question": "Who?", "questions": ["Who?"]}, {"question": "Who?", "tempo": 3}]
    for fields in calls:
        with pytest.raises(TypeError, match=r"jobs\.create\(\)"):
            client.jobs.create(tone(), **fields)
    for key in ("", "a b", "\u00e9", "k" * 256):
        with pytest.raises(ValueError, match="visible ASCII"):
            client.jobs.create(tone(), QUESTION, idempotency_key=key)
    with replying(canned_job()) as sent:
        job = clients.make(sent.url).jobs.create(tone(), QUESTION)
    with pytest.raises(ValueError, match="poll_s"):
        job.wait(poll_s=0)


def test_events_continue_after_a_lost_connection(clients: Clients) -> None:
    cut = stream_of(progress(1), ("job.note", {}), progress(2))
    end = stream_of(progress(3), ("job.failed", job_reply("failed")))
    with replying(cut, Canned(None), stream_of(), end) as sent:
        events = list(clients.make(sent.url).jobs.events("job_1"))
    assert [each.name for each in events] == ["job.progress"] * 3 + ["job.failed"]
    assert [headers.get("last-event-id") for headers in sent.headers] == [None, "2", "2", "2"]
    with replying(stream_of(), stream_of()) as sent, pytest.raises(hyper.ConnectionFailedError, match="before the end"):
        list(clients.make(sent.url, max_retries=1).jobs.events("job_1"))
    error = json.loads(error_reply(404, "not_found").body or b"")
    for stream, kind in ((("error", error), hyper.ServiceError), (("job.failed", {}), hyper.UnexpectedReplyError)):
        with replying(stream_of(stream)) as sent, pytest.raises(kind):
            list(clients.make(sent.url).jobs.events("job_1"))


def test_secrets_are_created_once_listed_and_deleted(service: Live, clients: Clients) -> None:
    secrets = clients.make(service.url).webhooks.secrets
    created = secrets.create()
    assert created.secret is not None and created.secret.startswith("whsec_")
    assert secrets.list().data[0] == created.model_copy(update={"secret": None})
    assert secrets.delete(created.id) is None
    assert created.id not in [each.id for each in secrets.list().data]
    # A second request would end the secret before.
    with replying(Canned(None)) as sent, pytest.raises(hyper.ConnectionFailedError):
        clients.make(sent.url).webhooks.secrets.create()


def test_a_delivery_of_the_service_is_verified(service: Live, clients: Clients) -> None:
    client = clients.make(service.url)
    secret = client.webhooks.secrets.create().secret
    with replying(Canned(b"")) as receiver:
        job = client.jobs.create(tone(), QUESTION, webhook_url=f"{receiver.url}/hook").wait(poll_s=0.05)
        deadline_s = time.monotonic() + 60
        while not (log := client.jobs.deliveries(job.id).data):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    event = client.webhooks.verify(receiver.bodies[0], receiver.headers[0], secret)
    assert (event.id, event.type, event.data.id) == (log[0].event_id, "job.succeeded", job.id)
    assert log[0].status_code == 200


STORED = StoredJob(id="job_1", tenant="", kind="qa", request={}, num_steps=1, keep_s=60.0)


def delivery(*secrets: str) -> tuple[bytes, dict[str, str]]:
    body = event_body(STORED, "evt_1", "job.queued")
    return body, signed_headers(secrets, "evt_1", body)


def test_any_valid_signature_verifies_a_delivery() -> None:
    old, new = new_secret(), new_secret()
    body, headers = delivery(old, new)
    for secret in (old, new, new.removeprefix("whsec_")):
        assert hyper.verify_webhook(body, headers, secret).data.id == "job_1"
    titled = {name.title(): value for name, value in headers.items()}
    assert hyper.verify_webhook(body.decode(), httpx.Headers(titled), new) == hyper.verify_webhook(body, titled, old)


def test_a_forged_delivery_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = new_secret()
    body, headers = delivery(secret)
    moment_s = int(headers["webhook-timestamp"])
    forged: list[tuple[bytes, dict[str, str], str]] = [
        (body + b" ", headers, secret),
        (body, headers, new_secret()),
        (body, {**headers, "webhook-id": "evt_2"}, secret),
        (body, {**headers, "webhook-timestamp": str(moment_s + 1)}, secret),
        (body, {**headers, "webhook-timestamp": "soon"}, secret),
        (body, {**headers, "webhook-timestamp": "\u0663"}, secret),
        (body, {**headers, "webhook-signature": "v1,\u00e9 v1, v2,x"}, secret),
        (body, {**headers, "webhook-signature": headers["webhook-signature"].replace("v1,", "v1a,")}, secret),
        *(
            (body, {name: headers[name] for name in headers if name != gone}, secret)
            for gone in headers
            if "webh" in gone
        ),
    ]
    for each in forged:
        with pytest.raises(hyper.WebhookVerificationError):
            hyper.verify_webhook(*each)
    for wrong in ("", "whsec_", "whsec_?", "whsec_\u00e9"):
        with pytest.raises(ValueError, match="base64"):
            hyper.verify_webhook(body, headers, wrong)
    for offset_s in (TOLERANCE_S - 1, 1 - TOLERANCE_S, TOLERANCE_S + 1, -TOLERANCE_S - 1):
        monkeypatch.setattr("hyper.webhooks.time.time", lambda now_s=moment_s + offset_s: now_s)
        if abs(offset_s) < TOLERANCE_S:
            hyper.verify_webhook(body, headers, secret)
        else:
            with pytest.raises(hyper.WebhookVerificationError, match="tolerance of 300 s"):
                hyper.verify_webhook(body, headers, secret)


@pytest.mark.parametrize("body", [b"\xff", b"{}", b"[]", b"no"])
def test_a_signed_body_of_another_kind_is_reported(body: bytes) -> None:
    secret = new_secret()
    with pytest.raises(hyper.UnexpectedReplyError):
        hyper.verify_webhook(body, signed_headers([secret], "evt_1", body), secret)
