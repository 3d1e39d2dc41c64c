"""The service's metrics `hyper_*`, in seconds and tokens, with labels from closed sets.

docs/watching.md lists every metric with its meaning; a test compares the two. The metrics have their own registry. A
scrape also includes the process-wide registry with vLLM's `vllm:*` metrics. No name here may start with `vllm:`,
because vLLM unregisters all such collectors at its start.
"""

from __future__ import annotations

import importlib.metadata
from typing import get_args

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from hyper_model.trace import REQUIRED_SECTIONS
from server.api_keys import Priority
from server.telemetry.labels import STAGES, AbortedBy, FormFailure, Phase, WorkerFailure

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
        registry = self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"hyper_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"hyper_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"hyper_{name}", text, labels, registry=registry)

        self.request_seconds = histogram(
            "request_seconds", "First byte in to last byte out, upload included", SECONDS, "endpoint", "outcome"
        )
        self.requests = counter(
            "requests", "Requests by address and status; 499 for clients that left", "endpoint", "code"
        )
        self.stage_seconds = histogram("stage_seconds", "Time of one stage of a request", SHORT_SECONDS, "stage")
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "First byte in to the first token of the trace", SECONDS
        )
        self.time_to_first_section = histogram(
            "time_to_first_section_seconds", "First byte in to the first section of the trace", SECONDS
        )
        self.time_to_first_answer_token = histogram(
            "time_to_first_answer_token_seconds", "First byte in to the first token of the answer", SECONDS
        )
        self.audio_duration = histogram("audio_duration_seconds", "Length of the clips", SECONDS)
        self.audio_bytes = histogram("audio_bytes", "Size of the clips as uploaded", BYTES)
        self.audio_processed = counter("audio_processed_seconds", "Audio answered about")
        self.key_audio = counter(
            "key_audio_processed_seconds", "The same by key, where HYPER_METRICS_BY_KEY is set", "key"
        )
        self.audio_rtf = histogram("audio_rtf", "Time of a whole answer over the length of its clip", FACTORS)
        self.audio_cache_hits = counter("audio_cache_hits", "Clips most of which the engine had in its cache")
        self.audio_cache_misses = counter("audio_cache_misses", "Clips that the engine had to hear anew")
        self.audio_codec = counter("audio_codec", "Clips by codec", "codec")
        self.audio_silence_ratio = histogram("audio_silence_ratio", "Share of a clip that is silent", SHARES)
        self.section_seconds = histogram("section_seconds", "Time a section took to write", SECONDS, "section")
        self.section_tokens = histogram("section_tokens", "Tokens of a section", TOKENS, "section")
        self.sections_missing = counter("sections_missing", "Traces without a section that they should have", "section")
        self.parse_failures = counter("parse_failures", "Traces that did not keep to the form, by how", "kind")
        self.reflections = counter("reflections", "Traces that reflect, by whether the answer changed", "changed")
        self.traces = counter("traces", "Traces by how they ended", "format", "termination")
        self.answer_confidence = histogram("answer_confidence", "Probability of the chosen option", SHARES)
        self.answer_empty = counter("answer_empty", "Replies without a word of answer")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, audio included")
        self.audio_tokens = counter("audio_tokens", "Those of them that are audio")
        self.cached_tokens = counter("cached_tokens", "Those of them that the engine had in its cache")
        self.completion_tokens = counter("completion_tokens", "Visible tokens written")
        self.pauses = counter("pauses", "Pauses taken", "section")
        self.pause_tokens = counter("pause_tokens", "Latent tokens spent in pauses")
        self.pause_tokens_per_answer = histogram(
            "pause_tokens_per_answer", "Latent tokens of an answer that had a budget", (0, *TOKENS), "mode"
        )
        self.pause_seconds = histogram(
            "pause_seconds", "From the pause token to the first token behind the span", SECONDS
        )
        self.pause_confidence = histogram("pause_confidence", "Confidence of the window that paused", SHARES)
        self.pauses_per_answer = histogram("pauses_per_answer", "Pauses of an answer that had a budget", COUNTS)
        self.lowest_confidence = histogram("lowest_group_confidence", "Lowest window of an answer with a gate", SHARES)
        self.pause_budget_lowered = counter("pause_budget_lowered", "Requests whose auto budget was cut", "by")
        self.pause_budget_spent = counter("pause_budget_spent", "Requests that used every pause they had")
        self.rejected = counter("rejected", "Requests that ended in an error, by status and reason", "code", "reason")
        self.aborted = counter("aborted", "Requests that ended early", "phase", "by")
        self.stream_errors = counter("stream_errors", "Streams that ended in an error event, behind a 200", "reason")
        self.connections_dropped = counter("connections_dropped", "Connections closed because there were too many")
        self.auth_failures = counter("auth_failures", "Requests without a key that opens the address", "reason")
        self.waiting = gauge("queue_depth", "Requests that wait for a place in the engine", "class")
        self.oldest_wait = gauge("queue_oldest_seconds", "How long the first of them has waited", "class")
        self.queue_wait = histogram("queue_wait_seconds", "Time a request waited for its place", SECONDS, "class")
        self.in_flight = gauge("in_flight", "Admitted requests")
        self.batch_in_flight = gauge("batch_in_flight", "Those of them of the class batch")
        self.max_in_flight = gauge("max_in_flight", "How many requests are admitted at most")
        self.engine_in_flight = gauge("engine_in_flight", "Requests with a place in the engine")
        self.decoding = gauge("decode_in_flight", "Clips being decoded or waiting for a decoder")
        self.decoders_busy = gauge("decode_pool_busy", "Clips being decoded")
        self.decoders_queued = gauge("decode_pool_queued", "Clips that wait for a decoder")
        self.decoders = gauge("decode_pool_size", "How many clips are decoded at the same time at most")
        self.ready = gauge("ready", "1 while the service takes requests")
        self.draining = gauge("draining", "1 while the service shuts down")
        self.engine_up = gauge("engine_up", "1 while the engine answers")
        self.engine_restarts = counter("engine_restarts", "Times that the engine was started again", "reason")
        self.canary_seconds = gauge("canary_seconds", "Time of the canary question at the engine's last start")
        self.canary_ok = gauge("canary_ok", "1 once the engine has answered its canary question")
        self.suspected_clips = gauge("suspected_clips", "Clips that were in the engine when it failed")
        self.poisoned_clips = gauge("poisoned_clips", "Clips that are refused since the engine failed on them twice")
        self.event_loop_lag = histogram("event_loop_lag_seconds", "How late the event loop wakes", SECONDS)
        self.decoder_deaths = counter("decoder_deaths", "Decoders that ended without a word", "reason")
        self.decode_peak = gauge("decode_peak_bytes", "The most memory that decoding a clip has taken")
        self.sandbox = Info("hyper_decode_sandbox", "What keeps the decoder in", registry=registry)
        self.build = Info("hyper_build", "What is running", registry=registry)
        self.show_zeros()

    def show_zeros(self) -> None:
        """Initialise metrics with few labels to 0: otherwise a rate would miss the first event."""
        labelled: tuple[tuple[MetricWrapperBase, tuple[str, ...]], ...] = (
            (self.stage_seconds, STAGES),
            *((each, get_args(Priority)) for each in (self.waiting, self.oldest_wait, self.queue_wait)),
            (self.sections_missing, tuple(section.value for section in REQUIRED_SECTIONS)),
            (self.parse_failures, get_args(FormFailure)),
            (self.reflections, ("false", "true")),
            (self.decoder_deaths, get_args(WorkerFailure)),
            (self.auth_failures, ("no_key", "wrong_key", "wrong_scope")),
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
