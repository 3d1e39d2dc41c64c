"""A thousand broken clips and a hundred traps, through the whole service: each is refused or answered."""

from __future__ import annotations

import collections
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from loadtests import hostile
from tests.serving import QUESTION, Live, running, scripted, wav

NUM_MUTANTS = 1000
SEED = 20261125
ALLOWED = {200, 400, 413, 415, 422}
# Most take 20 ms; the rest is tolerance for a busy machine.
PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def service() -> Iterator[Live]:
    with running(scripted(decode_workers=2, decode_timeout_s=5.0, max_audio_s=60.0)) as live:
        yield live


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return hostile.clips(tmp_path_factory.mktemp("clips"))


def ask(client: httpx.Client, clip: bytes) -> tuple[httpx.Response, float]:
    started_s = time.monotonic()
    data = {"question": QUESTION, "max_tokens": "1", "reasoning": "answer"}
    reply = client.post("/v1/audio/qa", data=data, files={"file": ("clip", clip)})
    return reply, time.monotonic() - started_s


def test_every_listed_format_is_answered(service: Live, good: dict[str, bytes]) -> None:
    for name, clip in good.items():
        reply, _ = ask(service.client, clip)
        assert reply.status_code == 200, (name, reply.text)


def test_a_thousand_broken_clips_are_refused_or_answered(service: Live, good: dict[str, bytes]) -> None:
    wrong: list[str] = []
    statuses: collections.Counter[int] = collections.Counter()
    with httpx.Client(base_url=service.url, timeout=60) as client, ThreadPoolExecutor(4) as threads:

        def work(mutant: tuple[str, bytes]) -> None:
            name, clip = mutant
            reply, seconds = ask(client, clip)
            statuses[reply.status_code] += 1
            if reply.status_code not in ALLOWED or seconds > PATIENCE_S:
                wrong.append(f"{name}: {reply.status_code} after {seconds:.1f} s: {reply.text[:200]}")

        list(threads.map(work, hostile.mutants(good, NUM_MUTANTS, SEED)))
    print(
        f"\nseed {SEED}: {dict(statuses)}, decoder deaths {service.metric('hyper_decoder_deaths_total'):.0f}, ", end=""
    )
    print(f"hostile_audio_5xx {sum(count for status, count in statuses.items() if status >= 500)}")
    assert not wrong, wrong[:5]
    assert sum(statuses.values()) == NUM_MUTANTS
    # Otherwise the mutants would test nothing.
    assert statuses[200] > 50 and statuses[400] > 300, statuses
    assert service.metric("hyper_decoder_deaths_total") <= NUM_MUTANTS / 100
    service.wait_until_idle()


def test_traps_fetch_nothing_and_read_nothing(service: Live, good: dict[str, bytes], tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(good["wav"])
    secret.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        tcp.setblocking(False)
        udp.setblocking(False)
        read_before_ns = secret.stat().st_atime_ns
        traps = hostile.traps(port, secret)
        assert len(traps) > 100
        all_seconds: list[float] = []
        for name, clip in traps:
            reply, seconds = ask(service.client, clip)
            assert reply.status_code in (400, 415) and seconds < PATIENCE_S, (name, reply.status_code, seconds)
            all_seconds.append(seconds)
            assert str(port) not in reply.text.replace(reply.headers["x-request-id"], "") and "secret" not in reply.text
        print(f"\n{len(traps)} traps, median {1000 * statistics.median(all_seconds):.0f} ms, ", end="")
        print(f"slowest {1000 * max(all_seconds):.0f} ms; decoder_outbound 0, foreign_reads 0 are asserted next")
        for listener in (tcp.accept, lambda: udp.recv(1)):
            with pytest.raises(BlockingIOError):
                listener()
        assert secret.stat().st_atime_ns == read_before_ns


def test_clips_that_take_all_decoders_do_not_stop_probes_and_small_requests(service: Live) -> None:
    """Liveness probes get a reply while every decoder is busy."""
    long = wav(np.zeros(55 * 16_000, np.float32))
    threads = [
        threading.Thread(
            target=lambda: httpx.post(
                f"{service.url}/v1/audio/qa", data={"question": QUESTION}, files={"file": ("c", long)}, timeout=60
            )
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert service.client.get("/livez").status_code == 200
