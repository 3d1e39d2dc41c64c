"""Settings come from the environment, once, and cannot change."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from server.settings import Settings, platform_variables, unknown_variables


def test_every_setting_reads_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPER_PORT", "9001")
    monkeypatch.setenv("HYPER_ENGINE", "scripted")
    monkeypatch.setenv("HYPER_CHECKPOINT", "/models/one")
    monkeypatch.setenv("HYPER_MAX_AUDIO_BYTES", "3000000")
    settings = Settings()
    assert (settings.port, settings.engine, str(settings.checkpoint)) == (9001, "scripted", "/models/one")
    assert settings.max_body_bytes == 4_000_000 + 1024 * 1024


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


KUBERNETES = {
    "HYPER_PORT": "tcp://10.96.7.1:8000",
    "HYPER_SERVICE_HOST": "10.96.7.1",
    "HYPER_SERVICE_PORT": "8000",
    "HYPER_SERVICE_PORT_HTTP": "8000",
    "HYPER_SERVICE_PORT_METRICS_V2": "9000",
    "HYPER_PORT_8000_TCP": "tcp://10.96.7.1:8000",
    "HYPER_PORT_8000_TCP_PROTO": "tcp",
    "HYPER_PORT_8000_TCP_PORT": "8000",
    "HYPER_PORT_8000_TCP_ADDR": "10.96.7.1",
    "HYPER_PORT_53_UDP": "udp://10.96.7.1:53",
}
OTHER_PLATFORM = {
    # A second service of the same application, one with a dual-stack address, and one named like a setting.
    "HYPER_REDIS_SERVICE_HOST": "10.96.7.2",
    "HYPER_REDIS_SERVICE_PORT": "6379",
    "HYPER_REDIS_PORT": "tcp://[fd00::2]:6379",
    "HYPER_REDIS_PORT_6379_TCP_ADDR": "fd00::2",
    "HYPER_MAX_AUDIO_S_SERVICE_HOST": "10.96.7.3",
    "HYPER_MAX_AUDIO_S_SERVICE_PORT": "80",
    "HYPER_METRICS_PORT": "tcp://10.96.7.4:9000",
    # A Docker link.
    "HYPER_DB_NAME": "/web/hyper_db",
    "HYPER_DB_PORT": "tcp://172.17.0.5:5432",
    "HYPER_DB_PORT_5432_TCP_START": "tcp://172.17.0.5:5432",
    "HYPER_DB_ENV_POSTGRES_PASSWORD": "x",
}
OURS = {
    "HYPER_HOST": "0.0.0.0",
    "HYPER_MAX_AUDIO_S": "30",
    "HYPER_MAX_IN_FLIGHT": "4",
    "HYPER_KEY_FILE": "/etc/keys",
    "HYPER_SERVICE_NAME": "mistake",
    "PATH": "/bin",
    "HYPERION_PORT": "tcp://10.0.0.1:1",
}


def test_variables_of_kubernetes_and_docker_are_told_from_settings() -> None:
    both = KUBERNETES | OTHER_PLATFORM
    assert platform_variables(both | OURS) == sorted(both)
    assert platform_variables(OURS) == []
    left = {name: value for name, value in (both | OURS).items() if name not in both}
    assert [message.partition(":")[0] for message in unknown_variables(left)] == ["HYPER_SERVICE_NAME"]


def test_a_port_that_the_operator_set_stays_a_setting_beside_a_service_of_that_name() -> None:
    environment = KUBERNETES | {"HYPER_PORT": "9000"}
    assert "HYPER_PORT" not in platform_variables(environment)
    assert "HYPER_SERVICE_HOST" in platform_variables(environment)
    assert platform_variables({"HYPER_PORT": "9000", "HYPER_METRICS_PORT": "9001"}) == []
    assert platform_variables({"HYPER_PORT": "tcp://10.0.0.1"}) == ["HYPER_PORT"]
