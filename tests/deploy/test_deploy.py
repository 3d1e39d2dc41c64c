"""The deployment files agree with the service: compose and systemd files, and the image."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.commands import serve
from server.decoding.pool import STOP_TIMEOUT_S
from server.serving import CLOSE_TIMEOUT_S
from server.settings import Settings, unknown_variables
from tests.process import ROOT

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "hyper.service"
MOUNTED_LATER = {"secrets"}  # The operator makes these.


@cache
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))


def service_of_ours(name: str) -> dict[str, Any]:
    return compose()["services"][name]


def unit() -> dict[str, list[str]]:
    """Return the unit's directives; a repeated one has two values."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def image_variables() -> dict[str, str]:
    """Return the variables set for the service by the Dockerfile."""
    return dict(re.findall(r"^\s+(?:ENV )?(HYPER_\w+)=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M))


def settings_of(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Read variables like the service."""
    assert unknown_variables(variables) == []
    for name in [name for name in os.environ if name.startswith("HYPER_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Settings()


def seconds(text: str) -> int:
    return int(re.fullmatch(r"(\d+)s?", text)[1])  # pyright: ignore[reportOptionalSubscript]


def end_s(settings: Settings) -> float:
    """Return the longest duration of an orderly shutdown, in seconds."""
    return settings.drain_timeout_s + CLOSE_TIMEOUT_S + STOP_TIMEOUT_S


def test_the_compose_file_is_one() -> None:
    command = [*(sys.executable, "-m", "check_jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    checked = subprocess.run([*command, DEPLOY / "compose.yaml"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_compose_sets_what_the_service_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_of_ours(name)
    settings = settings_of({**image_variables(), **service["environment"]}, monkeypatch)
    assert settings.key_file is not None and not settings.open_to_all, "nobody asks without a key"
    (published,) = service["ports"]
    assert published == f"${{LISTEN:-127.0.0.1}}:{settings.port}:{settings.port}", "and not the metrics"
    assert f":{settings.port}/readyz" in service["healthcheck"]["test"][-1]
    assert seconds(service["stop_grace_period"]) >= end_s(settings)
    assert any(mount.split(":")[1:] == [str(settings.key_file.parent), "ro"] for mount in service["volumes"])


@pytest.mark.parametrize("name", ["cpu", "gpu", "prometheus", "grafana"])
def test_every_container_is_kept_small(name: str) -> None:
    service = service_of_ours(name)
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"] and service["pids_limit"] and service["healthcheck"]["test"][0] == "CMD"
    assert all({"noexec", "nosuid", "nodev"} <= set(re.split("[:,]", mount)) for mount in service["tmpfs"])
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]) or "build" in service, "another image tomorrow"
    assert all(re.match(r"(127\.0\.0\.1|\$\{LISTEN:-127\.0\.0\.1\}):", port) for port in service.get("ports", ()))
    words = json.dumps(service.get("environment", {}))
    assert not re.search(r"(PASSWORD|SECRET|TOKEN|KEY)\"", words), "secrets are files"


def test_only_prometheus_reaches_the_metrics_and_nothing_reaches_out() -> None:
    networks = compose()["networks"]
    assert networks["metrics"] == {"internal": True}
    for name in ("front", "dashboards"):
        assert networks[name]["driver_opts"]["com.docker.network.bridge.enable_ip_masquerade"] == "false"
    assert service_of_ours("prometheus")["networks"] == ["metrics"]
    assert "front" not in service_of_ours("grafana")["networks"]


def mounts() -> Iterator[str]:
    """Yield compose's mounts from this folder."""
    for service in compose()["services"].values():
        yield from (mount.split(":")[0] for mount in service["volumes"] if mount.startswith("."))
    yield from (secret["file"] for secret in compose()["secrets"].values())


@pytest.mark.parametrize("place", sorted(set(mounts())))
def test_what_compose_mounts_is_there(place: str) -> None:
    if Path(place).parts[0] in MOUNTED_LATER:
        assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    else:
        assert (DEPLOY / place).is_dir()


def test_prometheus_asks_where_the_service_answers() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/compose.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    for name in ("cpu", "gpu"):
        service = service_of_ours(name)
        (alias,) = service["networks"]["metrics"]["aliases"]
        target = f"{alias}:{service['environment']['HYPER_METRICS_PORT']}"
        assert job["static_configs"] == [{"targets": [target]}]
    assert "--config.file=/etc/prometheus/compose.yml" in service_of_ours("prometheus")["command"]


def test_the_unit_ends_and_restarts_as_the_service_does(monkeypatch: pytest.MonkeyPatch) -> None:
    directives = unit()
    variables = dict(pair.split("=", 1) for line in directives["Environment"] for pair in line.split())
    ours = {name: value for name, value in variables.items() if name.startswith("HYPER_")}
    settings = settings_of(ours, monkeypatch)
    assert seconds(directives["TimeoutStopSec"][0]) >= end_s(settings)
    # The engine must not get the signal before the requests in flight are answered.
    assert (directives["KillMode"], directives["KillSignal"]) == (["mixed"], ["SIGTERM"])
    assert directives["OOMPolicy"] == ["continue"], "the service starts its engine again"
    codes = set(map(int, directives["RestartPreventExitStatus"][0].split()))
    help_text = serve.help or ""
    assert codes == {2, 78} and "78" in help_text and "70" in help_text
    assert directives["Restart"] == ["on-failure"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit_and_finds_it_closed(tmp_path: Path) -> None:
    # Unchanged except for paths of an installed service.
    text = UNIT.read_text(encoding="utf-8").replace("/opt/hyper/.venv/bin/hyper serve", "/bin/true")
    text = re.sub(r"^(User|Group)=.*$", r"\1=root", text, flags=re.M).replace("/opt/hyper", str(tmp_path))
    copy = tmp_path / "hyper.service"
    copy.write_text(text, encoding="utf-8")
    verified = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    about_it = [line for line in verified.stderr.splitlines() if "hyper.service" in line]
    assert about_it == []
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", UNIT]
    measured = subprocess.run(command, capture_output=True, text=True)
    # Before version 250 systemd measures only running units.
    if "offline" not in measured.stderr:
        assert measured.returncode == 0, measured.stdout.splitlines()[-1]


def test_the_image_is_named_as_it_is() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', text))
    assert (labels["version"], labels["licenses"]) == (project["version"], project["license"])
    base = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.M)
    assert base is not None and labels["base.name"] == f"docker.io/library/{base[1]}"
    assert re.fullmatch(r"python:3\.1[12]\.\d+-slim-\w+", base[1])
    # Each target ends with the user set by every earlier stage.
    assert re.findall(r"^USER (\S+)$", text, re.M)[-1] == "10001:10001"
