"""The stress part of jobs: lost and repeated steps are counted, and a real run has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.job_kills import JobKills, Receiver, kill_repeatedly
from tests.paths import CLIPS


def log_of(folder: Path, number: int, *steps: int) -> Path:
    path = folder / f"{number}.log"
    lines = [json.dumps({"message": "job step", "job": "job_1", "step": step}) for step in steps]
    path.write_text("\n".join([*lines, '{"message": "job st']))
    return path


@pytest.fixture
def run(tmp_path: Path) -> JobKills:
    """A run of one job of four steps, whose records have the numbers 2 to 5, with a kill after the second."""
    found = JobKills(CLIPS, tmp_path / "log", 1, tmp_path, Receiver())
    found.receiver.server.server_close()
    found.sent.ids, found.sent.num_steps, found.num_listed = {1: "job_1"}, {"job_1": 4}, 1
    found.sent.ended = {"job_1": {"result": {"data": [{"error": None}] * 4}}}
    found.logs = [log_of(tmp_path, 0), log_of(tmp_path, 1, 0, 1), log_of(tmp_path, 2, 2, 3)]
    found.recorded = [{("job_1", 2), ("job_1", 3)}, {("job_1", place) for place in (2, 3, 4, 5)}]
    return found


def test_a_run_without_a_loss_counts_none(run: JobKills) -> None:
    report = run.report()
    assert (report.num_lost, report.num_twice, report.num_steps) == (0, 0, 4)


def test_a_recorded_step_that_is_done_again_is_counted(run: JobKills, tmp_path: Path) -> None:
    run.logs[2] = log_of(tmp_path, 2, 1, 2, 3)
    assert run.report().num_twice == 1
    # A step without a record may run again: its process was killed in the middle of it.
    run.recorded[0] = {("job_1", 2)}
    assert run.report().num_twice == 0


def test_a_step_without_a_record_or_an_answer_is_counted(run: JobKills) -> None:
    run.recorded[1].remove(("job_1", 5))
    assert run.report().num_lost == 1
    run.sent.ended = {"job_1": {"error": {"code": "not_found"}}}
    assert run.report().num_lost == 4


def test_a_job_that_was_taken_twice_is_counted(run: JobKills) -> None:
    run.num_listed = 2
    assert run.report().num_twice == 1


def test_kills_lose_and_repeat_no_step(tmp_path: Path) -> None:
    report = kill_repeatedly(CLIPS, tmp_path / "log", 2, 3, lambda text: None)
    assert (report.num_lost, report.num_twice, report.delivered) == (0, 0, 1.0)
    assert report.num_steps > 0 and report.num_hooked > 0
