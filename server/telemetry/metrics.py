"""The service's metrics `hyper_*`, in seconds and tokens, with labels from closed sets.

docs/watching.md lists every metric with its meaning; a test compares the two. The metrics have their own registry. A
scrape also includes the process-wide registry with vLLM's `vllm:*` metrics. No name here may start with `vllm:`,
because vLLM unregisters all such collectors at its start.
"""

from __future__ import annotations

import importlib.metadata
from typing import get_args

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase

from hyper_model.trace import REQUIRED_SECTIONS
from server.telemetry.labels import STAGES, AbortedBy, FormFailure, JobStatus, Phase, Priority, WorkerFailure

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 4, 6, 10, 15, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 4000)
COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
BYTES = tuple(1024 * 4**power for power in range(9))
FACTORS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 25)
SHORT_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, *SECONDS)


class Metrics:
    """All `hyper_*` collectors of one application."""

    def __init__(self) -> None:
        # No panel or alert uses the `_created` series. The switch is process-wide and covers vLLM's metrics too.
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._define_request_metrics()
        self._define_audio_metrics()
        self._define_file_metrics()
        self._define_trace_metrics()
        self._define_pause_metrics()
        self._define_engine_metrics()
        self._define_job_metrics()
        self.show_zeros()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"hyper_{name}", text, labels, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"hyper_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"hyper_{name}", text, labels, registry=self.registry)

    def _define_request_metrics(self) -> None:
        """Define the metrics of requests and their stages, errors and API keys."""
        self.request_seconds = self._histogram(
            "request_seconds",
            "Request duration from first byte received to last byte sent, upload included",
            SECONDS,
            "endpoint",
            "outcome",
        )
        self.requests = self._counter(
            "requests", "Requests by endpoint and status; 499 means that the client disconnected", "endpoint", "code"
        )
        self.stage_seconds = self._histogram(
            "stage_seconds", "Duration of one stage of a request", SHORT_SECONDS, "stage"
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "Time from the first byte of a request to the first token of its trace",
            SECONDS,
        )
        self.time_to_first_section = self._histogram(
            "time_to_first_section_seconds",
            "Time from the first byte of a request to the first section of its trace",
            SECONDS,
        )
        self.time_to_first_answer_token = self._histogram(
            "time_to_first_answer_token_seconds",
            "Time from the first byte of a request to the first token of its answer",
            SECONDS,
        )
        self.rejected = self._counter(
            "rejected", "Requests that ended in an error, by status and reason", "code", "reason"
        )
        self.aborted = self._counter("aborted", "Requests that ended early, by phase and by cause", "phase", "by")
        self.stream_errors = self._counter(
            "stream_errors", "Streams with status 200 that ended in an error event", "reason"
        )
        self.connections_dropped = self._counter(
            "connections_dropped", "Connections closed because the connection limit was reached"
        )
        self.auth_failures = self._counter(
            "auth_failures", "Requests refused for a missing, wrong or insufficient API key", "reason"
        )

    def _define_audio_metrics(self) -> None:
        """Define the metrics of clips and of the decoder."""
        self.audio_duration = self._histogram("audio_duration_seconds", "Duration of uploaded clips", SECONDS)
        self.audio_bytes = self._histogram("audio_bytes", "Size of uploaded clips", BYTES)
        self.audio_processed = self._counter("audio_processed_seconds", "Seconds of audio in answered questions")
        self.key_audio = self._counter(
            "key_audio_processed_seconds",
            "Seconds of audio in answered questions by API key, with HYPER_METRICS_BY_KEY",
            "key",
        )
        self.audio_rtf = self._histogram(
            "audio_rtf", "Real-time factor: time of a whole answer divided by the duration of its clip", FACTORS
        )
        self.audio_cache_hits = self._counter(
            "audio_cache_hits", "Clips with most of their tokens in the engine's cache"
        )
        self.audio_cache_misses = self._counter("audio_cache_misses", "Clips that the engine had to encode")
        self.audio_codec = self._counter("audio_codec", "Uploaded clips by codec", "codec")
        self.audio_silence_ratio = self._histogram("audio_silence_ratio", "Share of silence in a clip", SHARES)
        self.recording_windows = self._counter(
            "recording_windows", "Windows of recordings by outcome, stored perceptions included", "status"
        )
        self.decoding = self._gauge("decode_in_flight", "Clips that are decoded or wait for a decoder")
        self.decoders_busy = self._gauge("decode_pool_busy", "Clips that are decoded now")
        self.decoders_queued = self._gauge("decode_pool_queued", "Clips that wait for a decoder")
        self.decoders = self._gauge(
            "decode_pool_size", "Limit of clips decoded at the same time (HYPER_DECODE_WORKERS)"
        )
        self.decoder_deaths = self._counter(
            "decoder_deaths", "Decoder processes that ended without a result, by reason", "reason"
        )
        self.decode_peak = self._gauge("decode_peak_bytes", "Largest memory use of a decoder process")
        self.sandbox = Info("hyper_decode_sandbox", "Active sandbox layers of the decoder", registry=self.registry)

    def _define_file_metrics(self) -> None:
        """Define the metrics of stored files, updated once per minute."""
        self.stored_files = self._gauge("stored_files", "Stored files of all keys")
        self.stored_bytes = self._gauge("stored_bytes", "Bytes of all stored files")
        self.expired_files = self._counter("expired_files", "Stored files removed after their expiry")

    def _define_trace_metrics(self) -> None:
        """Define the metrics of traces, answers and tokens."""
        self.section_seconds = self._histogram(
            "section_seconds", "Time to generate one section of a trace", SECONDS, "section"
        )
        self.section_tokens = self._histogram("section_tokens", "Tokens of one section of a trace", TOKENS, "section")
        self.sections_missing = self._counter(
            "sections_missing", "Traces without a required section, by section", "section"
        )
        self.parse_failures = self._counter("parse_failures", "Traces with a wrong format, by kind of failure", "kind")
        self.reflections = self._counter(
            "reflections", "Traces with a REFLECT section, by whether the answer changed", "changed"
        )
        self.traces = self._counter("traces", "Traces by format and termination", "format", "termination")
        self.answer_confidence = self._histogram("answer_confidence", "Probability of the answer, if known", SHARES)
        self.answer_empty = self._counter("answer_empty", "Replies with an empty answer")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, audio included")
        self.audio_tokens = self._counter("audio_tokens", "Prompt tokens that encode audio")
        self.cached_tokens = self._counter("cached_tokens", "Prompt tokens found in the engine's cache")
        self.completion_tokens = self._counter("completion_tokens", "Visible tokens generated")
        self.draft_tokens = self._counter(
            "draft_tokens", "Drafted tokens checked by the engine, by outcome (accepted, rejected)", "outcome"
        )

    def _define_pause_metrics(self) -> None:
        """Define the metrics of pauses."""
        self.pauses = self._counter("pauses", "Pauses by section of the trace", "section")
        self.pause_tokens = self._counter("pause_tokens", "Latent tokens generated in pauses")
        self.pause_tokens_per_answer = self._histogram(
            "pause_tokens_per_answer", "Latent tokens per answer, for answers with a pause budget", (0, *TOKENS), "mode"
        )
        self.pause_seconds = self._histogram(
            "pause_seconds", "Time from the pause token to the first token after the latent tokens", SECONDS
        )
        self.pause_confidence = self._histogram(
            "pause_confidence", "Mean confidence of the token window that triggered a pause", SHARES
        )
        self.pauses_per_answer = self._histogram(
            "pauses_per_answer", "Pauses per answer, for answers with a pause budget", COUNTS
        )
        self.lowest_confidence = self._histogram(
            "lowest_group_confidence", "Lowest window confidence of an answer, for answers with a gate", SHARES
        )
        self.pause_budget_lowered = self._counter(
            "pause_budget_lowered", "Requests with a reduced pause=auto budget, by reason", "by"
        )
        self.pause_budget_spent = self._counter("pause_budget_spent", "Requests that used their whole pause budget")

    def _define_engine_metrics(self) -> None:
        """Define the metrics of admission, queue, engine and process."""
        self.waiting = self._gauge("queue_depth", "Requests that wait for a slot in the engine", "class")
        self.oldest_wait = self._gauge(
            "queue_oldest_seconds", "Waiting time of the oldest request in the engine queue", "class"
        )
        self.queue_wait = self._histogram(
            "queue_wait_seconds", "Time that a request waited for a slot in the engine", SECONDS, "class"
        )
        self.expected_wait = self._gauge(
            "expected_wait_seconds", "Expected wait for the engine of a request that arrives now"
        )
        self.in_flight = self._gauge("in_flight", "Admitted requests in progress")
        self.batch_in_flight = self._gauge("batch_in_flight", "Admitted requests of class batch in progress")
        self.max_in_flight = self._gauge("max_in_flight", "Limit of admitted requests (HYPER_MAX_IN_FLIGHT)")
        self.engine_in_flight = self._gauge("engine_in_flight", "Requests with a slot in the engine")
        self.quota_store_down = self._gauge(
            "quota_store_down", "1 while the quota store does not answer and this replica takes its share of each limit"
        )
        self.quota_store_errors = self._counter("quota_store_errors", "Failed commands to the quota store")
        self.quota_replicas = self._gauge(
            "quota_replicas", "Replicas that share the quota store; 0 without a quota store"
        )
        self.ready = self._gauge("ready", "1 while the service accepts questions")
        self.draining = self._gauge("draining", "1 while the service shuts down")
        self.engine_up = self._gauge("engine_up", "1 while the engine runs")
        self.engine_restarts = self._counter("engine_restarts", "Restarts of the engine by reason", "reason")
        self.canary_seconds = self._gauge("canary_seconds", "Duration of the test question at the engine's last start")
        self.canary_ok = self._gauge("canary_ok", "1 after the engine has answered its test question")
        self.suspected_clips = self._gauge("suspected_clips", "Clips that were in the engine when it failed")
        self.poisoned_clips = self._gauge(
            "poisoned_clips", "Clips that are refused because the engine failed twice on them"
        )
        self.event_loop_lag = self._histogram(
            "event_loop_lag_seconds", "Delay of the event loop behind its timer", SECONDS
        )
        self.build = Info(
            "hyper_build", "Version, checkpoint and engine of the running service", registry=self.registry
        )

    def _define_job_metrics(self) -> None:
        """Define the metrics of jobs and webhooks."""
        self.jobs = self._gauge("jobs", "Stored jobs by status, the same in every process with one database", "status")
        self.job_age = self._gauge("job_age_seconds", "Age of the oldest job that has not ended")
        self.job_steps = self._counter("job_steps", "Finished steps of jobs, by outcome", "outcome")
        self.jobs_ended = self._counter("jobs_ended", "Jobs that this process has ended, by status", "status")
        self.jobs_runner = self._gauge("jobs_runner", "1 while this process runs jobs under this id", "runner")
        self.jobs_database_up = self._gauge("jobs_database_up", "0 while the database of jobs is not available")
        self.jobs_database_up.set(1)
        self.webhook_attempts = self._counter(
            "webhook_attempts", "Attempts to deliver a webhook; abandoned is the last one without success", "outcome"
        )

    def show_zeros(self) -> None:
        """Initialise metrics with few labels to 0: otherwise a rate would miss the first event."""
        labelled: tuple[tuple[MetricWrapperBase, tuple[str, ...]], ...] = (
            (self.stage_seconds, STAGES),
            *((collector, get_args(Priority)) for collector in (self.waiting, self.oldest_wait, self.queue_wait)),
            (self.sections_missing, tuple(section.value for section in REQUIRED_SECTIONS)),
            (self.parse_failures, get_args(FormFailure)),
            (self.reflections, ("false", "true")),
            (self.draft_tokens, ("accepted", "rejected")),
            (self.decoder_deaths, get_args(WorkerFailure)),
            (self.auth_failures, ("no_key", "wrong_key", "wrong_scope")),
            *((collector, get_args(JobStatus)) for collector in (self.jobs, self.jobs_ended)),
            (self.job_steps, ("done", "failed")),
            (self.webhook_attempts, ("delivered", "retried", "abandoned")),
        )
        for metric, values in labelled:
            for value in values:
                metric.labels(value)
        for phase in get_args(Phase):
            for by in get_args(AbortedBy):
                self.aborted.labels(phase, by)

    def render(self) -> bytes:
        """Return the exposition text: our metrics, then those of the process and the engine."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)


def version() -> str:
    """Return the installed version, or "0+source" in a checkout."""
    try:
        return importlib.metadata.version("hyper-audio")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
