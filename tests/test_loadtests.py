"""The load driver: what it counts, and a true run against the service with its scripted engine."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from loadtests.__main__ import main
from loadtests.client import Outcome, error_code, events
from loadtests.driver import find_clips
from loadtests.report import percentile, summarize, table
from tests.serving import Live, tone


async def lines_of(text: Iterable[str]) -> AsyncIterator[str]:
    for line in text:
        yield line


def read_events(text: str) -> list[tuple[str, str]]:
    async def collect() -> list[tuple[str, str]]:
        return [event async for event in events(lines_of(text.split("\n")))]

    return asyncio.run(collect())


def smoke(url: str, clips: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    result = CliRunner().invoke(main, ["smoke", "--url", url, "--clips", str(clips), *arguments])
    return result, json.loads(result.output.splitlines()[-1])


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for index in range(2):
        (tmp_path / f"tone{index}.wav").write_bytes(tone(hertz=440 + index))
    (tmp_path / "notes.txt").write_text("not a clip")
    return tmp_path


def test_an_event_has_its_name_and_its_data_and_comments_are_none() -> None:
    text = ': ping\n\nevent: section.delta\ndata: {"text": "a"}\n\ndata: one\ndata: two\n\nevent: cut\ndata: off'
    assert read_events(text) == [("section.delta", '{"text": "a"}'), ("message", "one\ntwo")]


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": null}', b'{"error": {}}', b"\xff"])
def test_a_reply_without_an_error_object_counts_under_its_status(body: bytes) -> None:
    assert error_code(body, "http_502") == "http_502"


def test_an_error_object_counts_under_its_code() -> None:
    assert error_code(b'{"error": {"code": "overloaded"}}', "http_503") == "overloaded"


@given(st.lists(st.floats(min_value=0, max_value=1e3), min_size=1), st.sampled_from([50, 95]))
def test_a_percentile_is_a_measured_value_that_enough_values_do_not_exceed(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    rounded = sorted(round(value, 4) for value in values)
    assert found in rounded
    assert sum(value <= found for value in rounded) * 100 >= percent * len(values)


def test_a_report_counts_answers_and_errors_apart() -> None:
    report = summarize(
        [Outcome(10.0, 1.0, 0.25, None), Outcome(10.5, 1.5, 0.5, None), Outcome(10.0, 0.1, None, "overloaded")]
    )
    assert (report.num_requests, report.num_answers, report.errors) == (3, 2, {"overloaded": 1})
    assert (report.wall_s, report.answers_per_s) == (2.0, 1.0)
    assert (report.e2e_p50_s, report.e2e_p95_s, report.ttft_p50_s) == (1.0, 1.5, 0.25)
    assert "error overloaded" in table(report)


def test_a_report_of_failures_alone_has_no_latency() -> None:
    report = summarize([Outcome(0.0, 0.1, None, "client_timeout")])
    assert (report.e2e_p50_s, report.ttft_p95_s, report.answers_per_s) == (None, None, 0.0)
    assert "- / -" in table(report)


def test_only_audio_files_are_clips(clips: Path) -> None:
    assert [path.name for path in find_clips(clips)] == ["tone0.wav", "tone1.wav"]


def test_a_folder_without_clips_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["smoke", "--clips", str(tmp_path)])
    assert (result.exit_code, "no audio file" in result.output) == (2, True)


def test_a_service_that_is_not_there_is_counted_and_fails_the_run(clips: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound and never listening: nobody else can take the port meanwhile
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        result, report = smoke(url, clips, "--requests", "3", "--clients", "2")
    assert (result.exit_code, report["num_answers"], report["errors"]) == (1, 0, {"client_ConnectError": 3})


def test_a_smoke_run_of_the_service_answers_everything(live: Live, clips: Path) -> None:
    result, report = smoke(live.url, clips, "--requests", "9", "--clients", "3")
    assert (result.exit_code, report["num_answers"], report["errors"]) == (0, 9, {}), result.output
    assert 0 < report["ttft_p50_s"] <= report["e2e_p50_s"] <= report["e2e_p95_s"] <= report["wall_s"]


def test_what_the_service_refuses_counts_under_its_code(live: Live, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("this is not audio at all")
    result, report = smoke(live.url, tmp_path, "--requests", "2")
    assert (result.exit_code, report["num_answers"], sum(report["errors"].values())) == (1, 0, 2)
    assert not [code for code in report["errors"] if code.startswith(("http_", "client_"))]
