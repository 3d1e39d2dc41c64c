"""What every engine promises, asked of each of them: the scripted one, and vLLM on a tiny random checkpoint."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import aclosing

import numpy as np
import pytest

from hyper_model.audio import SAMPLE_RATE_HZ
from hyper_model.trace import build_prompt
from server.engine import Engine, GenerationRequest, TokenChunk
from tests.conftest import VllmHost
from tests.serving import Live

NUMBERS = itertools.count()


@pytest.fixture(params=["scripted", "vllm"])
def host(request: pytest.FixtureRequest, live: Live, vllm_host: VllmHost) -> Iterator[Live]:
    """A running service whose engine is under test."""
    service = live if request.param == "scripted" else vllm_host.live()
    yield service
    service.wait_until_idle()


@pytest.fixture
def engine(host: Live) -> Engine:
    return host.service.engine


def clip(duration_s: float = 1.0, hertz: float = 300.0) -> np.ndarray:
    times_S = np.arange(int(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    return (0.3 * np.sin(2 * np.pi * hertz * times_S)).astype(np.float32)


def ask(host: Live, max_tokens: int = 24, duration_s: float = 1.0, **fields: object) -> GenerationRequest:
    """Makes a request of its own id."""
    prompt = build_prompt(host.service.checkpoint.tokenizer, "What is heard?", ("one", "two"))
    request = GenerationRequest(f"contract-{next(NUMBERS)}", prompt, (clip(duration_s),), max_tokens, cache_salt="test")
    return dataclasses.replace(request, **fields)  # pyright: ignore


def collect(host: Live, request: GenerationRequest) -> list[TokenChunk]:
    """Reads a completion to its end."""

    async def read() -> list[TokenChunk]:
        async with aclosing(host.service.engine.generate(request)) as chunks:
            return [chunk async for chunk in chunks]

    return host.run(read())


def tokens(chunks: list[TokenChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def score(host: Live, request: GenerationRequest, candidates: list[list[int]]) -> list[float]:
    return host.run(host.service.engine.score(request, candidates))


def test_a_completion_ends_at_its_limit(host: Live) -> None:
    for max_tokens in (1, 7, 24):
        chunks = collect(host, ask(host, max_tokens))
        assert len(tokens(chunks)) == max_tokens
        assert [chunk.finish_reason for chunk in chunks][-1] == "length"
        assert all(chunk.finish_reason is None for chunk in chunks[:-1])


def test_a_completion_ends_with_its_stop_token(host: Live) -> None:
    written = tokens(collect(host, ask(host)))
    stop = next(token_id for token_id in written if token_id != written[0])
    chunks = collect(host, ask(host, stop_token_ids=(stop,)))
    assert tokens(chunks) == written[: written.index(stop) + 1]
    assert chunks[-1].finish_reason == "stop"


def test_banned_tokens_are_not_written(host: Live) -> None:
    written = tokens(collect(host, ask(host)))
    banned = (written[0], written[3])
    assert not set(banned) & set(tokens(collect(host, ask(host, banned_token_ids=banned))))


def test_temperature_zero_repeats_itself(host: Live) -> None:
    assert tokens(collect(host, ask(host))) == tokens(collect(host, ask(host, seed=5)))


def test_a_seed_repeats_itself(host: Live) -> None:
    first, second = (tokens(collect(host, ask(host, temperature=1.0, seed=11))) for _ in range(2))
    assert first == second


def test_a_completion_in_the_prompt_is_continued(host: Live) -> None:
    whole = ask(host)
    written = tokens(collect(host, whole))
    continued = ask(host, 14, prompt_token_ids=[*whole.prompt_token_ids, *written[:10]])
    assert tokens(collect(host, continued)) == written[10:]


def test_the_prompt_is_counted_with_its_audio(host: Live) -> None:
    counts = [
        collect(host, ask(host, 1, duration_s=duration_s))[0].num_prompt_tokens for duration_s in (1.0, 2.0, 10.0)
    ]
    tokens_per_s = host.service.checkpoint.manifest.audio.tokens_per_s
    assert counts[1] - counts[0] == pytest.approx(tokens_per_s, abs=1)
    assert counts[2] - counts[0] == pytest.approx(9 * tokens_per_s, abs=1)
    assert counts[0] - len(ask(host).prompt_token_ids) == pytest.approx(tokens_per_s - 1, abs=1)


def test_the_shortest_and_the_longest_clip_are_heard(host: Live) -> None:
    for duration_s in (0.1, 30.0):
        assert len(tokens(collect(host, ask(host, 3, duration_s=duration_s)))) == 3


def test_the_first_chunk_tells_how_long_it_waited(host: Live) -> None:
    first = collect(host, ask(host))[0]
    assert first.queue_s is not None and first.queue_s >= 0
    assert first.prefill_s is not None and first.prefill_s >= 0


def test_scores_of_single_tokens_are_log_probabilities(host: Live) -> None:
    label_ids = host.service.checkpoint.tokenizer.label_ids(26)
    scores = score(host, ask(host), [[label_id] for label_id in label_ids])
    assert len(scores) == 26 and all(math.isfinite(each) and each <= 0 for each in scores)
    assert sum(map(math.exp, scores)) <= 1.0001
    assert len(set(scores)) > 1
    again = score(host, ask(host), [[label_id] for label_id in reversed(label_ids)])
    assert again[::-1] == pytest.approx(scores, abs=1e-3) or host.service.settings.engine == "scripted"


def test_scores_of_longer_candidates_are_log_probabilities(host: Live) -> None:
    encode = host.service.checkpoint.tokenizer.encode_text
    candidates = [encode("rain"), encode("a dog that barks"), encode("x")]
    scores = score(host, ask(host), candidates)
    assert len(scores) == 3 and all(math.isfinite(each) and each <= 0 for each in scores)
    assert score(host, ask(host), candidates) == pytest.approx(scores, abs=1e-3)


def test_a_closed_completion_is_aborted(host: Live, engine: Engine) -> None:
    async def leave() -> int:
        chunks = engine.generate(ask(host, 500))
        await anext(chunks)
        during = engine.num_in_flight
        await chunks.aclose()
        return during

    assert host.run(leave()) == 1
    assert engine.num_in_flight == 0 and engine.is_alive


def test_a_cancelled_reader_aborts_the_completion(host: Live, engine: Engine) -> None:
    async def leave() -> None:
        async def read() -> None:
            async with aclosing(engine.generate(ask(host, 500))) as chunks:
                async for _ in chunks:
                    await asyncio.sleep(0.01)

        task = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    host.run(leave())
    assert engine.num_in_flight == 0 and engine.is_alive


def test_many_at_once_do_not_mix(host: Live, engine: Engine) -> None:
    lengths = [0.5, 1.0, 2.0, 3.0, 4.0, 5.0]
    alone = [tokens(collect(host, ask(host, duration_s=length))) for length in lengths]

    async def read(request: GenerationRequest) -> list[TokenChunk]:
        async with aclosing(engine.generate(request)) as chunks:
            return [chunk async for chunk in chunks]

    async def read_all() -> list[list[TokenChunk]]:
        return await asyncio.gather(*(read(ask(host, duration_s=length)) for length in lengths))

    assert [tokens(chunks) for chunks in host.run(read_all())] == alone
