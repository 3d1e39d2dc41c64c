"""A checkpoint in vLLM's own OpenAI server, without our service, still uses our model class and gate."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hyper_model.checkpoint import open_checkpoint
from hyper_model.engine_environment import prepare_environment
from hyper_model.trace import PauseMode
from hyper_model.trace_parser import ParsedTrace, TraceParser
from tests.conftest import PAUSING
from tests.process import ROOT
from tests.serving import tone
from training.evaluation.runners.http import Endpoint
from training.evaluation.runners.http import ask as evaluation_ask
from training.evaluation.score import judge
from training.evaluation.suites.data_file import data_items

CLIP = ROOT / "tests/assets/clips/one-voice.mp3"
START_TIMEOUT_S = 240


@pytest.fixture(scope="module")
def url(pausing_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    prepare_environment()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(pausing_checkpoint)]
    command += ["--served-model-name", "hyper", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--dtype", "float32", "--generation-config", "vllm", "--max-num-seqs", "4"]
    command += ["--logits-processors", "hyper_model.pause_vllm:PauseV1"]
    log = tmp_path_factory.mktemp("plain") / "log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not is_healthy(address):
            assert process.poll() is None and time.monotonic() < deadline_s, log.read_text()[-3000:]
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def ask(url: str, clip: bytes, kind: str = "mp3", **fields: Any) -> httpx.Response:
    audio = {"data": base64.b64encode(clip).decode(), "format": kind}
    content = [
        {"type": "input_audio", "input_audio": audio},
        {"type": "text", "text": "Who married Henry?"},
    ]
    body = {"model": "hyper", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 400}
    return httpx.post(f"{url}/v1/chat/completions", json={**body, **fields}, timeout=120)


def read(checkpoint: Path, token_ids: list[int]) -> ParsedTrace:
    opened = open_checkpoint(checkpoint, verify=False)
    parser = TraceParser(opened.tokenizer, pause_mode=PauseMode.PARALLEL, latent_tokens=PAUSING["latent_tokens"])
    for token_id in token_ids:
        parser.feed(token_id)
    parser.finish()
    return parser.result


def token_ids_of(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def test_a_request_that_asks_for_pauses_gets_them_token_by_token(url: str, pausing_checkpoint: Path) -> None:
    for budget in (1, 3):
        fields = {"vllm_xargs": {"hyper_pause": budget}, "return_token_ids": True}
        trace = read(pausing_checkpoint, token_ids_of(ask(url, CLIP.read_bytes(), **fields)))
        assert [pause.num_latent for pause in trace.pauses] == [PAUSING["latent_tokens"]] * budget


def test_a_request_that_does_not_ask_gets_none(url: str, pausing_checkpoint: Path) -> None:
    trace = read(pausing_checkpoint, token_ids_of(ask(url, CLIP.read_bytes(), return_token_ids=True)))
    assert not trace.pauses and trace.answer_text == "Felix"


def test_arguments_that_make_no_gate_are_a_bad_request(url: str) -> None:
    for value in (-1, "many", 1.5):
        assert ask(url, CLIP.read_bytes(), vllm_xargs={"hyper_pause": value}).status_code == 400
    assert ask(url, CLIP.read_bytes(), vllm_xargs={"hyper_pause_budget": 1}).status_code == 400


@pytest.mark.parametrize("tags", ["shown", "hidden"])
def test_an_evaluation_asks_it_and_reads_traces_or_prose(url: str, tags: str, tmp_path: Path) -> None:
    items, _ = data_items(CLIP.parent / "truth.json", num_items=4)
    endpoint = Endpoint(
        url, "openai", instruction="", timeout_s=200, extra={"skip_special_tokens": False} if tags == "shown" else {}
    )
    replies, model = evaluation_ask(endpoint, items, kept=tmp_path / "replies.jsonl", use_tqdm=False)
    assert model == "hyper"
    judged = [
        judge(item, reply, reads="trace" if tags == "shown" else "answer")
        for item, reply in zip(items, replies, strict=True)
    ]
    assert all(each.ttft_s and each.e2e_s and each.ttft_s < each.e2e_s and not each.error for each in judged)
    if tags == "shown":
        assert all(each.is_strict for each in judged)
        assert sum(each.is_right is True for each in judged) >= 2
        assert sum(each.environment_is_right is True for each in judged) >= 2
    else:
        # Words of all sections run together: the default view of a client of vLLM's own server.
        assert all(not reply.parsed.texts and reply.parsed.raw for reply in replies)
    assert evaluation_ask(endpoint, items, kept=tmp_path / "replies.jsonl", use_tqdm=False)[0] == replies


def test_a_clip_beyond_the_window_is_refused_and_not_cut(url: str) -> None:
    response = ask(url, tone(31.0), "wav")
    assert response.status_code == 400 and "30" in json.dumps(response.json())
    assert ask(url, tone(2.0), "wav").status_code == 200
