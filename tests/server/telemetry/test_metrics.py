"""Metrics match the clients' own counts, and labels stay closed sets."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hyper_model.errors import AudioCode
from server import api_keys as keys
from server.errors import ERRORS
from server.telemetry.labels import StageBeforeEngine, StageInEngine
from tests.serving import Live, running, scripted, tone, wait_for


@pytest.fixture(scope="module")
def fresh() -> Iterator[Live]:
    """Unused service, and its metrics after three good and three bad requests."""
    with running(scripted()) as service:
        assert service.ask(tone(2.0)).status_code == 200
        assert service.ask(tone(1.0), choices=["one", "two"]).status_code == 200
        assert service.events(tone(amplitude=0.0))[-1][0] == "done"
        assert service.ask(b"no audio").status_code == 415
        assert service.ask(tone(40.0)).status_code == 422
        assert service.client.get("/secret/path/unlikely-name").status_code == 404
        yield service


def samples(live: Live) -> dict[str, float]:
    """Scrape the metrics; a sample's name includes its labels."""
    text = live.client.get("/metrics").text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if name != "le")
            if not sample.name.endswith("_bucket"):
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_counts_are_what_the_client_counted(fresh: Live) -> None:
    found = samples(fresh)
    expected = {
        "hyper_request_seconds_count{endpoint=/v1/audio/qa,outcome=ok}": 3,
        "hyper_request_seconds_count{endpoint=/v1/audio/qa,outcome=unsupported_audio}": 1,
        "hyper_request_seconds_count{endpoint=/v1/audio/qa,outcome=audio_too_long}": 1,
        "hyper_rejected_total{code=415,reason=unsupported_audio}": 1,
        "hyper_rejected_total{code=422,reason=audio_too_long}": 1,
        "hyper_rejected_total{code=404,reason=not_found}": 1,
        "hyper_traces_total{format=strict,termination=complete}": 3,
        "hyper_time_to_first_token_seconds_count{}": 3,
        "hyper_time_to_first_answer_token_seconds_count{}": 3,
        "hyper_answer_confidence_count{}": 1,
        "hyper_pauses_total{section=REASONING}": 1,
        "hyper_pause_tokens_total{}": 64,
        "hyper_audio_processed_seconds_total{}": 4.0,
        "hyper_audio_duration_seconds_count{}": 4,
        "hyper_audio_codec_total{codec=pcm_s16le}": 4,
        "hyper_section_seconds_count{section=REASONING}": 3,
        # A request refused in a stage has still spent its time there.
        "hyper_stage_seconds_count{stage=receive}": 5,
        "hyper_stage_seconds_count{stage=validate}": 5,
        "hyper_stage_seconds_count{stage=prompt}": 5,
        "hyper_stage_seconds_count{stage=decode_wait}": 5,
        "hyper_stage_seconds_count{stage=decode}": 5,
        "hyper_stage_seconds_count{stage=inspect}": 4,
        "hyper_stage_seconds_count{stage=queue}": 3,
        "hyper_stage_seconds_count{stage=features}": 3,
        "hyper_stage_seconds_count{stage=engine_queue}": 3,
        "hyper_stage_seconds_count{stage=prefill}": 3,
        "hyper_stage_seconds_count{stage=first_token}": 3,
        "hyper_stage_seconds_count{stage=generate}": 3,
        "hyper_stage_seconds_count{stage=parse}": 3,
        "hyper_stage_seconds_count{stage=score}": 1,
        "hyper_stage_seconds_count{stage=serialize}": 3,
        "hyper_requests_total{code=200,endpoint=/v1/audio/qa}": 3,
        "hyper_requests_total{code=415,endpoint=/v1/audio/qa}": 1,
        "hyper_requests_total{code=422,endpoint=/v1/audio/qa}": 1,
        "hyper_requests_total{code=404,endpoint=other}": 1,
        "hyper_time_to_first_section_seconds_count{}": 3,
        "hyper_audio_rtf_count{}": 3,
        "hyper_audio_cache_hits_total{}": 0,
        "hyper_audio_cache_misses_total{}": 3,
        "hyper_audio_tokens_total{}": 100,
        "hyper_cached_tokens_total{}": 0,
        "hyper_pause_tokens_per_answer_sum{mode=parallel}": 64,
        "hyper_pause_tokens_per_answer_count{mode=parallel}": 3,
        "hyper_parse_failures_total{kind=malformed}": 0,
        "hyper_sections_missing_total{section=ASR}": 0,
        "hyper_reflections_total{changed=true}": 0,
        "hyper_aborted_total{by=client,phase=decode}": 0,
        "hyper_decoder_deaths_total{reason=died}": 0,
        "hyper_engine_restarts_total{reason=hung}": 0,
        "hyper_queue_wait_seconds_count{class=interactive}": 3,
        "hyper_queue_depth{class=batch}": 0,
        "hyper_max_in_flight{}": 24,
        "hyper_decode_pool_size{}": 2,
        "hyper_batch_in_flight{}": 0,
        "hyper_ready{}": 1,
        "hyper_engine_up{}": 1,
        "hyper_draining{}": 0,
        "hyper_in_flight{}": 0,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_labels_never_hold_what_a_client_wrote(fresh: Live) -> None:
    text = fresh.client.get("/metrics").text
    assert "unlikely-name" not in text and "secret" not in text and "no audio" not in text


def test_figures_have_units_and_our_prefix(fresh: Live) -> None:
    text = fresh.service.metrics.render().decode()
    ours = [family for family in text_string_to_metric_families(text) if family.name.startswith("hyper_")]
    assert len(ours) > 25
    assert all(family.documentation for family in ours)
    assert not [family.name for family in ours if family.name.endswith(("_ms", "_millis", "_mb"))]


def test_the_build_is_told(fresh: Live) -> None:
    (name,) = [name for name in samples(fresh) if name.startswith("hyper_build_info")]
    assert "engine=scripted" in name and fresh.service.checkpoint.manifest_sha256 in name
    assert "runner=none" in name and "vllm=none" in name


def test_the_lag_of_the_event_loop_is_measured(fresh: Live) -> None:
    time.sleep(0.6)
    assert samples(fresh)["hyper_event_loop_lag_seconds_count{}"] > 0


def test_the_stages_of_a_request_are_within_its_time(fresh: Live) -> None:
    found = samples(fresh)
    # In a stream, JSON is written during the other stages.
    in_a_row = [stage for stage in (*get_args(StageBeforeEngine), *get_args(StageInEngine)) if stage != "serialize"]
    stages_s = sum(found[f"hyper_stage_seconds_sum{{stage={stage}}}"] for stage in in_a_row)
    requests_s = sum(value for name, value in found.items() if "hyper_request_seconds_sum{endpoint=/v1/audio" in name)
    assert 0 < stages_s < requests_s
    parts = ("features", "engine_queue", "prefill")
    parts_s = sum(found[f"hyper_stage_seconds_sum{{stage={stage}}}"] for stage in parts)
    assert parts_s <= found["hyper_stage_seconds_sum{stage=first_token}"]


def test_reasons_are_from_a_closed_set(fresh: Live) -> None:
    assert len(set(get_args(AudioCode)) | set(ERRORS)) < 60
    reasons = {
        sample.labels["reason"]
        for family in fresh.service.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "hyper_rejected_total"
    }
    assert reasons and reasons <= set(get_args(AudioCode)) | set(ERRORS)


def test_what_waits_and_what_is_cut_short_is_seen() -> None:
    settings = scripted(scripted_token_interval_s=0.05, max_num_seqs=1)
    with running(settings) as service:
        fields = {"timeout_ms": 2500, "stream": "true"}
        threads = [threading.Thread(target=service.ask, kwargs=fields) for _ in range(2)]
        batch = threading.Thread(target=ask_as_batch, args=(service,))
        for thread in threads:
            thread.start()
        wait_for(lambda: service.metric("hyper_queue_depth", **{"class": "interactive"}) == 1)
        batch.start()
        wait_for(lambda: service.metric("hyper_queue_depth", **{"class": "batch"}) == 1)
        assert service.metric("hyper_in_flight") == 3 and service.metric("hyper_batch_in_flight") == 1
        assert service.metric("hyper_engine_in_flight") == 1
        wait_for(lambda: service.metric("hyper_queue_oldest_seconds", **{"class": "interactive"}) > 0)
        for thread in (*threads, batch):
            thread.join()
        assert service.metric("hyper_stream_errors_total", reason="deadline_exceeded") == 2
        assert service.metric("hyper_aborted_total", by="deadline") >= 2
        assert service.metric("hyper_batch_in_flight") == 0
        wait_for(lambda: service.metric("hyper_queue_depth") == 0 == service.metric("hyper_queue_oldest_seconds"))


def ask_as_batch(service: Live) -> None:
    files, headers = {"file": ("clip", tone())}, {"x-hyper-priority": "batch"}
    data = {"question": "What?", "timeout_ms": "2500"}
    service.client.post("/v1/audio/qa", data=data, files=files, headers=headers)


def test_keys_are_counted_by_the_hash_of_their_name_and_only_where_that_is_asked_for(tmp_path: Path) -> None:
    key_file = tmp_path / "keys.json"
    secret = keys.add(key_file, name="anna", scopes=("ask", "metrics"))
    label = hashlib.sha256(b"anna").hexdigest()[:12]
    for is_counted in (False, True):
        with running(scripted(key_file=key_file, metrics_by_key=is_counted)) as service:
            service.client.headers["authorization"] = f"Bearer {secret}"
            assert service.ask(tone(2.0)).status_code == 200
            assert service.metric("hyper_key_audio_processed_seconds_total", key=label) == 2.0 * is_counted
            assert "anna" not in service.client.get("/metrics").text
