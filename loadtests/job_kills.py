"""Stress part of jobs: `kill -9` at random times, and webhooks to a receiver that comes and goes.

One `hyper serve` with the scripted engine and SQLite is killed and started again over one state folder. Every fourth
kill falls into a start. Jobs are sent with an `Idempotency-Key`, and sent again after a lost reply. After each kill,
the table of DBOS names the recorded steps; the log of each later process shows the steps that it has done.
"""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

from loadtests.clips import FreshClips, wav
from loadtests.target import child, environment, free_port, when_up

CLIP_S = 5.0
NUM_CLIPS_IN_RECORDING = 20
NUM_QUESTIONS = 4
NUM_UNFINISHED = 3
"""Jobs in progress at any time; a new one follows each that ends."""

KILLS_PER_START = 4
"""Kills per kill in the middle of a start."""

LATEST_KILL_S = 6.0
"""Latest kill, after the process is ready."""

POLL_S = 0.1
REQUEST_TIMEOUT_S = 60.0
END_TIMEOUT_S = 600.0
ENDED = ("succeeded", "failed", "cancelled", "expired")
SETTINGS = {
    "HYPER_ENGINE": "scripted",
    "HYPER_SCRIPTED_TOKEN_INTERVAL_S": "0.003",
    "HYPER_JOBS_CONCURRENCY": "2",
    "HYPER_WEBHOOK_ALLOWED_HOSTS": "127.0.0.1",
    # It bounds the lease of a key whose request was killed.
    "HYPER_DEFAULT_TIMEOUT_MS": "30000",
    # Attempts until the receiver is back, however long the run takes.
    "HYPER_WEBHOOK_RETRY_DELAYS_S": ",".join(["2"] * 500),
    "HYPER_LOG_LEVEL": "info",
}

Step = tuple[str, int]
"""Id of a job, and the number of one of its steps."""


class Receiver:
    """Receiver of webhooks on 127.0.0.1, active during the block.

    `/hook` replies 204 while `is_back`; else it breaks every second connection and replies 503 to the others. `/gone`
    replies 410.

    Attributes:
        delivered: Number of accepted deliveries by job.
        num_refused: Deliveries that were not accepted.
    """

    def __init__(self) -> None:
        self.is_back = True
        self.delivered: Counter[str] = Counter()
        self.num_refused = 0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if (status := receiver.status_of(self.path, body)) is not None:
                    self.send_response(status)
                    self.send_header("content-length", "0")
                    self.end_headers()
                self.close_connection = True

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> Receiver:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def status_of(self, path: str, body: bytes) -> int | None:
        """Count a delivery and return the status of its reply; None breaks the connection."""
        with self.lock:
            if path == "/gone":
                return 410
            if self.is_back:
                self.delivered[json.loads(body)["data"]["id"]] += 1
                return 204
            self.num_refused += 1
            return 503 if self.num_refused % 2 else None


@dataclass
class Sent:
    """Jobs of a run.

    Attributes:
        ids: Ids by number; the number is in the idempotency key.
        num_steps: Steps of each job, as its first reply named them.
        ended: Last state of the ended jobs.
        hooked: Jobs with a receiver that comes back.
    """

    ids: dict[int, str] = field(default_factory=dict[int, str])
    num_steps: dict[str, int] = field(default_factory=dict[str, int])
    ended: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    hooked: set[str] = field(default_factory=set[str])


@dataclass(frozen=True)
class KillReport:
    """Result of a run.

    Attributes:
        num_lost: Steps without a record or an answer at the end.
        num_twice: Steps that were done again after their record, and jobs that were taken twice.
        num_steps: Steps of all jobs.
        delivered: Share of the webhooks that arrived, of those with a receiver that comes back.
        num_hooked: Their number.
        details: Further counts.
    """

    num_lost: int
    num_twice: int
    num_steps: int
    delivered: float
    num_hooked: int
    details: dict[str, Any]


