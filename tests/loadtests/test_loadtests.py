"""The load driver: plans, counts, and real runs against the service with its scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import socket
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from loadtests.__main__ import main
from loadtests.client import CANCELLED, EventReader, Outcome, error_code, open_session, timings
from loadtests.driver import DriverLateError, require_punctual, run_open_loop
from loadtests.experiment import Experiment
from loadtests.report import account, percentile, summarize, table
from loadtests.scenarios import AIMS, SCENARIOS, Figure, Ladder, Scenario, Step, figures_table
from loadtests.target import Target, parse_metrics
from loadtests.workload import Clips, Mix, arrivals, find_clips, plan
from tests.paths import CLIPS as ASSETS
from tests.serving import Live, running, scripted, tone

SEED = 7


def read_events(*chunks: bytes) -> list[tuple[str, bytes]]:
    reader = EventReader()
    return [event for chunk in chunks for event in reader.feed(chunk)]


def outcome(due_s: float = 0.0, e2e_s: float = 1.0, error: str | None = None, **fields: Any) -> Outcome:
    return Outcome(due_s, fields.pop("late_s", 0.0), e2e_s, fields.pop("ttft_s", None), error, **fields)


def run(*arguments: str) -> tuple[Result, dict[str, Any]]:
    result = CliRunner().invoke(main, ["run", *arguments])
    lines = result.output.splitlines()
    return result, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    for index in range(2):
        (tmp_path / f"tone{index}.wav").write_bytes(tone(hertz=440 + index))
    (tmp_path / "notes.txt").write_text("not a clip")
    return tmp_path


EVENTS = b': ping\n\nevent: section.delta\ndata: {"text": "a"}\n\ndata: one\ndata: two\n\nevent: cut\ndata: off'


@given(st.lists(st.integers(0, len(EVENTS)), max_size=5))
def test_an_event_has_its_name_and_its_data_however_it_arrives(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(EVENTS)]
    chunks = [EVENTS[start:end] for start, end in itertools.pairwise(places)]
    assert read_events(*chunks) == [("section.delta", b'{"text": "a"}'), ("message", b"one\ntwo")]


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error": null}', b'{"error": {}}', b"\xff"])
def test_a_reply_without_an_error_object_counts_under_its_status(body: bytes) -> None:
    assert error_code(body, "http_502") == "http_502"
    assert timings(body) == {}


def test_an_error_object_counts_under_its_code() -> None:
    assert error_code(b'{"error": {"code": "overloaded"}}', "http_503") == "overloaded"


@given(st.lists(st.floats(min_value=0, max_value=1e3), min_size=1), st.sampled_from([50, 95]))
def test_a_percentile_is_a_measured_value_that_enough_values_do_not_exceed(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    rounded = sorted(round(value, 4) for value in values)
    assert found in rounded
    assert sum(value <= found for value in rounded) * 100 >= percent * len(values)


def test_arrivals_are_poisson() -> None:
    times_s = list(arrivals(20.0, 1000.0, random.Random(SEED)))
    gaps_s = [after - before for before, after in itertools.pairwise(times_s)]
    # Five standard deviations of a Poisson count; the spread of exponential gaps is their mean.
    assert abs(len(times_s) - 20_000) < 5 * 20_000**0.5
    assert statistics.stdev(gaps_s) == pytest.approx(statistics.mean(gaps_s), rel=0.03)
    # Counts per second have a variance equal to their mean; a regular clock's would not vary.
    counts = [sum(1 for _ in arrivals(20.0, 1.0, random.Random(seed))) for seed in range(2000)]
    assert statistics.variance(counts) == pytest.approx(20.0, rel=0.15)


def test_a_plan_follows_from_its_seed_and_has_the_shares_of_its_mix() -> None:
    held, mix = Clips(ASSETS), Mix(stream=0.25, cancel=0.1, follow_up=0.5, batch=0.75)
    planned = plan(held, mix, 50.0, 40.0, SEED)
    assert planned == plan(held, mix, 50.0, 40.0, SEED) != plan(held, mix, 50.0, 40.0, SEED + 1)

    def share(holds: list[bool]) -> float:
        return sum(holds) / len(planned)

    questions = [each.question for each in planned]
    assert share([each.is_stream for each in questions]) == pytest.approx(0.25, abs=0.06)
    assert share([each.cancel_after_s is not None for each in questions]) == pytest.approx(0.1, abs=0.04)
    assert share(["x-hyper-priority" in each.headers for each in questions]) == pytest.approx(0.75, abs=0.06)
    assert len({len(each.body) for each in questions}) > 50, "clips of many lengths"


def test_only_audio_files_are_clips(clips: Path) -> None:
    assert [path.name for path in find_clips(clips)] == ["tone0.wav", "tone1.wav"]


def test_a_server_that_stands_still_does_not_slow_what_is_offered(clips: Path) -> None:
    """A closed loop would stop at its number of clients, and would count the delay for one request of many."""
    rate_per_s, seconds = 100.0, 1.0
    planned = plan(Clips(clips), Mix(stream=0.0), rate_per_s, seconds, SEED)
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as stalled:
        held: list[socket.socket] = []

        def accept() -> None:
            while len(held) < len(planned):
                held.append(stalled.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()

        async def drive() -> list[Outcome]:
            url = f"http://127.0.0.1:{stalled.getsockname()[1]}"
            async with open_session(url, None, timeout_s=1.0) as session:
                return await run_open_loop(session, planned)

        started_s = time.perf_counter()
        outcomes = asyncio.run(drive())
        took_s = time.perf_counter() - started_s
        thread.join(10)
        for connection in held:
            connection.close()
    assert len(held) == len(outcomes) == len(planned) > 70, "each had a connection while none was answered"
    assert {each.error for each in outcomes} == {"client_timeout"}
    assert took_s < seconds + 1.0 + 1.0
    require_punctual(outcomes, max_late_s=0.5)


def test_latency_counts_from_when_a_request_was_due(live: Live, clips: Path) -> None:
    planned = plan(Clips(clips), Mix(), 20.0, 0.5, SEED)

    async def drive() -> list[Outcome]:
        async with open_session(live.url, None, timeout_s=30.0) as session:
            asyncio.get_running_loop().call_later(0.05, time.sleep, 0.6)  # Block the driver itself.
            return await run_open_loop(session, planned)

    outcomes = asyncio.run(drive())
    late = [each for each in outcomes if each.late_s > 0.1]
    assert late and all(each.e2e_s > each.late_s for each in outcomes)
    with pytest.raises(DriverLateError, match="bottleneck"):
        require_punctual(outcomes)


def test_a_report_counts_answers_refusals_and_errors_apart() -> None:
    outcomes = [
        outcome(10.0, 1.0, ttft_s=0.25, timings_ms={"decode": 20.0}),
        outcome(10.5, 1.5, ttft_s=0.5, timings_ms={"decode": 40.0}),
        outcome(10.0, 0.1, "overloaded", status=503, has_retry_after=True),
        outcome(10.0, 0.2, "overloaded", status=503),
        outcome(10.0, 0.2, CANCELLED),
    ]
    report = summarize(outcomes, name="x", offered_per_s=1.0, duration_s=2.0, slo_s=1.2)
    assert (report.num_requests, report.num_answers, report.num_good) == (5, 2, 1)
    assert (report.errors, report.failures) == ({CANCELLED: 1, "overloaded": 2}, {"overloaded": 2})
    # Both ended within the last four fifths of the two seconds; one of them in time.
    assert (report.answers_per_s, report.goodput_per_s) == (1.25, 0.625)
    assert (report.e2e.p50_s, report.e2e.p99_s, report.ttft.p50_s) == (1.0, 1.5, 0.25)
    assert (report.refusals.num, report.refusals.p99_s, report.refusals_without_retry_after) == (2, 0.2, 1)
    assert report.stages["decode"].max_s == 0.04
    assert "overloaded 2" in table([report]) and "decode 20/40" in table([report])


def test_a_report_of_failures_alone_has_no_latency() -> None:
    report = summarize([outcome(error="client_timeout")], name="x", offered_per_s=1.0, duration_s=1.0, slo_s=1.0)
    assert (report.e2e.p50_s, report.ttft.p95_s, report.answers_per_s) == (None, None, 0.0)


SEEN = [outcome(), outcome(), outcome(error="overloaded"), outcome(error=CANCELLED)]


@pytest.mark.parametrize(
    ("after", "unaccounted"),
    [
        ({"ok": 12, "overloaded": 1, "client_closed_request": 1}, 0),
        ({"ok": 13, "overloaded": 1}, 0),  # The client left after the answer was written.
        ({"ok": 12, "overloaded": 1}, 1),
        ({"ok": 11, "overloaded": 2, "client_closed_request": 1}, 1),
        ({"ok": 14, "overloaded": 1, "client_closed_request": 1}, 2),
    ],
)
def test_what_clients_saw_is_held_against_what_the_service_counted(after: dict[str, int], unaccounted: int) -> None:
    assert account(SEEN, {"ok": 10}, after).unaccounted == unaccounted


def test_a_request_that_breaks_off_is_accounted_for_by_nobody() -> None:
    assert account([outcome(error="client_ServerDisconnectedError")], {}, {"ok": 1}).unaccounted == 1


def test_a_request_whose_client_gave_up_before_it_left_is_none() -> None:
    assert account([outcome(), outcome(error=CANCELLED, is_sent=False)], {}, {"ok": 1}).unaccounted == 0


def test_an_exposition_gives_the_ends_of_questions_and_not_those_of_probes() -> None:
    text = """# TYPE hyper_request_seconds histogram
