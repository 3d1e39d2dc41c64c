"""The service's own figures, `hyper_*`, in seconds and tokens, with labels from closed sets.

They live in a registry of their own; the scrape adds the process-wide one, where vLLM keeps its `vllm:*` figures.
Nothing here may be named `vllm:*`: vLLM unregisters every collector of that name when it starts.
"""

from __future__ import annotations

import importlib.metadata

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 4, 6, 10, 15, 30, 60, 120, 300)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 4000)
COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
BYTES = tuple(1024 * 4**power for power in range(9))


class Metrics:
    """Holds every `hyper_*` collector of one application."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"hyper_{name}", text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"hyper_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"hyper_{name}", text, registry=registry)

        self.request_seconds = histogram(
            "request_seconds", "First byte in to last byte out, upload included", SECONDS, "endpoint", "outcome"
        )
        self.stage_seconds = histogram("stage_seconds", "Time of one stage of a request", SECONDS, "stage")
        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "First byte in to the first token of the trace", SECONDS
        )
        self.time_to_first_answer_token = histogram(
            "time_to_first_answer_token_seconds", "First byte in to the first token of the answer", SECONDS
        )
        self.audio_duration = histogram("audio_duration_seconds", "Length of the clips", SECONDS)
        self.audio_bytes = histogram("audio_bytes", "Size of the clips as uploaded", BYTES)
        self.audio_processed = counter("audio_processed_seconds", "Audio answered about")
        self.audio_codec = counter("audio_codec", "Clips by codec", "codec")
        self.audio_silence_ratio = histogram("audio_silence_ratio", "Share of a clip that is silent", SHARES)
        self.section_seconds = histogram("section_seconds", "Time a section took to write", SECONDS, "section")
        self.section_tokens = histogram("section_tokens", "Tokens of a section", TOKENS, "section")
        self.traces = counter("traces", "Traces by how they ended", "format", "termination")
        self.answer_confidence = histogram("answer_confidence", "Probability of the chosen option", SHARES)
        self.answer_empty = counter("answer_empty", "Replies without a word of answer")
        self.completion_tokens = counter("completion_tokens", "Visible tokens written")
        self.pauses = counter("pauses", "Pauses taken", "section")
        self.pause_tokens = counter("pause_tokens", "Latent tokens spent in pauses")
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
        self.connections_dropped = counter("connections_dropped", "Connections closed because there were too many")
        self.auth_failures = counter("auth_failures", "Requests without a key that opens the address", "reason")
        self.waiting = gauge("queue_depth", "Requests that wait for a place in the engine")
        self.queue_wait = histogram("queue_wait_seconds", "Time a request waited for its place", SECONDS)
        self.in_flight = gauge("in_flight", "Admitted requests")
        self.decoding = gauge("decode_in_flight", "Clips being decoded or waiting for a decoder")
        self.ready = gauge("ready", "1 while the service takes requests")
        self.draining = gauge("draining", "1 while the service shuts down")
        self.engine_up = gauge("engine_up", "1 while the engine answers")
        self.engine_restarts = counter("engine_restarts", "Times that the engine was started again", "reason")
        self.canary_seconds = gauge("canary_seconds", "Time of the canary question at the engine's last start")
        self.canary_ok = gauge("canary_ok", "1 once the engine has answered its canary question")
        self.suspected_clips = gauge("suspected_clips", "Clips that were in the engine when it failed")
        self.poisoned_clips = gauge("poisoned_clips", "Clips that are refused since the engine failed on them twice")
        self.event_loop_lag = histogram("event_loop_lag_seconds", "How late the event loop wakes", SECONDS)
        self.decoder_deaths = counter("decoder_deaths", "Decoders that ended without a word")
        self.decode_peak = gauge("decode_peak_bytes", "The most memory that decoding a clip has taken")
        self.sandbox = Info("hyper_decode_sandbox", "What keeps the decoder in", registry=registry)
        self.build = Info("hyper_build", "What is running", registry=registry)

    def render(self) -> bytes:
        """Returns the exposition text: ours, then the process's and the engine's."""
        return generate_latest(self.registry) + generate_latest(REGISTRY)


def version() -> str:
    """Returns the installed version, or "0+source" when run from a checkout."""
    try:
        return importlib.metadata.version("hyper-audio")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"