class JobKills:
    """One state folder with many processes, one after the other.

    Args:
        clips: Folder of good clips.
        log: File for the messages of the services.
        seed: Seed of the times and of the recordings.

    Attributes:
        num_sent: Number of jobs that were sent at least once.
        unknown: Numbers of the jobs without a reply so far.
    """

    def __init__(self, clips: Path, log: Path, seed: int, state: Path, receiver: Receiver) -> None:
        self.random = random.Random(seed)
        self.log = log
        self.state = state
        self.receiver = receiver
        self.sent = Sent()
        fresh = FreshClips(clips, CLIP_S)
        numbers = range(seed, seed + NUM_CLIPS_IN_RECORDING)
        self.recording = wav(np.concatenate([fresh.make(number) for number in numbers]))
        self.clip = wav(fresh.make(seed))
        self.start_s = 0.0
        self.logs: list[Path] = []
        self.recorded: list[set[Step]] = []
        self.num_sent = 0
        self.unknown: set[int] = set()
        self.num_listed = 0

    @contextlib.contextmanager
    def process(self) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """Run a process; yield it with its address, which may not answer yet."""
        port = free_port()
        variables = environment(HYPER_PORT=str(port), HYPER_STATE_DIR=str(self.state), **SETTINGS)
        log = self.state / f"life-{len(self.logs)}.log"
        self.logs.append(log)
        with child([sys.executable, "-m", "hyper_model.cli", "serve"], variables, log) as process:
            yield process, f"http://127.0.0.1:{port}"
        with self.log.open("a") as output:
            output.write(log.read_text())

    @contextlib.contextmanager
    def life(self) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
        """Run a process that takes jobs; yield it with a client."""
        with self.process() as (process, url):
            for path in ("/readyz", "/v1/jobs"):
                when_up(process, url, path, self.log)
            with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
                yield process, client

    def records(self) -> set[Step]:
        """Return the recorded steps, by the number of their record; no process may run."""
        path = self.state / "jobs" / "jobs.sqlite"
        if not path.exists():
            return set()
        with contextlib.closing(sqlite3.connect(path)) as connection:
            query = "SELECT workflow_uuid, function_id FROM operation_outputs WHERE function_name = 'step'"
            try:
                return set(connection.execute(query))
            except sqlite3.OperationalError:
                # Killed before its tables were complete.
                return set()

    def first_life(self) -> None:
        """Measure the time of a start, and create the secret of the webhooks."""
        started_s = time.monotonic()
        with self.life() as (_, client):
            self.start_s = time.monotonic() - started_s
            client.post("/v1/webhooks/secrets").raise_for_status()

    def killed_life(self, number: int) -> None:
        """Let a process work on jobs until it is killed; the receiver is away in every second life."""
        self.receiver.is_back = number % 2 == 0
        if number % KILLS_PER_START == KILLS_PER_START - 1:
            with self.process() as (process, _):
                time.sleep(self.random.uniform(0.0, self.start_s))
                process.kill()
        else:
            with self.life() as (process, client):
                timer = threading.Timer(self.random.uniform(0.0, LATEST_KILL_S), process.kill)
                timer.start()
                with contextlib.suppress(httpx.TransportError):
                    while True:
                        self.feed(client)
                        time.sleep(POLL_S)
                timer.join()
        self.recorded.append(self.records())

    def last_life(self) -> None:
        """Wait for the end of all jobs and webhooks.

        Raises:
            click.ClickException: If the jobs do not end.
        """
        self.receiver.is_back = True
        deadline_s = time.monotonic() + END_TIMEOUT_S
        with self.life() as (_, client):
            while self.unknown or self.unfinished(client):
                self.send_again(client)
                if time.monotonic() > deadline_s:
                    raise click.ClickException(f"jobs did not end within {END_TIMEOUT_S:g} s; see {self.log}")
                time.sleep(POLL_S)
            while self.sent.hooked - set(self.receiver.delivered) and time.monotonic() < deadline_s:
                time.sleep(POLL_S)
            self.num_listed = sum(1 for _ in each_job(client))
        self.recorded.append(self.records())

    def feed(self, client: httpx.Client) -> None:
        """Send a job if too few are in progress, and one again whose reply was lost."""
        if len(self.unfinished(client)) < NUM_UNFINISHED:
            self.num_sent += 1
            self.unknown.add(self.num_sent)
            self.send(client, self.num_sent)
        self.send_again(client)

    def send_again(self, client: httpx.Client) -> None:
        """Send the jobs with a lost reply again; their keys return the same jobs."""
        for number in sorted(self.unknown):
            self.send(client, number)

    def send(self, client: httpx.Client, number: int) -> None:
        """Send job `number`; every third one has a short clip, and every fourth a receiver that is gone."""
        is_hooked = number % 4 != 3
        fields: dict[str, Any] = {
            "questions": [f"What is said? Question {each}." for each in range(NUM_QUESTIONS)],
            "webhook[url]": f"{self.receiver.url}/{'hook' if is_hooked else 'gone'}",
        }
        if number % 3 != 2:
            fields["long_audio"] = "chunk"
        clip = self.recording if number % 3 != 2 else self.clip
        headers = {"idempotency-key": f"job-{number}"}
        reply = client.post("/v1/jobs", data=fields, files={"file": ("clip", clip)}, headers=headers)
        if reply.status_code == 409:
            # The process of the first try was killed in the middle of it.
            return
        reply.raise_for_status()
        job = reply.json()
        self.unknown.discard(number)
        self.sent.ids[number] = job["id"]
        self.sent.num_steps[job["id"]] = job["progress"]["of"]
        if is_hooked:
            self.sent.hooked.add(job["id"])

    def unfinished(self, client: httpx.Client) -> list[str]:
        """Return the jobs that have not ended; a missing one counts as ended."""
        for job_id in set(self.sent.ids.values()) - set(self.sent.ended):
            reply = client.get(f"/v1/jobs/{job_id}")
            if reply.status_code == 404 or reply.json().get("status") in ENDED:
                self.sent.ended[job_id] = reply.json()
        return [job_id for job_id in self.sent.ids.values() if job_id not in self.sent.ended]

    def report(self) -> KillReport:
        """Count lost and repeated steps."""
        final = self.recorded[-1]
        numbers: dict[Step, int] = {}
        for job_id in self.sent.num_steps:
            places = sorted(place for each, place in final if each == job_id)
            numbers |= {(job_id, place): index for index, place in enumerate(places)}
        num_lost = 0
        for job_id, num_steps in self.sent.num_steps.items():
            num_recorded = sum(each == job_id for each, _ in numbers)
            num_lost += max(num_steps - num_recorded, num_unanswered(self.sent.ended.get(job_id, {})))
        again: list[Step] = []
        # The log of a process against the records after the kill before it; the first process has no jobs.
        for log, before in zip(self.logs[2:], self.recorded[:-1], strict=True):
            done = steps_of(log)
            known = {(job_id, numbers[job_id, place]) for job_id, place in before if (job_id, place) in numbers}
            again += [step for step in done if step in known]
        num_done = sum(len(steps_of(log)) for log in self.logs)
        num_delivered = len(self.sent.hooked & set(self.receiver.delivered))
        num_steps = sum(self.sent.num_steps.values())
        return KillReport(
            num_lost=num_lost,
            # A job that was taken twice is in the list, and not among those that were sent.
            num_twice=len(again) + self.num_listed - len(self.sent.ids),
            num_steps=num_steps,
            delivered=num_delivered / max(1, len(self.sent.hooked)),
            num_hooked=len(self.sent.hooked),
            details={
                "jobs": len(self.sent.ids),
                "start_s": round(self.start_s, 2),
                "steps_interrupted_and_repeated": num_done - num_steps,
                "twice": again[:20],
                "webhooks_refused_while_away": self.receiver.num_refused,
                "webhooks_accepted_again": sum(self.receiver.delivered.values()) - num_delivered,
            },
        )


