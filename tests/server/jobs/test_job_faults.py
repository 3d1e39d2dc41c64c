"""Jobs survive kills, a database that goes away, a full disk, a second runner and a clock that jumps."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.jobs.clock import CautiousClock
from server.jobs.runner_lock import AdvisoryLock, FileLock
from server.jobs.store import open_engine
from tests.jobs import create, post_job, wait_for_end, wait_until_up
from tests.postgres import Cluster, needs_postgres
from tests.process import serve_process
from tests.serving import assert_error, running, scripted, slow_down, tone, wait_for

NUM_QUESTIONS = 8


def recorded_steps(url: str, job_id: str) -> Counter[int]:
    """Return how often each step of a job is recorded in DBOS's table, by its number."""
    engine = open_engine(url)
    table = "operation_outputs" if url.startswith("sqlite") else "dbos.operation_outputs"
    with engine.connect() as connection:
        query = f"SELECT function_id FROM {table} WHERE workflow_uuid = '{job_id}' AND function_name = 'step'"
        found = Counter(connection.exec_driver_sql(query).scalars())
    engine.dispose()
    return found


def test_a_killed_process_resumes_after_the_last_finished_step(job_settings: dict[str, Any], tmp_path: Path) -> None:
    environment = {
        "HYPER_ENGINE": "scripted",
        "HYPER_STATE_DIR": str(tmp_path),
        "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.003",
        "HYPER_JOBS_CONCURRENCY": "2",
    }
    if "jobs_database_url" in job_settings:
        environment["HYPER_JOBS_DATABASE_URL"] = job_settings["jobs_database_url"]
    log = tmp_path / "log"
    address, num_done = "", 0
    for life in range(3):
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(log.open("a"))
            process, url = stack.enter_context(serve_process(environment, ready_timeout_s=120, stderr=stderr))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
            wait_until_up(client)
            if life == 0:
                address = create(client, questions=[f"Question {number}?" for number in range(NUM_QUESTIONS)])
            if life < 2:
                wait_for(lambda: client.get(address).json()["progress"]["done"] > num_done, 120)  # noqa: B023
                num_done = client.get(address).json()["progress"]["done"]
                process.kill()
                continue
            job = wait_for_end(client, address)
            assert job["status"] == "succeeded"
            assert [each["error"] for each in job["result"]["data"]] == [None] * NUM_QUESTIONS
    job_id = address.rpartition("/")[2]
    url = job_settings.get("jobs_database_url") or f"sqlite:///{tmp_path / 'jobs/jobs.sqlite'}"
    assert list(recorded_steps(url, job_id).values()) == [1] * NUM_QUESTIONS
    # No step was answered again after its record: at most the two in progress at each kill ran twice.
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    steps = Counter(line["step"] for line in lines if line["message"] == "job step")
    assert set(steps) == set(range(NUM_QUESTIONS)) and sum(steps.values()) <= NUM_QUESTIONS + 2 * 2


