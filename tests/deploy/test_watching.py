"""The dashboard, the alerts and their page agree with the service's metrics.

promtool and Prometheus are Debian's `prometheus`. Tests with them are skipped only if it is not installed.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import CliRunner
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.metrics import MetricWrapperBase

from loadtests.__main__ import main
from server.errors import ERRORS
from server.telemetry.metrics import Metrics
from tests.process import ROOT
from tests.serving import Live, tone, wait_for

DEPLOY = ROOT / "deploy"
DASHBOARD_FILE = DEPLOY / "grafana/dashboards/hyper.json"
DASHBOARD: dict[str, Any] = json.loads(DASHBOARD_FILE.read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
PAGE = (ROOT / "docs/watching.md").read_text(encoding="utf-8")

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")), reason="Debian's prometheus is not installed"
)

WORDS_OF_PROMQL = {
    "by",
    "on",
    "without",
    "ignoring",
    "group_left",
    "group_right",
    "and",
    "or",
    "unless",
    "bool",
    "offset",
}
OTHER_LABELS = {"instance", "job", "le"}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def panel_expressions() -> list[str]:
    annotations = [each["expr"] for each in DASHBOARD["annotations"]["list"]]
    return [target["expr"] for panel in panels() for target in panel["targets"]] + annotations


def expressions() -> list[str]:
    return [*panel_expressions(), *(rule["expr"] for rule in RULES)]


def names_in(expression: str) -> set[str]:
    """Return the metrics of a PromQL expression: its words without functions, labels and keywords."""
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^\]]*\]', "", re.sub(r'"[^"]*"', "", expression))
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    words = re.findall(r"[A-Za-z_:][\w:]*(?!\w)(?!\s*\()", bare)
    return {word for word in words if word not in WORDS_OF_PROMQL}


def labels_in(expression: str) -> set[str]:
    """Return the labels selected or grouped by an expression."""
    lists = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
    matchers = re.findall(r"\{([^}]*)\}", re.sub(r'"[^"]*"', '""', expression))
    grouped = {word.strip() for each in lists for word in each.split(",") if word.strip()}
    return grouped | {found for each in matchers for found in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", each)}


def collectors() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Return the type and the labels of each of our metrics, by its exposed name."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for collector in vars(Metrics()).values():
        if isinstance(collector, MetricWrapperBase):
            family = next(iter(collector.describe()))
            ending = {"counter": "_total", "info": "_info"}.get(family.type, "")
            found[family.name + ending] = (family.type, tuple(collector._labelnames))
    return found


def exported(text: str) -> set[str]:
    """Return the possible sample names of an exposition, by its declared types."""
    names: set[str] = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE):
        names |= {name, *(f"{name}{ending}" for ending in ("_bucket", "_sum", "_count") if kind == "histogram")}
    return names


def test_every_metric_of_the_dashboard_and_the_rules_is_exported_by_the_running_service(live: Live) -> None:
    known = exported(live.client.get("/metrics").text) | {rule["record"] for rule in RULES if "record" in rule} | {"up"}
    wanted = {name for expression in expressions() for name in names_in(expression)}
    # vLLM's metrics are checked with vLLM, in test_vllm.py.
    assert not {name for name in wanted - known if not name.startswith("vllm:")}
    assert len([name for name in wanted if name.startswith("hyper_")]) > 50


def test_every_label_is_one_that_its_metric_has() -> None:
    labels_of = {name: set(labels) for name, (_, labels) in collectors().items()}
    informed = {"engine", "layers", "version", "checkpoint", "vllm", "runner", "manifest_sha256"}
    for expression in expressions():
        metrics = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names_in(expression)}
        allowed = OTHER_LABELS.union(*(labels_of.get(name, set[str]()) for name in metrics))
        if any(name.endswith("_info") or name.startswith("vllm:") for name in metrics):
            allowed |= informed
        assert labels_in(expression) <= allowed, expression


def test_names_and_labels_are_found_in_promql() -> None:
    expression = (
        'sum by (job, le) (rate(hyper_a_bucket{endpoint="/v1", b=~"x{1}"}[5m])) / on () group_left vllm:b > 0.5'
    )
    assert names_in(expression) == {"hyper_a_bucket", "vllm:b"}
    assert labels_in(expression) == {"job", "le", "endpoint", "b"}


def test_the_page_and_the_exposition_explain_a_metric_in_the_same_words() -> None:
    page = dict(re.findall(r"^\| `(hyper_\w+)` \| \w+ \| [^|]* \| ([^|]*) \|", PAGE, flags=re.MULTILINE))
    exported_help = dict(re.findall(r"^# HELP (hyper_\S+) (.*)$", Metrics().render().decode(), flags=re.MULTILINE))
    assert page == {name: exported_help[name] for name in page}


def test_the_page_lists_every_metric_with_its_type_and_labels() -> None:
    rows = re.findall(r"^\| `(hyper_\w+)` \| (\w+) \| ([^|]*) \|", PAGE, flags=re.MULTILINE)
    listed = {
        name: (kind, tuple(label.strip() for label in labels.split(",") if label.strip()))
        for name, kind, labels in rows
    }
    assert listed == collectors() and len(rows) == len(listed)


def test_the_page_lists_every_alert_with_what_to_do() -> None:
    rows = dict(re.findall(r"^\| `(Hyper\w+)` \| (\w+) \|", PAGE, flags=re.MULTILINE))
    assert rows == {alert["alert"]: alert["labels"]["severity"] for alert in ALERTS}


def test_every_alert_says_what_it_is_and_what_to_do_and_has_a_test() -> None:
    tested = (DEPLOY / "prometheus/rules_test.yml").read_text(encoding="utf-8")
    for alert in ALERTS:
        assert set(alert["annotations"]) == {"summary", "description"}
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert len(alert["annotations"]["description"]) > 80 and len(alert["annotations"]["summary"]) < 120
        fires = rf'alertname="{alert["alert"]}".*\n.*\n\s+exp_samples:\n\s+- labels'
        assert re.search(fires, tested), f"no test in which {alert['alert']} fires"


def test_errors_of_ours_are_all_that_the_table_of_faults_has() -> None:
    ours = {code for code, kind in ERRORS.items() if kind.status >= 500} - {"deadline_exceeded"}
    found = [pattern for text in expressions() for pattern in re.findall(r'outcome=~"([^"]*)"', text)]
    assert found and all(set(pattern.split("|")) == ours for pattern in found)


def lost(ours: Any, theirs: Any, path: str = "") -> Iterator[str]:
    """Yield the parts of a dashboard lost after reading and writing with Grafana's types."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            yield from lost(value, theirs[key], f"{path}/{key}") if key in theirs else [f"{path}/{key}"]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from lost(*pair, f"{path}/{number}")
    elif ours != theirs:
        yield path


