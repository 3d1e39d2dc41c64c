"""Requests about batches, for tests with the official `openai` client."""

from __future__ import annotations

import json
from typing import Any

from openai import OpenAI

from tests.serving import Live, json_question, wait_for

QA = "/v1/audio/qa"


def client_of(live: Live, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0, timeout=60)


def line(custom_id: str, url: str = QA, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body or json_question()}


def upload(client: OpenAI, *lines: Any) -> str:
    """Store a batch file of objects, or of texts as they are."""
    texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    return client.files.create(file=("in.jsonl", "\n".join(texts).encode()), purpose="batch").id


def create(client: OpenAI, file_id: str, endpoint: Any = QA, **more: Any) -> Any:
    return client.batches.create(input_file_id=file_id, endpoint=endpoint, completion_window="24h", **more)


def ended(client: OpenAI, batch_id: str) -> Any:
    final = ("completed", "failed", "cancelled", "expired")
    wait_for(lambda: client.batches.retrieve(batch_id).status in final, 120)
    return client.batches.retrieve(batch_id)


def lines_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(each) for each in client.files.content(file_id).text.splitlines()]
