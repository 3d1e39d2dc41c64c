"""Limits, keys and refusals of jobs, each with a service of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from server import api_keys
from tests.jobs import create, post_job, wait_for_end, wait_until_up
from tests.serving import Live, assert_error, running, scripted, slow_down, tone, wait_for


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_jobs_of_another_key_do_not_exist(job_settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    anna, ben = (api_keys.add(file, name=name, scopes=("ask",)) for name in ("anna", "ben"))
    with running(scripted(**job_settings, key_file=file)) as live:
        live.client.headers.update(bearer(anna))
        wait_until_up(live.client)
        address = create(live.client, headers={"idempotency-key": "same"})
        with httpx.Client(base_url=live.url, headers=bearer(ben), timeout=60) as other:
            for method, path in [
                ("GET", address),
                ("GET", f"{address}/events"),
                ("GET", f"{address}/deliveries"),
                ("POST", f"{address}/cancel"),
                ("DELETE", address),
            ]:
                assert_error(other.request(method, path), 404, "not_found")
            assert other.get("/v1/jobs").json()["data"] == []
            # An idempotency key is one of its caller alone.
            assert create(other, headers={"idempotency-key": "same"}) != address
        assert wait_for_end(live.client, address)["status"] == "succeeded"
        assert_error(httpx.get(f"{live.url}{address}"), 401, "invalid_api_key")


def test_a_job_of_a_revoked_key_fails(job_settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    anna, ben = (api_keys.add(file, name=name, scopes=("ask",)) for name in ("anna", "ben"))
    with running(scripted(**job_settings, key_file=file)) as live:
        live.client.headers.update(bearer(anna))
        wait_until_up(live.client)
        slow_down(live, 0.02)
        address = create(live.client, questions=[f"Question {number}?" for number in range(12)])
        api_keys.revoke(file, "anna")
        wait_for(lambda: live.client.get("/v1/jobs").status_code == 401, 90)
        store = live.server.config.app.state.jobs.store  # type: ignore[union-attr]
        wait_for(lambda: not store.get(address.rpartition("/")[2]).is_active, 60)
        job = store.get(address.rpartition("/")[2])
        assert job.result["data"][-1]["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{live.url}/v1/jobs", headers=bearer(ben)).json()["data"] == []


def test_audio_is_charged_once_when_the_job_is_taken(job_settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key = api_keys.add(file, name="anna", scopes=("ask",), audio_s_per_day=10.0)
    with running(scripted(**job_settings, key_file=file)) as live:
        live.client.headers.update(bearer(key))
        wait_until_up(live.client)
        address = create(live.client, tone(6.0), questions=["One?", "Two?", "Three?"])
        assert_error(post_job(live.client, tone(6.0)), 429, "audio_quota_exceeded")
        # Three steps on six seconds each, and no second charge.
        assert wait_for_end(live.client, address)["status"] == "succeeded"
        assert create(live.client, tone(3.0))


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"question": "One?", "questions": ["Two?"]}, "invalid_parameter", "question"),
        ({"questions": []}, "missing_parameter", "question"),
        ({"questions": ["One?"] * 101}, "invalid_parameter", "questions"),
        ({"question": " "}, "invalid_prompt", "question"),
        ({"question": "One?", "stream": "true"}, "invalid_parameter", "stream"),
        ({"question": "One?", "channel": "each"}, "invalid_parameter", "channel"),
        ({"question": "One?", "long_audio": "window", "start_s": "99"}, "invalid_parameter", "start_s"),
        ({"question": "One?", "keep_s": "1e9"}, "invalid_parameter", "keep_s"),
        ({"question": "One?", "keep_s": "1"}, "invalid_parameter", "keep_s"),
        ({"question": "One?", "webhok[url]": "https://example.com"}, "unknown_parameter", None),
    ],
)
def test_a_job_that_cannot_succeed_is_refused(tmp_path: Path, fields: Any, code: str, param: str | None) -> None:
    with running(scripted(jobs=True, state_dir=tmp_path)) as live:
        wait_until_up(live.client)
        response = post_job(live.client, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, code)
        assert param is None or error["param"] == param
        assert_error(post_job(live.client, tone(31.0)), 422, "audio_too_long", "file")
        assert live.client.get("/v1/jobs").json()["data"] == []


def test_too_many_unfinished_jobs_are_refused(job_settings: dict[str, Any]) -> None:
    with running(scripted(**job_settings, jobs_max_active=2)) as live:
        wait_until_up(live.client)
        slow_down(live, 0.5)
        addresses = [create(live.client) for _ in range(2)]
        error = assert_error(post_job(live.client), 429, "too_many_jobs")
        assert (error["limit"], error["actual"]) == (2, 2)
        live.client.post(f"{addresses[0]}/cancel")
        third = create(live.client)
        # DBOS reports an error if it stops while it takes a job from its queue.
        live.client.post(f"{addresses[1]}/cancel")
        wait_for(lambda: live.client.get(third).json()["status"] == "running", 90)


def test_an_old_job_expires(job_settings: dict[str, Any]) -> None:
    with running(scripted(**job_settings, jobs_max_age_s=1.0)) as live:
        wait_until_up(live.client)
        slow_down(live, 0.2)
        address = create(live.client, questions=[f"Question {number}?" for number in range(40)])
        assert wait_for_end(live.client, address)["status"] == "expired"
        live.wait_until_idle(90)


def test_without_jobs_their_endpoints_name_the_setting(live: Live) -> None:
    error = assert_error(post_job(live.client), 404, "jobs_disabled")
    assert "HYPER_JOBS" in error["hint"]
    assert_error(live.client.get("/v1/jobs"), 404, "jobs_disabled")
