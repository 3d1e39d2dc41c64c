"""Gauges of queues, decoders and quarantined clips, updated at intervals."""

from __future__ import annotations

from server.decoding.pool import DecoderPool
from server.engines.supervisor import Quarantine
from server.limiter import RANKS, PriorityLimiter
from server.telemetry.metrics import Metrics


def record_gauges(
    metrics: Metrics,
    limiter: PriorityLimiter,
    decode_limiter: PriorityLimiter,
    decoder_pool: DecoderPool,
    quarantine: Quarantine,
) -> None:
    """Set the gauges to the current state of the service."""
    for priority in RANKS:
        waits_s = limiter.waits_s(priority)
        metrics.waiting.labels(priority).set(len(waits_s))
        metrics.oldest_wait.labels(priority).set(max(waits_s, default=0.0))
    metrics.engine_in_flight.set(limiter.num_working)
    metrics.decoders_busy.set(decode_limiter.num_working)
    metrics.decoders_queued.set(decode_limiter.num_waiting)
    metrics.decode_peak.set(decoder_pool.peak_bytes)
    metrics.suspected_clips.set(len(quarantine.suspects))
    metrics.poisoned_clips.set(len(quarantine.banned))
