"""The service over vLLM with an untrained model: the engine, its metrics, its death and a clean shutdown."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.conftest import VllmHost
from tests.process import ROOT, exit_code, post, serve_process
from tests.serving import Live, tone, wait_for

WATCHING = ("deploy/grafana/dashboards/hyper.json", "deploy/prometheus/rules.yml")
CHOICES = ["a bell", "a dog", "the sea"]


def test_an_untrained_model_still_answers(live_vllm: Live) -> None:
    open_reply = live_vllm.ask(max_tokens=32).json()
    assert open_reply["termination"] in ("truncated", "malformed", "complete")
    assert open_reply["usage"]["completion_tokens"] <= 32 + 64
    assert open_reply["usage"]["audio_tokens"] == 25 and open_reply["model"] == "random-tiny"
    reply = live_vllm.ask(choices=CHOICES, max_tokens=32).json()
    assert sum(reply["answer"]["scores"]) == pytest.approx(1) and reply["answer"]["text"] in CHOICES
    assert reply["trace"]["raw"].endswith("</FINAL_ANSWER>") and "PAUSE" not in reply["trace"]["raw"]
    timings = reply["timings_ms"]
    assert timings["prefill"] > 0 and timings["first_token"] < timings["first_answer_token"] <= timings["total"]


def test_a_stream_says_what_the_reply_says(live_vllm: Live) -> None:
    reply = live_vllm.ask(choices=CHOICES, max_tokens=40, seed=3, temperature=0.8).json()
    events = live_vllm.events(choices=CHOICES, max_tokens=40, seed=3, temperature=0.8)
    done = events[-1][1]
    for key in ("answer", "perception", "reasoning", "trace", "termination", "pause"):
        assert done[key] == reply[key]
    assert "".join(data["text"] for name, data in events if name == "answer.delta") == reply["answer"]["text"]


def test_the_second_question_about_a_clip_reuses_the_first(live_vllm: Live) -> None:
    clip = tone(20.0, hertz=123.0)
    first = live_vllm.ask(clip, max_tokens=4).json()["usage"]
    second = live_vllm.ask(clip, question="And who speaks?", max_tokens=4).json()["usage"]
    assert first["cached_tokens"] == 0 and second["cached_tokens"] > 300


def test_all_of_the_window_is_heard(live_vllm: Live) -> None:
    reply = live_vllm.ask(tone(30.0), max_tokens=4).json()
    assert reply["usage"]["audio_tokens"] == 750 and reply["audio"][0]["truncated"] is False


def test_a_client_that_leaves_frees_the_engine(live_vllm: Live) -> None:
    # Without the gate: its loop guard would soon abort the text of an untrained model.
    fields = {"question": "What?", "max_tokens": "900", "pause": "off"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{live_vllm.url}/v1/audio/qa", data=fields, files={"file": ("clip", tone())}, timeout=0.4)
    live_vllm.wait_until_idle(2.0)
    assert live_vllm.ask(max_tokens=4).status_code == 200


def test_the_metrics_of_the_engine_pass_through(live_vllm: Live) -> None:
    live_vllm.ask(max_tokens=4)
    text = live_vllm.client.get("/metrics").text
    assert "vllm:num_requests_running" in text and "vllm:prefix_cache_queries_total" in text
    (labels,) = re.findall(r"^hyper_build_info\{(.*)\} 1", text, flags=re.MULTILINE)
    assert {'checkpoint="random-tiny"', 'dtype="float32"', 'engine="vllm"'} <= set(labels.split(","))
    # Metrics used by the dashboard and the alerts; vLLM renames its metrics now and then.
    wanted = {name for path in WATCHING for name in re.findall(r"vllm:\w+", (ROOT / path).read_text(encoding="utf-8"))}
    exported = set(re.findall(r"^(vllm:\w+)[ {]", text, flags=re.MULTILINE))
    assert len(wanted) >= 5 and wanted <= exported


def test_what_the_engine_took_is_told_apart(live_vllm: Live) -> None:
    def total(name: str, **labels: str) -> float:
        return live_vllm.metric(f"hyper_{name}", **labels)

    before = {
        stage: total("stage_seconds_sum", stage=stage) for stage in ("features", "prefill", "first_token", "score")
    }
    hits, misses = total("audio_cache_hits_total"), total("audio_cache_misses_total")
    num_scored = total("stage_seconds_count", stage="score")
    clip = tone(12.0, hertz=321.0)
    for _ in range(2):
        assert live_vllm.ask(clip, max_tokens=8, choices=CHOICES).status_code == 200
    # Counted after a request's reply.
    wait_for(lambda: total("stage_seconds_count", stage="score") == num_scored + 2)
    took = {stage: total("stage_seconds_sum", stage=stage) - seconds for stage, seconds in before.items()}
    assert (
        0 < took["prefill"] < took["first_token"] and 0 < took["features"] < took["first_token"] and took["score"] > 0
    )
    assert (total("audio_cache_hits_total") - hits, total("audio_cache_misses_total") - misses) == (1, 1)
    assert total("cached_tokens_total") > 250 and total("audio_tokens_total") >= 600
    info = live_vllm.service.metrics.build._value
    assert info["vllm"][0].isdigit() and info["runner"] in ("v1", "v2")


def test_eight_at_once(live_vllm: Live) -> None:
    statuses: list[int] = []

    def ask() -> None:
        reply = httpx.post(
            f"{live_vllm.url}/v1/audio/qa",
            data={"question": "What?", "choices": CHOICES, "max_tokens": "24"},
            files={"file": ("clip", tone())},
            timeout=60,
        )
        statuses.append(reply.status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 8


def test_an_engine_that_is_killed_or_hangs_is_started_again(vllm_host: VllmHost, random_checkpoint: Path) -> None:
    vllm_host.close()
    environment = {
        "HYPER_ENGINE": "vllm",
        "HYPER_CHECKPOINT": str(random_checkpoint),
        "HYPER_DTYPE": "float32",
        "HYPER_HANG_TIMEOUT_S": "10",
    }
    with serve_process(environment, ready_timeout_s=240) as (process, url):
        before = vllm_processes(process.pid)
        for number, (sent, heard_within_s) in enumerate(((signal.SIGKILL, 1.0), (signal.SIGSTOP, 20.0))):
            assert post(url, max_tokens=4).status_code == 200
            workers = vllm_processes(process.pid)
            assert workers
            found: list[tuple[httpx.Response, float]] = []

            def ask(found: list[tuple[httpx.Response, float]] = found) -> None:
                # Repeatedly, as an answer may be short: the engine must be busy when it is killed.
                while (reply := post(url, max_tokens=1900, pause="off")).status_code == 200:
                    pass
                found.append((reply, time.monotonic()))

            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            started_s = time.monotonic()
            for pid in workers:
                os.kill(pid, sent)
            for thread in threads:
                thread.join(40)
            assert [json.loads(reply.text)["error"]["code"] for reply, _ in found] == ["engine_unavailable"] * 4
            slowest_s = max(ended_s for _, ended_s in found) - started_s
            assert slowest_s < heard_within_s
            assert httpx.get(f"{url}/livez").status_code == 200 and httpx.get(f"{url}/readyz").status_code == 503
            deadline_s = time.monotonic() + 120
            while httpx.get(f"{url}/readyz").status_code != 200:
                assert time.monotonic() < deadline_s and process.poll() is None
                time.sleep(0.2)
            print(f"{sent.name}: heard within {slowest_s:.2f} s, ready after {time.monotonic() - started_s:.1f} s")
            assert not [pid for pid in workers if runs(pid)]
            text = httpx.get(f"{url}/metrics").text
            assert "vllm:num_requests_running" in text and "hyper_engine_restarts_total{reason=" in text
            assert len(vllm_processes(process.pid)) == len(before), f"restart {number + 1} leaves no process behind"
        assert post(url, max_tokens=4).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert exit_code(process, 30) == 0


def test_when_the_service_is_killed_its_engine_ends_too(vllm_host: VllmHost, random_checkpoint: Path) -> None:
    vllm_host.close()
    environment = {"HYPER_ENGINE": "vllm", "HYPER_CHECKPOINT": str(random_checkpoint), "HYPER_DTYPE": "float32"}
    with serve_process(environment, ready_timeout_s=240) as (process, _):
        workers = vllm_processes(process.pid)
        assert workers
        process.kill()
        deadline_s = time.monotonic() + 5
        while [pid for pid in workers if runs(pid)] and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not [pid for pid in workers if runs(pid)]


def runs(pid: int) -> bool:
    """Return whether a process runs; an ended process waiting for init does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def vllm_processes(parent: int) -> list[int]:
    """Return the engine's processes: the parent's children and grandchildren named VLLM."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            name = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if b"VLLM" in name and int(fields[1]) in (parent, *found):
            found.append(int(path.name))
    return found
