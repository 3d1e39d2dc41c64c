"""Interactive load test with a web page: `locust -f loadtests/locustfile.py --host http://127.0.0.1:8000`.

Users send the plan of `loadtests.workload`: unchanged and cut clips, whole replies and streams, follow-up questions,
and cancellations. A user waits for its reply before its next request, so a slow service is offered less load. For
behaviour beyond the peak, use `python -m loadtests run overload`.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import gevent
from locust import HttpUser, constant_throughput, events, task
from locust.env import Environment
from locust.exception import StopUser

from loadtests.client import FIRST_TOKEN_EVENTS, QA_PATH, EventReader, Question, error_code
from loadtests.workload import Clips, Mix, plan

NUM_PLANNED = 500
"""Approximate number of planned questions; users cycle through them."""

REPLY_TIMEOUT_S = 120.0


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """Add the options of the page and command line, besides users and rate."""
    parser.add_argument("--clips", default="tests/assets/clips", help="Folder of audio files to ask about.")
    parser.add_argument("--key", default="", env_var="HYPER_KEY", help="An API key.")  # pyright: ignore[reportCallIssue]
    parser.add_argument("--share-stream", type=float, default=0.5, help="Share of replies that come as events.")
    parser.add_argument("--share-leave", type=float, default=0.05, help="Share of clients that leave early.")
    parser.add_argument("--share-follow-up", type=float, default=0.3, help="Share of questions about a recent clip.")
    parser.add_argument("--max-tokens", type=int, default=48, help="Tokens of a trace at most.")
    parser.add_argument("--questions-per-s", type=float, default=1.0, help="What one user asks at most, a second.")
    parser.add_argument("--questions", type=int, default=0, help="End when so many were asked.  [default: no end]")
    parser.add_argument("--seed", type=int, default=20261125, help="What is asked follows from it.")


@events.test_start.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Plan the questions before the measurement."""
    options = environment.parsed_options
    assert options is not None
    mix = Mix(
        stream=options.share_stream,
        cancel=options.share_leave,
        follow_up=options.share_follow_up,
        fields={"max_tokens": str(options.max_tokens), "pause": "off"},
    )
    planned = plan(Clips(Path(options.clips)), mix, 1.0, float(NUM_PLANNED), options.seed)
    cycled = itertools.cycle([request.question for request in planned])
    Listener.questions = itertools.islice(cycled, options.questions or None)
    Listener.wait_time = constant_throughput(options.questions_per_s)
    Listener.key_header = {"authorization": f"Bearer {options.key}"} if options.key else {}


class Listener(HttpUser):
    """A user with one question after another."""

    host = "http://127.0.0.1:8000"
    questions: Iterator[Question]
    key_header: dict[str, str]

    @task
    def ask(self) -> None:
        """Send the next question; read the whole reply, or cancel at the planned time."""
        question = next(self.questions, None)
        if question is None:
            # Quit in a separate greenlet: `quit` waits for users, so this user would wait for itself.
            assert self.environment.runner is not None
            gevent.spawn(self.environment.runner.quit)
            raise StopUser
        kind = "stream" if question.is_stream else "whole"
        started_s = time.perf_counter()
        with (
            contextlib.suppress(gevent.Timeout),
            gevent.Timeout(question.cancel_after_s),
            self.client.post(
                QA_PATH,
                data=question.body,
                headers={**question.headers, **self.key_header},
                name=f"{QA_PATH} {kind}",
                stream=True,
                timeout=REPLY_TIMEOUT_S,
                catch_response=True,
            ) as response,
        ):
            meta = cast("dict[str, Any]", response.request_meta)
            if response.status_code != 200:
                code = error_code(response.content, f"http_{response.status_code}")
                meta["name"] = f"{QA_PATH} {code}"
                response.failure(code)
            elif not question.is_stream:
                meta["response_length"] = len(response.content)
            # Read bytes as they arrive; a fixed chunk size would wait for more of them.
            elif error := self.read(response.iter_content(chunk_size=None), started_s):
                response.failure(error)
            meta["response_time"] = 1000 * (time.perf_counter() - started_s)

    def read(self, chunks: Iterable[bytes], started_s: float) -> str | None:
        """Read a stream, record the time of its first token, and return the reason for a failure, or None."""
        reader = EventReader()
        is_first = True
        for chunk in chunks:
            for name, data in reader.feed(chunk):
                if is_first and name in FIRST_TOKEN_EVENTS:
                    is_first = False
                    self.note("first token", started_s)
                if name == "error":
                    return error_code(data, "error_event")
                if name == "done":
                    return None
        return "no done event"

    def note(self, name: str, started_s: float) -> None:
        """Add a separate line to the statistics."""
        milliseconds = 1000 * (time.perf_counter() - started_s)
        self.environment.events.request.fire(
            request_type="SSE", name=name, response_time=milliseconds, response_length=0, exception=None, context={}
        )