def unknown_to_grafana(dashboard: dict[str, Any]) -> list[str]:
    register_default_plugins()
    return list(lost(dashboard, json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))))


def test_the_dashboard_holds_to_grafanas_schema() -> None:
    assert unknown_to_grafana(DASHBOARD) == []
    wrong = copy.deepcopy(DASHBOARD)
    wrong["panels"][0]["fieldConfig"]["defaults"]["units"] = "s"
    wrong["panels"][0]["targets"][0]["query"] = "up"
    wrong["panels"][0]["options"]["colour"] = "red"
    assert len(unknown_to_grafana(wrong)) == 3, "the check finds what Grafana does not know"


def test_panels_say_what_they_show_and_stand_beside_each_other() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert len(rows) == 9
    for panel in panels():
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert all("$instance" in expression for expression in panel_expressions())


def test_provisioning_points_at_the_dashboard_and_the_prometheus() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/hyper.yml").read_text())["providers"]
    assert source["type"] == "prometheus" and source["url"] == "$PROMETHEUS_URL"
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


def promtool(*arguments: str, folder: Path = DEPLOY / "prometheus") -> str:
    run = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@needs_prometheus
def test_promtool_takes_the_rules_the_configuration_and_the_dashboards_expressions(tmp_path: Path) -> None:
    assert "SUCCESS" in promtool("check", "rules", "rules.yml") and promtool("check", "config", "prometheus.yml")
    filled = [each.replace("$__rate_interval", "1m").replace("$instance", ".*") for each in panel_expressions()]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(filled)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", "panels.yml", folder=tmp_path)


@needs_prometheus
def test_each_alert_fires_when_it_should_and_none_on_a_healthy_service() -> None:
    promtool("test", "rules", "rules_test.yml")


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[str]:
    """Run a Prometheus with our configuration except target and interval; yield its address."""
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus/rules.yml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [
        *("prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def ask_prometheus(url: str, path: str, **query: str) -> Any:
    try:
        reply = httpx.get(f"{url}/api/v1/{path}", params=query, timeout=10)
    except httpx.TransportError:
        return None
    if reply.status_code == 503:  # It is still starting.
        return None
    assert reply.json()["status"] == "success", reply.text
    return reply.json()["data"]


def values(url: str, expression: str) -> Sequence[Any]:
    found = ask_prometheus(url, "query", query=expression)
    return [] if found is None else found["result"]


@needs_prometheus
def test_a_real_prometheus_scrapes_the_service_and_the_dashboard_is_drawn_from_it(live: Live, tmp_path: Path) -> None:
    with scraping(live.url.removeprefix("http://"), tmp_path) as url:
        wait_for(lambda: bool(values(url, "count_over_time(hyper_ready[1m]) > 1")), timeout_s=60)
        started_s = time.time()
        for number in range(3):
            assert live.ask(tone(1.0 + number), choices=["one", "two"]).status_code == 200
        # A rate needs two scrapes with them.
        wait_for(lambda: bool(values(url, "rate(hyper_time_to_first_token_seconds_count[10s]) > 0")), timeout_s=30)
        (up,) = values(url, 'up{job="hyper"}')
        assert up["value"][1] == "1"
        wait_for(lambda: all(rule["health"] == "ok" for rule in rules_of(url)), timeout_s=30)
        assert len(rules_of(url)) == len(RULES)
        assert not [rule["name"] for rule in rules_of(url) if rule.get("state") == "firing"]
        picture = tmp_path / "dashboard.png"
        arguments = ["dashboard", "--prometheus", url, "--out", str(picture), "--minutes", "1", "--rate", "10s"]
        result = CliRunner().invoke(main, [*arguments, "--dashboard", str(DASHBOARD_FILE)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert picture.read_bytes().startswith(b"\x89PNG") and time.time() > started_s
        found = re.search(r"(\d+) panels have data", result.output)
        # Panels for vLLM, refusals and dead decoders are empty here.
        assert found and int(found[1]) > 0.7 * len(panels())


def rules_of(url: str) -> list[dict[str, Any]]:
    found = ask_prometheus(url, "rules")
    return [rule for group in found["groups"] for rule in group["rules"]]


def test_a_prometheus_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    arguments = ["dashboard", "--prometheus", "http://127.0.0.1:9", "--out", str(tmp_path / "x.png")]
    result = CliRunner().invoke(main, [*arguments, "--dashboard", str(DASHBOARD_FILE)])
    assert result.exit_code == 1 and "is no Prometheus" in result.output
