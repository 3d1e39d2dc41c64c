"""Several questions about one new clip at once, through real vLLM, with and without pauses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import VllmHost
from tests.serving import wav

NUM_CLIPS, NUM_QUESTIONS = 3, 6


@pytest.mark.timeout(600)
def test_questions_about_a_new_clip_at_once_are_all_answered_with_their_gates_report(pausing_host: VllmHost) -> None:
    live = pausing_host.live()

    def ask(clip: bytes, number: int) -> dict[str, Any]:
        fields = {"question": f"What is said? ({number})", "pause": "off" if number % 2 else "3"}
        response = httpx.post(f"{live.url}/v1/audio/qa", data=fields, files={"file": clip}, timeout=300)
        assert response.status_code == 200, response.text
        return response.json()

    with ThreadPoolExecutor(NUM_QUESTIONS) as pool:
        for seed in range(NUM_CLIPS):
            clip = wav(np.random.default_rng(seed).standard_normal(32_000).astype(np.float32) * 0.1)
            replies = list(pool.map(ask, [clip] * NUM_QUESTIONS, range(NUM_QUESTIONS)))
            paused = [reply["pause"] for reply in replies if reply["pause"]["count"]]
            assert paused
            assert all(pause["lowest_group_confidence"] is not None for pause in paused)