hyper_request_seconds_count{endpoint="/v1/audio/qa",outcome="ok"} 3
hyper_request_seconds_count{endpoint="other",outcome="body_too_large"} 2
hyper_request_seconds_count{endpoint="/readyz",outcome="ok"} 900
# TYPE hyper_in_flight gauge
hyper_in_flight 4
# TYPE process_resident_memory_bytes gauge
process_resident_memory_bytes 1048576
"""
    found = parse_metrics(text)
    assert (found.ended, found.in_flight, found.rss_mib) == ({"ok": 3, "body_too_large": 2}, 4, 1.0)


def test_figures_say_whether_they_reach_their_aims() -> None:
    good, bad = Figure("overload_goodput_ratio", 0.9, 1), Figure("rejection_p99_ms", 100.1, 5)
    assert good.is_met and not bad.is_met and Figure("something_else", 1e9, 1).is_met
    shown = figures_table([good, bad]).splitlines()
    assert shown[1].endswith(">= 0.9") and shown[2].endswith("MISSED")
    assert set(AIMS) >= {"unaccounted", "sigterm_lost", "scrape_p99_ms"}


def test_a_folder_without_clips_is_a_usage_error(tmp_path: Path) -> None:
    result, _ = run("smoke", "--clips", str(tmp_path), "--out", str(tmp_path / "out"))
    assert (result.exit_code, "no audio file" in result.output) == (2, True)


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_help_names_every_scenario(name: str) -> None:
    assert f"\n  {name} " in CliRunner().invoke(main, ["run", "--help"]).output


def test_a_smoke_run_of_a_service_of_its_own_answers_everything(tmp_path: Path) -> None:
    arguments = ["--serve", "HYPER_ENGINE=scripted", "--clips", str(ASSETS), "--scale", "0.2", "--out", str(tmp_path)]
    result, figures = run("smoke", *arguments)
    assert (result.exit_code, figures) == (0, {"unaccounted": 0, "failures": 0}), result.output
    kept = json.loads((tmp_path / "smoke.json").read_text())
    (period,) = kept["periods"]
    assert kept["service"]["engine"] == "scripted" and kept["machine"]["cores"] >= 1 and kept["is_met"]
    assert period["num_answers"] == period["num_requests"] > 0
    assert 0 < period["ttft"]["p50_s"] <= period["e2e"]["max_s"]
    assert {"receive", "decode", "total"} <= set(period["stages"])
    assert (tmp_path / "smoke.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_service_refuses_counts_under_its_code_and_fails_the_run(live: Live, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("this is not audio at all")
    arguments = ["--url", live.url, "--clips", str(tmp_path), "--scale", "0.1", "--out", str(tmp_path / "out")]
    result, figures = run("smoke", *arguments)
    assert (result.exit_code, figures["unaccounted"]) == (1, 0) and figures["failures"] > 0
    assert "unsupported_audio" in result.output


def test_an_overload_is_measured_and_every_request_accounted_for() -> None:
    """A small overload: two places, and up to four requests at a time."""
    scenario = Scenario(
        about="",
        mix=Mix(stream=0.5, cancel=0.1, batch=0.2, fields={"max_tokens": "8", "reasoning": "answer"}),
        ladder=Ladder(first_per_s=8.0, factor=2.0, seconds=1.0, max_rungs=2),
        steps=(Step("below", of_peak=0.5, seconds=1.5), Step("beyond", of_peak=8.0, seconds=1.5)),
        allows=frozenset({"overloaded"}),
    )
    settings = scripted(scripted_token_interval_s=0.005, max_in_flight=4, max_num_seqs=2)
    with running(settings) as service, contextlib.closing(Target(service.url)) as target:
        found = Experiment(target, Clips(ASSETS), SEED, say=lambda text: None)
        figures = {each.name: each for each in found.carry_out(scenario)}
    assert figures["unaccounted"].value == 0 and figures["failures"].value == 0
    assert figures["rejection_p99_ms"].num > 0 and figures["rejections_without_retry_after"].value == 0
    assert figures["overload_goodput_ratio"].value > 0.3
    assert 0 < figures["unaccounted"].num <= sum(each.num_requests for each in found.reports)
    assert set(found.accounts) == {"rung 1", "rung 2", "below", "beyond"}


def test_chaos_loses_nothing_when_clients_leave_and_the_service_is_ended(tmp_path: Path) -> None:
    settings = {"HYPER_ENGINE": "scripted", "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.005"}
    arguments = [word for item in settings.items() for word in ("--serve", "=".join(item))]
    result, figures = run("chaos", *arguments, "--clips", str(ASSETS), "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert (figures["held_by_clients_that_left"], figures["sigterm_lost"], figures["sigterm_exit_code"]) == (0, 0, 0)
    assert "no process of its own" in result.output, "the scripted engine cannot be killed apart from its service"
