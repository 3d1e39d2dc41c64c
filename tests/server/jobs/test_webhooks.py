"""Webhooks arrive signed, are repeated until they do, and end where they must."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest

from server.settings import Settings
from tests.jobs import create, post_job, wait_for_end, wait_until_up
from tests.serving import Live, assert_error, running, scripted, wait_for


class Receiver:
    """A receiver on 127.0.0.1 with the replies of its list, and then 200."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.deliveries: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.deliveries.append(({key.lower(): value for key, value in self.headers.items()}, body))
                status = receiver.statuses.pop(0) if receiver.statuses else 200
                self.send_response(status)
                if status == 302:
                    self.send_header("location", "http://127.0.0.1:1/")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.close()


@pytest.fixture
def settings(job_settings: dict[str, Any]) -> Settings:
    return scripted(**job_settings, webhook_allowed_hosts="127.0.0.1", webhook_retry_delays_s="0.1,0.1,0.1")


def deliveries_of(live: Live, address: str) -> list[dict[str, Any]]:
    return live.client.get(f"{address}/deliveries").json()["data"]


def test_webhooks_are_signed_repeated_and_logged(settings: Settings, receiver: Receiver) -> None:
    with running(settings) as live:
        wait_until_up(live.client)
        fields: dict[str, Any] = {"webhook[url]": receiver.url}
        error = assert_error(post_job(live.client, **fields), 400, "invalid_parameter", "webhook")
        assert "/v1/webhooks/secrets" in error["hint"]
        old, new = (live.client.post("/v1/webhooks/secrets").json() for _ in range(2))
        listed = live.client.get("/v1/webhooks/secrets").json()["data"]
        assert [each["id"] for each in listed] == [new["id"], old["id"]]
        assert [each["secret"] for each in listed] == [None, None]
        assert (listed[0]["expires_at"], listed[1]["expires_at"] is not None) == (None, True)

        # Two failures, then success; the body holds no part of the answer.
        receiver.statuses = [500, 302]
        address = create(live.client, **fields)
        job = wait_for_end(live.client, address)
        wait_for(lambda: len(deliveries_of(live, address)) == 3, 120)
        log = deliveries_of(live, address)
        assert [(each["attempt"], each["status_code"]) for each in log] == [(1, 500), (2, 302), (3, 200)]
        assert [each["error"] is None for each in log] == [False, False, True]
        assert len({headers["webhook-id"] for headers, _ in receiver.deliveries}) == 1
        headers, body = receiver.deliveries[-1]
        event = json.loads(body)
        assert (event["type"], event["data"]) == ("job.succeeded", {"id": job["id"], "status": "succeeded"})
        client = openai.OpenAI(api_key="none", base_url=f"{live.url}/v1")
        for secret in (old["secret"], new["secret"]):
            client.webhooks.verify_signature(body.decode(), headers, secret=secret)
            with pytest.raises(openai.InvalidWebhookSignatureError):
                client.webhooks.verify_signature(body.decode() + " ", headers, secret=secret)
        assert live.metric("hyper_webhook_attempts_total", outcome="retried") == 2
        assert live.metric("hyper_webhook_attempts_total", outcome="delivered") == 1

        # 410 ends the attempts, and so does the last delay.
        receiver.statuses = [410]
        gone = create(live.client, **fields)
        receiver.statuses += [503] * 4
        wait_for(lambda: len(deliveries_of(live, gone)) == 1, 120)
        failing = create(live.client, **fields)
        wait_for(lambda: len(deliveries_of(live, failing)) == 4, 120)
        wait_for(lambda: live.metric("hyper_webhook_attempts_total", outcome="abandoned") == 2, 60)
        assert deliveries_of(live, failing)[-1]["next_at"] is None
        assert len(deliveries_of(live, gone)) == 1

        # A deleted secret signs no longer.
        assert live.client.delete(f"/v1/webhooks/secrets/{old['id']}").status_code == 204
        assert_error(live.client.delete(f"/v1/webhooks/secrets/{old['id']}"), 404, "not_found")
        last = create(live.client, **fields)
        wait_for(lambda: len(deliveries_of(live, last)) == 1, 120)
        headers, body = receiver.deliveries[-1]
        client.webhooks.verify_signature(body.decode(), headers, secret=new["secret"])
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(body.decode(), headers, secret=old["secret"])
        # A third rotation keeps two.
        ids = [live.client.post("/v1/webhooks/secrets").json()["id"] for _ in range(2)]
        found = live.client.get("/v1/webhooks/secrets").json()["data"]
        assert [each["id"] for each in found] == ids[::-1]

        # A private address is refused when the job is sent.
        for url in ("https://169.254.169.254/latest", "https://[::ffff:10.0.0.1]/", "http://example.com/"):
            refused = httpx.post(
                f"{live.url}/v1/jobs",
                data={"question": "What?", "webhook[url]": url},
                files={"file": ("clip", b"0" * 100)},
                timeout=60,
            )
            assert_error(refused, 400, "invalid_parameter", "webhook.url")
