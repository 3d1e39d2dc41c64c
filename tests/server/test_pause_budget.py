"""The budget of `pause=auto`: smaller for a short deadline or a long queue, and never below a request's own value."""

from __future__ import annotations

import pytest

from server.app import create_app
from server.engines.protocol import ScriptedEngine
from server.pause_budget import Budget, PauseBudgeter
from server.service import Service
from tests.serving import Live, scripted

NO_QUEUE = {"num_waiting": 0, "num_places": 16}


def learned(trace_s: float = 1.0, pause_s: float = 0.2) -> PauseBudgeter:
    pace = PauseBudgeter()
    pace.record(trace_s + pause_s, [pause_s])
    return pace


def test_before_the_first_answer_nothing_is_lowered() -> None:
    assert PauseBudgeter().budget(3, left_s=0.01, **NO_QUEUE) == Budget(3)


def test_a_pace_learns_traces_without_their_pauses() -> None:
    pace = PauseBudgeter()
    for _ in range(200):
        pace.record(1.6, [0.2, 0.4])
    assert pace.trace_s == pytest.approx(1.0) and pace.pause_s == pytest.approx(0.3, abs=0.02)


def test_a_deadline_leaves_what_it_has_time_for() -> None:
    pace = learned()
    budgets = [pace.budget(3, left_s=left_s, **NO_QUEUE) for left_s in (60.0, 1.76, 1.51, 1.26, 0.5, -1.0)]
    assert [budget.max_pauses for budget in budgets] == [3, 2, 1, 0, 0, 0]
    assert [budget.lowered_by for budget in budgets] == [None, *["deadline"] * 5]


def test_a_queue_leaves_less_the_longer_it_is() -> None:
    budgets = [
        PauseBudgeter().budget(4, left_s=60, num_waiting=waiting, num_places=16) for waiting in (0, 1, 8, 15, 16, 99)
    ]
    assert [budget.max_pauses for budget in budgets] == [4, 3, 2, 0, 0, 0]
    assert [budget.lowered_by for budget in budgets] == [None, *["load"] * 5]


def test_a_budget_of_nothing_is_not_lowered() -> None:
    assert learned().budget(0, left_s=0, num_waiting=9, num_places=9) == Budget(0)


def test_a_request_says_what_became_of_auto_and_a_fixed_budget_stays(live: Live) -> None:
    answerer = live.service.answerer
    before, lowered = answerer.pause_budgeter, live.metric("hyper_pause_budget_lowered_total", by="deadline")
    answerer.pause_budgeter = learned(trace_s=100.0)
    try:
        auto = live.ask(timeout_ms=30_000).json()["pause"]
        assert (auto["budget"], auto["lowered_by"], auto["mode"]) == (0, "deadline", "off")
        assert live.metric("hyper_pause_budget_lowered_total", by="deadline") == lowered + 1
        fixed = live.ask(timeout_ms=30_000, pause=2).json()["pause"]
        assert (fixed["budget"], fixed["lowered_by"], fixed["mode"]) == (2, None, "parallel")
    finally:
        answerer.pause_budgeter = before
    assert live.ask().json()["pause"]["budget"] == 3


def test_an_answer_that_missed_its_deadline_is_remembered_as_long() -> None:
    pace = PauseBudgeter()
    pace.record_late(2.0, [])
    assert pace.budget(3, left_s=2.0, **NO_QUEUE) == Budget(0, "deadline")
    pace = learned(trace_s=5.0)
    # An answer cut after a second adds nothing: a complete one takes at least as long.
    pace.record_late(1.0, [])
    assert pace.trace_s == 5.0
    for _ in range(100):
        pace.record_late(9.0, [1.0])
    assert pace.trace_s == pytest.approx(8.0, abs=0.01)


def test_deadlines_that_pass_lower_the_next_budget(slow: Live) -> None:
    answerer, before = slow.service.answerer, slow.service.answerer.pause_budgeter
    answerer.pause_budgeter = PauseBudgeter()
    try:
        assert slow.ask(timeout_ms=700).status_code == 504
        # Shorter than the deadline by the time of upload and decoding, which depends on the machine.
        trace_s = answerer.pause_budgeter.trace_s
        assert trace_s is not None
        assert answerer.auto_budget(trace_s) == Budget(0, "deadline")
    finally:
        answerer.pause_budgeter = before


def test_a_full_engine_lowers_auto_and_uploads_do_not() -> None:
    service: Service = create_app(scripted(max_in_flight=20, max_num_seqs=16)).state.service
    assert isinstance(service.engine, ScriptedEngine)
    service.admission.num_in_flight = 19
    service.limiter.num_working = 15
    assert service.answerer.auto_budget(60.0) == Budget(3)
    service.limiter.num_working = 17
    assert service.answerer.auto_budget(60.0) == Budget(1, "load")
    service.pool.shutdown()
