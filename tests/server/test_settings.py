"""Settings come from the environment, once, and cannot change."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from server.settings import Settings, unknown_variables


def test_every_setting_reads_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPER_PORT", "9001")
    monkeypatch.setenv("HYPER_ENGINE", "scripted")
    monkeypatch.setenv("HYPER_CHECKPOINT", "/models/one")
    monkeypatch.setenv("HYPER_MAX_AUDIO_BYTES", "3000000")
    settings = Settings()
    assert (settings.port, settings.engine, str(settings.checkpoint)) == (9001, "scripted", "/models/one")
    assert settings.max_body_bytes == 4_000_000 + 1024 * 1024


def test_what_is_passed_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPER_PORT", "9001")
    assert Settings(port=9002).port == 9002


@pytest.mark.parametrize(
    ("name", "value"), [("HYPER_PORT", "70000"), ("HYPER_ENGINE", "other"), ("HYPER_PING_INTERVAL_S", "11")]
)
def test_a_setting_out_of_range_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError):
        Settings()


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPER_CHECKPOINT", "")
    monkeypatch.setenv("HYPER_PORT", "")
    settings = Settings()
    assert (settings.checkpoint, settings.port) == (None, 8000)


def test_a_variable_that_no_setting_reads_is_found() -> None:
    environment = {
        "HYPER_MAX_INFLIGHT": "4",
        "HYPER_MAX_IN_FLIGHT": "4",
        "hyper_port": "1",
        "HYPER_URL": "http://127.0.0.1:1",
        "HYPER_EMPTY": "",
        "HYPERION": "1",
        "HYPER_QQQQQQQQ": "1",
    }
    first, second = unknown_variables(environment)
    assert first.startswith("HYPER_MAX_INFLIGHT: ") and first.endswith("HYPER_MAX_IN_FLIGHT?")
    assert second == "HYPER_QQQQQQQQ: unknown setting"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # pyright: ignore
