"""Jobs over HTTP, with the same tests on SQLite and on PostgreSQL."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator

import pytest

from server.jobs.records import Job, new_id
from server.jobs.store import KeyTakenError
from tests.jobs import create, job_events, post_job, wait_for_end
from tests.serving import Live, assert_error, slow_down, tone, wait_for


@contextlib.contextmanager
def slow_engine(live: Live) -> Iterator[None]:
    """Make a shared engine slow for a moment."""
    slow_down(live, 0.05)
    yield
    slow_down(live, 0.0)


def test_a_job_is_answered_like_a_request(shared: Live) -> None:
    live = shared
    response = post_job(live.client, choices=["a tone", "rain"])
    job = response.json()
    assert (response.status_code, job["object"], job["status"]) == (202, "job", "queued")
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    ended = wait_for_end(live.client, response.headers["location"])
    assert (ended["status"], ended["progress"], ended["error"]) == ("succeeded", {"done": 1, "of": 1}, None)
    answer = live.ask(choices=["a tone", "rain"]).json()
    assert ended["result"]["answer"] == answer["answer"] and ended["result"]["trace"] == answer["trace"]
    assert ended["expires_at"] - ended["ended_at"] == 7 * 86_400
    # The clip is deleted when the job ends; the result stays.
    # Jobs of other tests may still hold theirs.
    wait_for(lambda: not list((live.service.settings.state_path / "jobs/clips").iterdir()), 90)
    listed = live.client.get("/v1/jobs").json()["data"][0]
    assert listed == {**ended, "result": None}
    assert live.metric("hyper_job_steps_total", outcome="done") >= 1


def test_several_questions_are_steps_with_events(shared: Live) -> None:
    questions = [f"Question {number}?" for number in range(5)]
    live = shared
    address = create(live.client, questions=questions)
    ended = wait_for_end(live.client, address)
    assert [each["question"] for each in ended["result"]["data"]] == questions
    assert all(each["error"] is None and each["reply"]["answer"]["text"] for each in ended["result"]["data"])
    whole = job_events(live.client.get(f"{address}/events").text)
    assert whole == [*((str(number), "job.progress") for number in range(1, 6)), ("6", "job.succeeded")]
    rest = live.client.get(f"{address}/events", headers={"last-event-id": "4"}).text
    assert job_events(rest) == whole[4:]
    wrong = live.client.get(f"{address}/events", headers={"last-event-id": "x"})
    assert_error(wrong, 400, "invalid_parameter", "last-event-id")


def test_an_idempotency_key_names_one_job(shared: Live) -> None:
    live = shared
    headers = {"idempotency-key": "first"}
    first = post_job(live.client, headers=headers)
    again = post_job(live.client, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["idempotent-replayed"] == "true"
    assert_error(post_job(live.client, headers=headers, question="Another?"), 422, "idempotency_mismatch")
    assert_error(post_job(live.client, tone(2.0), headers=headers), 422, "idempotency_mismatch")
    # A refused request does not use up its key.
    bad = {"idempotency-key": "second"}
    assert post_job(live.client, b"not audio" * 100, headers=bad).status_code == 415
    assert post_job(live.client, headers=bad).status_code == 202
    assert_error(post_job(live.client, headers={"idempotency-key": "a b"}), 400, "invalid_parameter", "idempotency-key")


def test_a_key_in_progress_is_a_conflict_until_its_lease_ends(shared: Live) -> None:
    live = shared
    jobs = live.server.config.app.state.jobs  # type: ignore[union-attr]
    store = jobs.store
    taken = post_job(live.client, headers={"idempotency-key": "probe"})
    with store.engine.connect() as connection:
        (fingerprint,) = connection.exec_driver_sql("SELECT fingerprint FROM hyper_idempotency_keys").fetchone()
    # As after a crash between the claim and the job.
    now_s, lease_s = jobs.clock.now_s(), 150.0
    assert store.claim_key("", "slow", fingerprint, now_s, lease_s) is None
    error = assert_error(post_job(live.client, headers={"idempotency-key": "slow"}), 409, "idempotency_in_progress")
    assert error["retryable"]
    assert store.claim_key("", "slow", fingerprint, now_s + lease_s - 60, lease_s) == (fingerprint, None)
    assert store.claim_key("", "slow", fingerprint, now_s + lease_s + 60, lease_s) is None
    # Keys are forgotten after a day.
    day_s = 24 * 3600 + 1
    assert store.claim_key("", "probe", "other", now_s, lease_s) == (fingerprint, taken.json()["id"])
    assert store.claim_key("", "probe", "other", now_s + day_s, lease_s) is None


def test_of_two_claims_of_one_key_one_stores_its_job(shared: Live) -> None:
    jobs = shared.server.config.app.state.jobs  # type: ignore[union-attr]
    store = jobs.store
    # The first request overruns its lease, so the second one claims the key too.
    assert store.claim_key("", "late", "one", jobs.clock.now_s(), 0.0) is None
    assert store.claim_key("", "late", "one", jobs.clock.now_s() + 60, 0.0) is None
    first, second = (Job(new_id("job"), "", "qa", {"question": "What?"}, 1, 60.0, status="expired") for _ in range(2))
    with store.transaction() as connection:
        store.insert(connection, first, "late")
    with pytest.raises(KeyTakenError), store.transaction() as connection:
        store.insert(connection, second, "late")
    assert store.get(first.id) is not None and store.get(second.id) is None
    store.delete([first.id])


def test_a_job_is_cancelled_in_the_middle(shared: Live) -> None:
    live = shared
    with slow_engine(live):
        address = create(live.client, questions=[f"Question {number}?" for number in range(20)])
        wait_for(lambda: live.client.get(address).json()["status"] == "running", 90)
    cancelled = live.client.post(f"{address}/cancel").json()
    assert (cancelled["status"], cancelled["result"]) == ("cancelled", None)
    live.wait_until_idle(90)
    assert live.client.post(f"{address}/cancel").json() == cancelled
    assert job_events(live.client.get(f"{address}/events").text)[-1] == ("21", "job.cancelled")
    # Jobs of other tests may still hold theirs.
    wait_for(lambda: not list((live.service.settings.state_path / "jobs/clips").iterdir()), 90)


def test_a_deleted_job_leaves_nothing(shared: Live) -> None:
    live = shared
    ended = create(live.client)
    wait_for_end(live.client, ended)
    with slow_engine(live):
        busy = create(live.client, questions=[f"Question {number}?" for number in range(20)])
        wait_for(lambda: live.client.get(busy).json()["status"] == "running", 90)
    for address in (ended, busy):
        assert live.client.delete(address).json() == {
            "id": address.rpartition("/")[2],
            "object": "job",
            "deleted": True,
        }
        assert_error(live.client.get(address), 404, "not_found")
    live.wait_until_idle(90)
    store = live.server.config.app.state.jobs.store  # type: ignore[union-attr]
    schema = "dbos." if live.service.settings.jobs_database_url else ""
    ids = [address.rpartition("/")[2] for address in (ended, busy)]
    with store.engine.connect() as connection:
        for table, column in (("hyper_jobs", "id"), (f"{schema}workflow_status", "workflow_uuid")):
            rows = connection.exec_driver_sql(f"SELECT {column} FROM {table}").scalars().all()
            assert not {*rows} & {*ids}, table
        rows = connection.exec_driver_sql(f"SELECT workflow_uuid FROM {schema}operation_outputs").scalars().all()
        assert not {*rows} & {*ids}
    # Jobs of other tests may still hold theirs.
    wait_for(lambda: not list((live.service.settings.state_path / "jobs/clips").iterdir()), 90)


def test_a_job_as_json_and_its_retention(shared: Live) -> None:
    live = shared
    body = {"question": "What is heard?", "keep_s": 60, "audio": {"data": base64.b64encode(tone()).decode()}}
    response = live.client.post("/v1/jobs", json=body)
    assert response.status_code == 202, response.text
    job = wait_for_end(live.client, response.headers["location"])
    assert job["expires_at"] - job["ended_at"] == 60
    jobs = live.server.config.app.state.jobs  # type: ignore[union-attr]
    assert jobs.store.expired(job["expires_at"] - 2) == []
    assert jobs.store.expired(job["expires_at"] + 2) == [job["id"]]
    live.run(jobs.in_pool(jobs.delete_all, [job["id"]]))
    assert_error(live.client.get(response.headers["location"]), 404, "not_found")


def test_a_job_outlives_its_stored_file(shared: Live) -> None:
    live = shared
    files = {"file": ("clip.wav", tone(), "audio/wav")}
    file_id = live.client.post("/v1/files", data={"purpose": "user_data"}, files=files).json()["id"]
    with slow_engine(live):
        response = live.client.post("/v1/jobs", json={"question": "Who speaks?", "audio": {"file_id": file_id}})
        assert live.client.delete(f"/v1/files/{file_id}").status_code == 200
    assert wait_for_end(live.client, response.headers["location"])["status"] == "succeeded"


def test_jobs_are_listed_by_page_and_status(shared: Live) -> None:
    live = shared
    addresses = [create(live.client) for _ in range(5)]
    for address in addresses:
        wait_for_end(live.client, address)
    ids = [address.rpartition("/")[2] for address in reversed(addresses)]
    first = live.client.get("/v1/jobs", params={"limit": 3}).json()
    second = live.client.get("/v1/jobs", params={"limit": 2, "after": first["data"][-1]["id"]}).json()
    assert [each["id"] for each in first["data"] + second["data"]] == ids
    assert first["has_more"]
    last = live.client.get("/v1/jobs", params={"limit": 100, "after": ids[-1]}).json()
    assert not last["has_more"]
    found = live.client.get("/v1/jobs", params={"status": "succeeded", "limit": 5}).json()["data"]
    assert [each["id"] for each in found] == ids
    assert live.client.get("/v1/jobs", params={"status": "expired"}).json()["data"] == []
    assert_error(live.client.get("/v1/jobs", params={"status": "odd"}), 400, "invalid_parameter", "status")


def test_a_recording_beyond_the_limit_of_requests_is_answered_by_a_job(shared: Live) -> None:
    live = shared
    clip = tone(150.0)
    refused = assert_error(live.ask(clip, long_audio="chunk"), 422, "audio_too_long", "long_audio")
    assert "POST /v1/jobs" in refused["hint"] and refused["actual"] > refused["limit"]
    questions = ["What is heard?", "Who speaks?"]
    address = create(live.client, clip, long_audio="chunk", questions=questions)
    ended = wait_for_end(live.client, address)
    # Each window is a step, and each question.
    num_steps = refused["actual"] + len(questions)
    assert (ended["status"], ended["progress"]) == ("succeeded", {"done": num_steps, "of": num_steps})
    replies = [each["reply"] for each in ended["result"]["data"]]
    # One question reports the tokens of the windows.
    used = [sum(window["usage"]["completion_tokens"] for window in reply["timeline"]) for reply in replies]
    assert used[0] > used[1]
    assert [len(reply["timeline"]) for reply in replies] == [refused["actual"]] * 2
    assert replies[0]["audio"][0]["used_s"] == 150
    # A window of the same recording.
    address = create(live.client, clip, long_audio="window", start_s="120")
    ended = wait_for_end(live.client, address)
    assert ended["status"] == "succeeded" and ended["result"]["audio"][0]["used_s"] == 30
