"""Requests generated from the service's OpenAPI document: replies match it, with keys and without."""

from __future__ import annotations

from pathlib import Path

import httpx

from loadtests.fuzz_http import Findings, brief, generate, probe_without_key, words_of
from server import api_keys as keys
from tests.serving import Live, running, scripted

SEED = 20261125
# `make stress` sends thousands; these numbers are affordable for every change.
NUM_OPEN, NUM_WITH_KEY, NUM_WITHOUT = 300, 120, 80


def silent(num: int) -> None:
    """Print nothing."""


def check(found: Findings, num: int) -> None:
    print(f"\n{found.num} requests: {dict(found.statuses)}", end=" ")
    assert not found.num_wrong, "\n".join(found.wrong)
    assert found.num_ours == 0 and found.num >= num


def test_replies_are_as_described_without_keys() -> None:
    with running(scripted(default_max_tokens=8, max_audio_s=5.0)) as service:
        found = generate(service.url, None, NUM_OPEN, SEED, silent)
        check(found, NUM_OPEN)
        # Otherwise hardly a request would have passed authentication.
        assert found.statuses[200] > NUM_OPEN / 10 and found.statuses[400] > NUM_OPEN / 10
        service.wait_until_idle()


def test_replies_are_as_described_with_a_key_and_refused_without(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, name="stranger", scopes=("ask", "metrics"))
    with running(scripted(default_max_tokens=8, max_audio_s=5.0, key_file=path)) as service:
        found = generate(service.url, key, NUM_WITH_KEY, SEED, silent)
        check(found, NUM_WITH_KEY)
        assert found.statuses[200] > NUM_WITH_KEY / 10
        refused = generate(service.url, key, NUM_WITHOUT, SEED, silent, is_withheld=True)
        check(refused, NUM_WITHOUT)
        assert refused.statuses[401] > NUM_WITHOUT / 2


def test_an_open_service_is_reached_by_whoever_knocks(live: Live) -> None:
    """The count of unauthenticated requests detects an open service."""
    found = probe_without_key(live.url, "hyp_nobody", silent)
    # Three addresses need a key and answer GET; each is requested in many forms.
    assert found.num > 1000 and found.statuses[200] > 60 and found.num_ours >= found.statuses[200]


def test_a_description_that_is_wrong_is_found_out(live: Live) -> None:
    """The generator's check works: a reply outside the description fails it."""
    document = httpx.get(f"{live.url}/openapi.json").json()
    responses = document["paths"]["/v1/audio/qa"]["post"]["responses"]
    del responses["400"]
    document["components"]["schemas"]["QaReply"]["required"].append("nothing")
    found = generate(live.url, None, 40, SEED, silent, document=document)
    reasons = " ".join(found.wrong)
    assert "UndefinedStatusCode" in reasons and "JsonSchemaError" in reasons


def test_words_are_found_however_deep() -> None:
    """Values, but not names: an error names an unknown field."""
    assert list(words_of({"a": ["b", {"c": 1}], "d": "e"})) == ["b", "e"]
    assert brief({"a": ["x" * 500]})["a"][0].endswith("...")