def each_job(client: httpx.Client) -> Iterator[dict[str, Any]]:
    """Yield the caller's jobs, page by page."""
    after: dict[str, str] = {}
    while True:
        page = client.get("/v1/jobs", params={"limit": "100", **after}).json()
        yield from page["data"]
        if not page["has_more"]:
            return
        after = {"after": page["data"][-1]["id"]}


def num_unanswered(job: dict[str, Any]) -> int:
    """Return the number of questions of an ended job without an answer."""
    result = job.get("result") or {}
    return NUM_QUESTIONS - sum(each["error"] is None for each in result.get("data", ()))


def steps_of(log: Path) -> list[Step]:
    """Return the steps that a process has done, from its log."""
    found: list[Step] = []
    for line in log.read_text().splitlines():
        # The last line may be cut by the kill.
        with contextlib.suppress(ValueError):
            fields = json.loads(line)
            if isinstance(fields, dict) and fields.get("message") == "job step":
                found.append((fields["job"], fields["step"]))
    return found


def kill_repeatedly(clips: Path, log: Path, seed: int, num_kills: int, say: Any) -> KillReport:
    """Kill a service with jobs in progress again and again; return its losses."""
    with tempfile.TemporaryDirectory() as folder, Receiver() as receiver:
        run = JobKills(clips, log, seed, Path(folder), receiver)
        run.first_life()
        for number in range(num_kills):
            run.killed_life(number)
            num_ended, num = len(run.sent.ended), len(run.sent.ids)
            say(f"jobs: killed {number + 1} times, {num_ended} of {num} jobs have ended")
        run.last_life()
        return run.report()
