"""Batches of keys and across restarts; one process has one runner, so each service here runs alone."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import openai
import pytest

from server import api_keys as keys
from tests.batches import client_of, create, ended, line, lines_of, upload
from tests.jobs import wait_until_up
from tests.serving import QUESTION, running, scripted, slow_down, tone, wait_for


def test_a_batch_belongs_to_its_key(job_settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ours, theirs = (keys.add(path, name=name, scopes=("ask",), audio_s_per_day=3.5) for name in ("ours", "theirs"))
    with running(scripted(**job_settings, key_file=path)) as live:
        live.client.headers["authorization"] = f"Bearer {ours}"
        wait_until_up(live.client)
        with client_of(live, ours) as client, client_of(live, theirs) as other:
            clip = {"data": base64.b64encode(tone(2.0)).decode()}
            file_id = upload(client, *(line(each, question=QUESTION, audio=clip) for each in "123"))
            with pytest.raises(openai.NotFoundError):
                create(other, file_id)
            batch = create(client, file_id)
            for call in (other.batches.retrieve, other.batches.cancel):
                with pytest.raises(openai.NotFoundError):
                    call(batch.id)
            assert other.batches.list().data == []
            batch = ended(client, batch.id)
            # Each line is charged: 3.5 s of audio pay for one clip of two seconds.
            assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 2)
            codes = {each["response"]["body"]["error"]["code"] for each in lines_of(client, batch.error_file_id)}
            assert codes == {"audio_quota_exceeded"}
            with pytest.raises(openai.NotFoundError):
                other.files.content(batch.output_file_id)


def test_a_batch_continues_after_a_restart(job_settings: dict[str, Any]) -> None:
    settings = scripted(**job_settings)
    with running(settings) as live:
        wait_until_up(live.client)
        slow_down(live, 0.05)
        with client_of(live) as client:
            batch = create(client, upload(client, *(line(str(number)) for number in range(12))))
            address = f"/v1/batches/{batch.id}"
            wait_for(lambda: live.client.get(address).json()["request_counts"]["completed"] > 0, 90)
    with running(settings) as live:
        wait_until_up(live.client)
        with client_of(live) as client:
            batch = ended(client, batch.id)
            assert batch.request_counts.completed == 12
            found = [each["custom_id"] for each in lines_of(client, batch.output_file_id)]
            assert found == [str(number) for number in range(12)]
