"""API keys: valid key files, changes under a running service, and authentication of every path."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from starlette.routing import Route

from hyper.commands import ask as ask_command
from hyper_model.errors import HyperError
from loadtests.fuzz_http import DISGUISED_HEADERS, METHODS, STRAY_PATHS, bearer, disguises, wrong_headers
from server import api_keys as keys
from server.api_keys import KeyFileError, KeyRing
from server.app import create_app
from server.commands import keys as command
from server.middleware import OPERATOR_PATHS, PROBE_PATHS, PUBLIC_PATHS
from server.quotas import Quotas
from server.request_context import RequestContext
from server.serving import bind
from tests.serving import QUESTION, Live, assert_error, running, scripted, tone, wait_for


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def secrets(key_file: Path) -> dict[str, str]:
    """A key of each kind, by name."""
    return {
        "anna": keys.add(key_file, name="anna"),
        "ben": keys.add(key_file, name="ben", scopes=("ask", "metrics")),
        "scraper": keys.add(key_file, name="scraper", scopes=("metrics",)),
        "night": keys.add(key_file, name="night", priority="batch"),
        "old": keys.add(key_file, name="old", expires=datetime.now(UTC) - timedelta(seconds=1)),
    }


@pytest.fixture(scope="module")
def guarded(key_file: Path, secrets: dict[str, str]) -> Iterator[Live]:
    """Service with authentication."""
    with running(scripted(key_file=key_file)) as service:
        yield service


def ask(service: Live, secret: str, **headers: str) -> httpx.Response:
    files = {"file": ("clip", tone(0.2))}
    return service.client.post(
        "/v1/audio/qa", data={"question": QUESTION}, files=files, headers={**bearer(secret), **headers}
    )


def test_a_key_opens_and_is_named_in_the_log_but_never_shown(
    guarded: Live, secrets: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:

    def lines() -> list[logging.LogRecord]:
        return [each for each in caplog.records if each.name == "hyper.access"]

    with caplog.at_level("INFO"):
        assert ask(guarded, secrets["anna"]).status_code == 200
        # It is written after the reply, so the client may be faster.
        wait_for(lambda: bool(lines()))
    (record,) = lines()
    assert vars(record)["key"] == "anna"
    assert secrets["anna"] not in "".join(str(vars(each)) for each in caplog.records)
    text = guarded.client.get("/metrics", headers=bearer(secrets["ben"])).text
    assert "hyper_auth_failures" in text and "hyp_" not in text and "anna" not in text


def test_without_a_key_no_address_answers(guarded: Live, secrets: dict[str, str]) -> None:
    """Try every route and similar paths, by every method, under several hosts, without a key and with a wrong one."""
    app = guarded.server.config.loaded_app
    routes = {route.path for route in guarded_routes(guarded)}
    assert {"/v1/audio/qa", "/v1/info", "/metrics", "/", "/docs", "/openapi.json", *PROBE_PATHS} <= routes
    assert app is not None
    paths = {path for route in routes - PUBLIC_PATHS for path in disguises(route)}
    paths |= set(STRAY_PATHS)
    num_tried = 0
    for path in sorted(paths):
        for method in METHODS:
            for headers in DISGUISED_HEADERS:
                request = guarded.client.build_request(method, guarded.url, headers=headers)
                request.url = request.url.copy_with(raw_path=path.encode())
                reply = guarded.client.send(request)
                assert reply.status_code in (400, 401), (method, path, headers, reply.status_code)
                num_tried += 1
    for headers in wrong_headers(secrets["anna"], secrets["old"]):
        for path in routes - PUBLIC_PATHS:
            reply = guarded.client.get(path, headers=headers)
            assert_error(reply, 401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
            num_tried += 1
    assert num_tried > 1000


def guarded_routes(service: Live) -> list[Route]:
    """Return the routes of an application like the running one."""
    app = create_app(service.service.settings)
    app.state.service.pool.shutdown()
    found: list[Route] = []
    pending = list(app.routes)
    while pending:
        route = pending.pop()
        if isinstance(route, Route):
            found.append(route)
        else:
            pending += getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", [])
    return found


def test_the_api_page_says_where_a_key_is_asked_for(guarded: Live, secrets: dict[str, str], live: Live) -> None:
    document = guarded.client.get("/openapi.json", headers=bearer(secrets["anna"])).json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_public = path in PUBLIC_PATHS
            assert ("security" in operation, "401" in operation["responses"]) == (not is_public, not is_public)
    assert document["components"]["securitySchemes"]
    assert "securitySchemes" not in live.client.get("/openapi.json").json()["components"]


def test_probes_ask_for_no_key(guarded: Live) -> None:
    for path in PUBLIC_PATHS:
        assert guarded.client.get(path).status_code == 200
        assert guarded.client.get(path, headers=bearer("wrong")).status_code == 200


def test_a_scope_opens_its_own_addresses_alone(guarded: Live, secrets: dict[str, str]) -> None:
    can = {
        name: [
            guarded.client.get(path, headers=bearer(secrets[name])).status_code
            for path in ("/v1/info", "/openapi.json", "/metrics", "/nothing")
        ]
        for name in ("anna", "ben", "scraper")
    }
    assert can == {"anna": [200, 200, 403, 404], "ben": [200, 200, 200, 404], "scraper": [403, 403, 200, 403]}
    assert_error(guarded.client.get("/metrics", headers=bearer(secrets["anna"])), 403, "forbidden")
    assert_error(ask(guarded, secrets["scraper"]), 403, "forbidden")


def test_a_key_is_asked_for_before_the_body_is_read(guarded: Live) -> None:
    with httpx.stream(
        "POST", f"{guarded.url}/v1/audio/qa", content=(bytes(2**16) for _ in range(10_000)), timeout=10
    ) as reply:
        assert reply.status_code == 401


def test_a_class_can_be_lowered_and_not_raised(guarded: Live, secrets: dict[str, str]) -> None:
    seen: list[str] = []
    enter = guarded.service.limiter.slot

    def watch(priority: keys.Priority) -> object:
        seen.append(priority)
        return enter(priority)

    guarded.service.limiter.slot = watch  # pyright: ignore
    try:
        for name, header in (("anna", None), ("anna", "batch"), ("night", None), ("night", "interactive")):
            assert ask(guarded, secrets[name], **({"x-hyper-priority": header} if header else {})).status_code == 200
    finally:
        guarded.service.limiter.slot = enter
    assert seen == ["interactive", "batch", "batch", "batch"]
    reply = ask(guarded, secrets["anna"], **{"x-hyper-priority": "first"})
    assert_error(reply, 400, "invalid_parameter", "x-hyper-priority")


def test_callers_share_nothing_that_the_engine_keeps(guarded: Live, secrets: dict[str, str]) -> None:
    service, quotas = guarded.service, Quotas()
    assert service.keys is not None
    exchanges = [
        RequestContext("x", is_body_complete=True, tenant=None if key is None else quotas.of(key))
        for key in (None, *(service.keys.find(secrets[name]) for name in ("anna", "ben")))
    ]
    salts = [service.answerer.cache_salt(context) for context in exchanges]
    assert len(set(salts)) == 3 and salts == [service.answerer.cache_salt(context) for context in exchanges]
    assert not any("anna" in salt for salt in salts)


def test_a_change_of_the_file_is_heeded_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    first = keys.add(path, name="first")
    with running(scripted(key_file=path)) as service:

        def status(secret: str) -> int:
            return service.client.get("/v1/info", headers=bearer(secret)).status_code

        assert status(first) == 200
        second = keys.add(path, name="second", requests_per_minute=1)
        wait_for(lambda: status(second) == 200)
        good = path.read_text()
        path.write_text("{")
        time.sleep(0.6)
        assert status(first) == 200, "a broken file changes nothing"
        path.unlink()
        time.sleep(0.6)
        assert status(first) == 200, "nor does a missing one"
        path.write_text(good)
        keys.revoke(path, "first")
        wait_for(lambda: status(first) == 401)
        assert status(second) == 200


def test_the_file_holds_no_key_and_is_its_owners_alone(key_file: Path, secrets: dict[str, str]) -> None:
    text = key_file.read_text()
    assert not any(secret in text or secret[12:] in text for secret in secrets.values())
    assert all(re.fullmatch(r"hyp_[A-Za-z0-9_-]{43}", secret) for secret in secrets.values())
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert [path.name for path in key_file.parent.iterdir()] == [key_file.name]


def test_a_file_that_was_given_to_the_service_stays_the_services(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys.add(path, name="first")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 10001, 10001)
    before = path.stat()
    keys.add(path, name="second")
    keys.revoke(path, "first")
    after = path.stat()
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (before.st_uid, before.st_gid, 0o640)


BAD_FILES = {
    "empty": "",
    "no json": "hyp_",
    "a list": "[]",
    "another version": '{"version": 2, "keys": []}',
    "a plain key": '{"keys": [{"name": "a", "key": "hyp_1"}]}',
    "a short digest": json.dumps(
        {"keys": [{"name": "a", "sha256": "00", "starts": "hyp_", "created": "2026-01-01T00:00:00Z"}]}
    ),
    "an unknown scope": json.dumps(
        {
            "keys": [
                {
                    "name": "a",
                    "sha256": "0" * 64,
                    "starts": "hyp_",
                    "created": "2026-01-01T00:00:00Z",
                    "scopes": ["root"],
                }
            ]
        }
    ),
    "a name twice": json.dumps(
        {
            "keys": [
                {"name": "a", "sha256": digit * 64, "starts": "hyp_", "created": "2026-01-01T00:00:00Z"}
                for digit in "01"
            ]
        }
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_key_file_stops_the_service(tmp_path: Path, name: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(BAD_FILES[name])
    with pytest.raises(KeyFileError, match="keys"):
        create_app(scripted(key_file=path))
    with pytest.raises(KeyFileError, match="cannot be read"):
        KeyRing(tmp_path / "nothing.json")


def test_without_keys_only_this_machine_is_served() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(HyperError, match="HYPER_KEY_FILE"):
            create_app(scripted(host=host))
    for fields in ({"host": "127.0.0.2"}, {"host": "::1"}, {"host": "0.0.0.0", "open_to_all": True}):
        create_app(scripted(**fields)).state.service.pool.shutdown()


def test_keys_are_made_listed_and_revoked_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def hyper_keys(*arguments: str) -> str:
        result = CliRunner().invoke(command, [*arguments], env={"HYPER_KEY_FILE": str(path)})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output.strip()

    secret = hyper_keys("add", "anna", "--requests-per-minute", "60", "--concurrent", "4", "--audio-s-per-day", "3600")
    hyper_keys("add", "night", "--priority", "batch", "--scope", "ask", "--scope", "metrics", "--days", "30")
    found = KeyRing(path).find(secret)
    assert found is not None
    assert (found.name, found.requests_per_minute, found.concurrent, found.audio_s_per_day) == ("anna", 60, 4, 3600)
    listing = hyper_keys("list").splitlines()
    assert len(listing) == 2 and secret not in listing[0]
    assert "anna" in listing[0] and "60 requests/min, 4 in flight, 3600 audio s/day" in listing[0]
    assert "ask+metrics" in listing[1] and "batch" in listing[1] and "until 20" in listing[1]
    with pytest.raises(KeyFileError, match="already"):
        hyper_keys("add", "anna")
    with pytest.raises(KeyFileError, match="name"):
        hyper_keys("add", "a b")
    with pytest.raises(KeyFileError, match="concurrent"):
        hyper_keys("add", "c", "--concurrent", "0")
    hyper_keys("revoke", "anna")
    assert KeyRing(path).find(secret) is None
    with pytest.raises(KeyFileError, match="no key named anna"):
        hyper_keys("revoke", "anna")


def test_ask_sends_the_key(guarded: Live, secrets: dict[str, str], tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    clip.write_bytes(tone())
    arguments = [str(clip), QUESTION, "--url", guarded.url]
    assert CliRunner().invoke(ask_command, arguments, env={"HYPER_KEY": secrets["anna"]}).exit_code == 0
    refused = CliRunner().invoke(ask_command, [*arguments, "--key", "hyp_wrong"])
    assert refused.exit_code == 1 and "API key" in refused.output


def test_the_metrics_port_answers_operators_without_a_key_and_nobody_else(
    key_file: Path, secrets: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = scripted(key_file=key_file, metrics_port=port)
    with bind(settings.metrics_host, port) as listener, running(settings, listeners=[listener]) as service:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as operators:
            for path in OPERATOR_PATHS:
                assert operators.get(path).status_code == 200
            for path in ("/v1/info", "/docs", "/v1/audio/qa"):
                assert_error(operators.get(path, headers=bearer(secrets["ben"])), 404, "not_found")
        forged = service.client.get("/metrics", headers={"host": f"127.0.0.1:{port}"})
        assert_error(forged, 401, "invalid_api_key")
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(HyperError, match="HYPER_METRICS_PORT"),
    ):
        bind("127.0.0.1", taken.getsockname()[1])