def test_a_killed_process_resumes_in_the_middle_of_a_recording(job_settings: dict[str, Any], tmp_path: Path) -> None:
    environment = {
        "HYPER_ENGINE": "scripted",
        "HYPER_STATE_DIR": str(tmp_path),
        "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.01",
        "HYPER_JOBS_CONCURRENCY": "2",
        "HYPER_MAX_NUM_SEQS": "2",
    }
    if "jobs_database_url" in job_settings:
        environment["HYPER_JOBS_DATABASE_URL"] = job_settings["jobs_database_url"]
    url_of_jobs = job_settings.get("jobs_database_url") or f"sqlite:///{tmp_path / 'jobs/jobs.sqlite'}"
    logs = [tmp_path / "first.log", tmp_path / "second.log"]

    @contextlib.contextmanager
    def life(log: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(log.open("w"))
            process, url = stack.enter_context(serve_process(environment, ready_timeout_s=120, stderr=stderr))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
            wait_until_up(client)
            yield process, client

    with life(logs[0]) as (process, client):
        address = create(client, tone(150.0), long_audio="chunk", questions=["What is said?", "Who speaks?"])
        wait_for(lambda: client.get(address).json()["progress"]["done"] > 1, 120)
        process.kill()
        process.wait(10)
    job_id = address.rpartition("/")[2]
    before = set(recorded_steps(url_of_jobs, job_id))
    with life(logs[1]) as (_, client):
        job = wait_for_end(client, address)
        assert job["status"] == "succeeded"
    num_windows = len(job["result"]["data"][0]["reply"]["timeline"])
    assert job["progress"] == {"done": num_windows + 2, "of": num_windows + 2}
    after = recorded_steps(url_of_jobs, job_id)
    assert list(after.values()) == [1] * (num_windows + 2)
    # The second process asks the windows without a record, and no other.
    lines = [json.loads(line) for line in logs[1].read_text().splitlines() if line.startswith("{")]
    steps = Counter(line["step"] for line in lines if line["message"] == "job step")
    places = sorted(after)
    assert 1 < len(before) < num_windows
    assert steps == Counter(index for index, place in enumerate(places) if place not in before)


@needs_postgres
def test_jobs_wait_while_the_database_is_away(tmp_path: Path, cluster: Cluster) -> None:
    settings = scripted(jobs=True, state_dir=tmp_path, jobs_database_url=cluster.new_database(), jobs_concurrency=2)
    with running(settings) as live:
        wait_until_up(live.client)
        slow_down(live, 0.02)
        address = create(live.client, questions=[f"Question {number}?" for number in range(NUM_QUESTIONS)])
        wait_for(lambda: live.client.get(address).json()["progress"]["done"] > 0, 120)
        cluster.kill()
        error = assert_error(live.client.get(address), 503, "storage_unavailable")
        assert error["retryable"]
        assert_error(post_job(live.client), 503, "storage_unavailable")
        wait_for(lambda: live.metric("hyper_jobs_database_up") == 0, 60)
        cluster.start()
        wait_for(lambda: live.client.get(address).status_code == 200, 60)
        job = wait_for_end(live.client, address, timeout_s=180)
        assert job["status"] == "succeeded"
        assert [each["error"] for each in job["result"]["data"]] == [None] * NUM_QUESTIONS
        job_id = address.rpartition("/")[2]
        assert settings.jobs_database_url is not None
        assert list(recorded_steps(settings.jobs_database_url, job_id).values()) == [1] * NUM_QUESTIONS
        assert post_job(live.client).status_code == 202


def test_a_full_disk_stops_a_job_until_there_is_space(tmp_path: Path) -> None:
    """SQLite's own limit of pages gives its own error of a full disk, without a file system of our own."""
    with running(scripted(jobs=True, state_dir=tmp_path, jobs_concurrency=2)) as live:
        wait_until_up(live.client)
        slow_down(live, 0.02)
        engine = live.server.config.app.state.jobs.engine  # type: ignore[union-attr]
        address = create(live.client, questions=[f"Question {number}?" for number in range(NUM_QUESTIONS)])
        wait_for(lambda: live.client.get(address).json()["progress"]["done"] > 0, 120)

        def limit(num_pages: int) -> None:
            # Of every connection: each has its own limit.
            from sqlalchemy import event

            def apply(connection: Any, *_: Any) -> None:
                connection.execute(f"PRAGMA max_page_count={num_pages}")

            event.listen(engine, "checkout", apply)

        limit(1)
        wait_for(lambda: post_job(live.client).status_code == 503, 60)
        assert_error(post_job(live.client), 503, "storage_full")
        limit(2**30)
        wait_for(lambda: post_job(live.client).status_code == 202, 60)
        job = wait_for_end(live.client, address, timeout_s=180)
        assert job["status"] == "succeeded"
        assert [each["error"] for each in job["result"]["data"]] == [None] * NUM_QUESTIONS


def test_of_two_file_locks_with_one_id_one_is_held(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "jobs-0.lock"), FileLock(tmp_path / "jobs-0.lock")
    assert first.acquire() and first.acquire() and not second.acquire()
    first.release()
    assert second.acquire() and not first.acquire()
    second.release()


@needs_postgres
def test_of_two_advisory_locks_with_one_id_one_is_held(cluster: Cluster) -> None:
    url = cluster.new_database()
    engines = [open_engine(url) for _ in range(2)]
    first, second = (AdvisoryLock(engine, "jobs-0") for engine in engines)
    other = AdvisoryLock(engines[0], "jobs-1")
    assert first.acquire() and first.acquire() and not second.acquire() and other.acquire()
    first.release()
    assert second.acquire() and not first.acquire()
    for lock in (second, other):
        lock.release()
    for engine in engines:
        engine.dispose()


def test_of_two_processes_with_one_id_the_second_replaces_the_first(tmp_path: Path) -> None:
    environment = {"HYPER_ENGINE": "scripted", "HYPER_STATE_DIR": str(tmp_path)}
    environment["HYPER_SCRIPTED_TOKEN_INTERVAL_S"] = "0.01"
    with contextlib.ExitStack() as stack:
        first, first_url = stack.enter_context(serve_process(environment, ready_timeout_s=120))
        other = stack.enter_context(httpx.Client(base_url=first_url, timeout=60))
        wait_until_up(other)
        _, url = stack.enter_context(serve_process(environment, ready_timeout_s=120))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        wait_until_up(client)
        address = create(client, questions=[f"Question {number}?" for number in range(NUM_QUESTIONS)])
        wait_for(lambda: client.get(address).json()["progress"]["done"] > 0, 120)
        assert 'hyper_jobs_runner{runner="jobs-0"} 0.0' in client.get("/metrics").text
        first.kill()
        job = wait_for_end(client, address)
        assert job["status"] == "succeeded"
        assert 'hyper_jobs_runner{runner="jobs-0"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("jump_s", [-1e9, 1e9])
def test_a_jump_of_the_clock_ages_nothing(monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    clock = CautiousClock()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    assert clock.now_s() <= real() + 1
    # A job taken before the jump, and one taken after it, are both new.
    assert clock.age_s(real()) < 60 and clock.age_s(time.time()) < 60
