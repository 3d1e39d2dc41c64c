"""Cause faults in a service started here, and measure their effect on its clients.

The contract for a dead or hanging engine: clients in flight get 503 within a second, /readyz returns 503, and the
service recovers by itself. SIGTERM loses no answer. A leaving client frees its resources.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

from loadtests.client import Outcome, Question, ask, open_session
from loadtests.scenarios import Figure
from loadtests.target import Target
from loadtests.workload import Clips, Mix, plan

REPLY_TIMEOUT_S = 180.0
RECOVERY_TIMEOUT_S = 300.0
ADMISSION_TIMEOUT_S = 30.0
POLL_S = 0.05
ANSWERED_WITHIN_S = 1.0
IDLE_WITHIN_S = 2.0
NUM_IN_FLIGHT = 20
NUM_AT_SIGTERM = 50
NUM_LEAVING = 100
GONE = "engine_unavailable"

Say = Callable[[str], None]
Fault = Callable[[Target, Clips, Mix, int, Say], list[Figure]]


def questions(clips: Clips, mix: Mix, num: int, seed: int) -> list[Question]:
    """Return `num` questions of the mix."""
    return [planned.question for planned in plan(clips, mix, 1.0, 10.0 * num + 100, seed)[:num]]


async def in_flight(
    target: Target, pending_questions: Sequence[Question], act: Callable[[], None]
) -> tuple[list[Outcome], float]:
    """Send all questions at once, and call `act` after the service has admitted them.

    Returns:
        The outcomes, and the time of the call.
    """
    async with open_session(target.url, target.key, REPLY_TIMEOUT_S) as session:
        start_s = time.perf_counter()
        tasks = [asyncio.create_task(ask(session, question, start_s)) for question in pending_questions]
        while time.perf_counter() < start_s + ADMISSION_TIMEOUT_S:
            reading = await asyncio.to_thread(target.read)
            if reading.in_flight >= len(pending_questions) or all(task.done() for task in tasks):
                break
            await asyncio.sleep(POLL_S)
        acted_s = time.perf_counter()
        act()
        return list(await asyncio.gather(*tasks)), acted_s


def watch_readiness(target: Target, since_s: float) -> tuple[float, float]:
    """Return the times of losing and regaining readiness, in seconds after `since_s`."""
    deadline_s = time.perf_counter() + RECOVERY_TIMEOUT_S
    down_s = float("inf")
    while time.perf_counter() < deadline_s:
        if not target.is_ready():
            down_s = min(down_s, time.perf_counter() - since_s)
        elif down_s < float("inf"):
            return down_s, time.perf_counter() - since_s
        time.sleep(POLL_S)
    return down_s, float("inf")


def strike(target: Target, clips: Clips, mix: Mix, seed: int, sent: signal.Signals) -> tuple[list[float], float, float]:
    """Send a signal to the engine while clients wait.

    Returns:
        Per client, the time until its 503, infinity for other outcomes; then the times of losing and regaining
        readiness.
    """
    processes = target.engine_processes()

    async def act() -> tuple[tuple[list[Outcome], float], tuple[float, float]]:
        struck_s: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        def send() -> None:
            for process in processes:
                process.send_signal(sent)
            struck_s.set_result(time.perf_counter())

        clients = asyncio.create_task(in_flight(target, questions(clips, mix, NUM_IN_FLIGHT, seed), send))
        watched = await asyncio.to_thread(watch_readiness, target, await struck_s)
        return await clients, watched

    (outcomes, acted_s), (down_s, up_s) = asyncio.run(act())
    waited_s = [
        outcome.due_s + outcome.e2e_s - acted_s if outcome.error == GONE else float("inf")
        for outcome in outcomes
        # Earlier answers do not count.
        if outcome.due_s + outcome.e2e_s > acted_s
    ]
    return waited_s, down_s, up_s


def engine_is_killed(target: Target, clips: Clips, mix: Mix, seed: int, say: Say) -> list[Figure]:
    """Kill the engine's processes with 20 requests in flight."""
    if not target.engine_processes():
        say("engine_is_killed: the engine has no process of its own here (HYPER_ENGINE=vllm has)")
        return []
    waited_s, down_s, up_s = strike(target, clips, mix, seed, signal.SIGKILL)
    num = len(waited_s)
    within = sum(wait_s <= ANSWERED_WITHIN_S for wait_s in waited_s)
    return [
        Figure("engine_kill_clients_answered", within / num if num else 0.0, num),
        Figure("engine_kill_not_ready_s", round(down_s, 3), 1),
        Figure("engine_recovery_s", round(up_s, 2), 1),
    ]


def engine_hangs(target: Target, clips: Clips, mix: Mix, seed: int, say: Say) -> list[Figure]:
    """Stop the engine's processes with 20 requests in flight, so that they hang without exiting."""
    processes = target.engine_processes()
    if not processes:
        say("engine_hangs: the engine has no process of its own here (HYPER_ENGINE=vllm has)")
        return []
    try:
        waited_s, down_s, up_s = strike(target, clips, mix, seed + 1, signal.SIGSTOP)
    finally:
        for process in processes:
            if process.is_running() and process.status() == psutil.STATUS_STOPPED:
                process.send_signal(signal.SIGCONT)
    return [
        Figure("hung_engine_detected_s", round(min([down_s, *waited_s]), 2), len(waited_s)),
        Figure("hung_engine_recovery_s", round(up_s, 2), 1),
    ]


def clients_leave(target: Target, clips: Clips, mix: Mix, seed: int, say: Say) -> list[Figure]:
    """Let 100 clients leave at different times, and count the held places 2 s after the last one."""
    leaving = [
        dataclasses.replace(question, cancel_after_s=2.0 * number / NUM_LEAVING)
        for number, question in enumerate(questions(clips, mix, NUM_LEAVING, seed + 2))
    ]

    async def act() -> None:
        async with open_session(target.url, target.key, REPLY_TIMEOUT_S) as session:
            start_s = time.perf_counter()
            await asyncio.gather(*(ask(session, question, start_s) for question in leaving))

    asyncio.run(act())
    return [Figure("held_by_clients_that_left", target.when_idle(IDLE_WITHIN_S).in_flight, len(leaving))]


def sigterm(target: Target, clips: Clips, mix: Mix, seed: int, say: Say) -> list[Figure]:
    """Send SIGTERM to the service with 50 requests in flight. This fault must be the last one."""
    process = target.process
    if process is None:
        say("sigterm: only a service that was started here is ended")
        return []
    pending_questions = questions(clips, mix, NUM_AT_SIGTERM, seed + 3)
    outcomes, acted_s = asyncio.run(in_flight(target, pending_questions, process.terminate))
    code = process.wait(REPLY_TIMEOUT_S)
    waiting = [outcome for outcome in outcomes if outcome.due_s + outcome.e2e_s > acted_s]
    return [
        Figure("sigterm_lost", sum(outcome.error is not None for outcome in outcomes), len(waiting)),
        Figure("sigterm_exit_code", code, 1),
    ]


FAULTS: Mapping[str, Fault] = {each.__name__: each for each in (clients_leave, engine_is_killed, engine_hangs, sigterm)}
