"""The conformance check passes on the service, and finds the faults of one that differs."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from loadtests import conformance
from loadtests.__main__ import main
from loadtests.conformance import CALLS, Context, MismatchError, check, refused
from tests.serving import Live, running, scripted


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Service with a folder for files."""
    with running(scripted(state_dir=tmp_path_factory.mktemp("state"))) as found:
        yield found


def test_the_service_conforms_to_the_client_and_to_its_own_document(service: Live) -> None:
    assert len(CALLS) >= 60
    reply = CliRunner().invoke(main, ["conformance", "--url", service.url, "--requests", "40"])
    figures = json.loads(reply.stdout.splitlines()[-1])
    assert figures["openai_calls_failed"] == {} and figures["wrong"] == []
    assert figures["openai_calls"] == figures["openai_calls_total"] == len(CALLS)
    assert (figures["schema_violations"], figures["http_5xx"]) == (0, 0) and figures["generated_requests"] >= 40
    assert reply.exit_code == 0


def test_faults_are_counted(service: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(context: Context) -> None:
        raise MismatchError("is another one")

    calls = {"models": CALLS["models"], "wrong": wrong, "raises nothing": refused(OSError, CALLS["models"])}  # type: ignore[arg-type]
    monkeypatch.setattr(conformance, "CALLS", calls)
    document = conformance.describe(service.url, {})
    del document["paths"]["/v1/models"]["get"]["responses"]["200"]
    monkeypatch.setattr(conformance, "describe", lambda url, headers: document)
    result = check(service.url, None, num=0, seed=0)
    assert result.passed == ["models"] and set(result.failed) == {"wrong", "raises nothing"}
    assert result.num_violations >= 2 and "an undescribed status" in result.violations[0]
    assert not result.is_met
