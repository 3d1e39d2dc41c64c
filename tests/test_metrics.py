"""Metrics tell the truth: what clients counted is what the service counted, and labels stay closed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving import Live, running, scripted, tone


@pytest.fixture(scope="module")
def fresh() -> Iterator[Live]:
    """A service that nobody has asked anything, and what three good and three bad requests leave behind."""
    with running(scripted()) as service:
        assert service.ask(tone(2.0)).status_code == 200
        assert service.ask(tone(1.0), choices=["one", "two"]).status_code == 200
        assert service.events(tone(amplitude=0.0))[-1][0] == "done"
        assert service.ask(b"no audio").status_code == 415
        assert service.ask(tone(40.0)).status_code == 422
        assert service.client.get("/secret/path/unlikely-name").status_code == 404
        yield service


def samples(live: Live) -> dict[str, float]:
    """Scrapes; a sample is named with its labels."""
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
        "hyper_stage_seconds_count{stage=receive}": 5,
        "hyper_stage_seconds_count{stage=decode}": 4,
        "hyper_stage_seconds_count{stage=generate}": 3,
        "hyper_stage_seconds_count{stage=score}": 1,
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


def test_the_lag_of_the_event_loop_is_measured(fresh: Live) -> None:
    time.sleep(0.6)
    assert samples(fresh)["hyper_event_loop_lag_seconds_count{}"] > 0
