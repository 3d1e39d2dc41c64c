"""The contract of every engine, tested with the scripted one and with vLLM on a tiny random checkpoint."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import aclosing

import numpy as np
import pytest

from hyper_model.audio import SAMPLE_RATE_HZ, decode
from hyper_model.pause import GateSettings
from hyper_model.trace import build_prompt
from server.engines.protocol import Engine, GenerationRequest, TokenChunk
from server.engines.vllm import VllmEngine
from tests.conftest import VllmHost
from tests.paths import CLIPS
from tests.serving import Live

NUMBERS = itertools.count()
CLIP = CLIPS / "one-voice.mp3"


@pytest.fixture(params=["scripted", "vllm"])
def host(request: pytest.FixtureRequest, live: Live, vllm_host: VllmHost) -> Iterator[Live]:
    """Running service over the engine under test."""
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
    """Return a request with its own id."""
    prompt = build_prompt(host.service.checkpoint.tokenizer, "What is heard?", ("one", "two"))
    request = GenerationRequest(f"contract-{next(NUMBERS)}", prompt, (clip(duration_s),), max_tokens, cache_salt="test")
    return dataclasses.replace(request, **fields)  # pyright: ignore


def collect(host: Live, request: GenerationRequest) -> list[TokenChunk]:
    """Read a completion to its end."""

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


def logprobs_of(chunks: list[TokenChunk]) -> list[float]:
    return [logprob for chunk in chunks for logprob in chunk.logprobs]


def test_log_probabilities_are_those_of_the_written_tokens(host: Live) -> None:
    request = ask(host)
    plain, chunks = collect(host, request), collect(host, ask(host, wants_logprobs=True))
    written, found = tokens(chunks), logprobs_of(chunks)
    assert written == tokens(plain) and logprobs_of(plain) == []
    assert len(found) == len(written) and all(math.isfinite(each) and each <= 0 for each in found)
    if host.service.settings.engine == "scripted":
        return
    for place in (0, 5, 20):
        prompt = [*request.prompt_token_ids, *written[:place]]
        (expected,) = score(host, ask(host, prompt_token_ids=prompt), [[written[place]]])
        assert found[place] == pytest.approx(expected, abs=1e-3)


def test_log_probabilities_are_those_before_temperature_and_bans(host: Live) -> None:
    first = tokens(collect(host, ask(host, 1)))
    fields = {"temperature": 0.7, "seed": 3, "banned_token_ids": (*first,), "wants_logprobs": True}
    chunks = collect(host, ask(host, 1, **fields))
    if host.service.settings.engine == "vllm":
        assert logprobs_of(chunks) == pytest.approx(score(host, ask(host), [tokens(chunks)]), abs=1e-3)


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


@pytest.fixture(params=["scripted", "vllm"])
def pausing(request: pytest.FixtureRequest, live: Live) -> Iterator[Live]:
    """Running service over an engine with a pause in the clip of `ask_pausing`."""
    service = live if request.param == "scripted" else request.getfixturevalue("pausing_host").live()
    yield service
    service.wait_until_idle()


@pytest.fixture
def pausing_vllm(pausing_host: VllmHost) -> Iterator[Live]:
    """The same over vLLM alone, for properties of a real engine: a key-value cache and metrics of its own."""
    service = pausing_host.live()
    yield service
    service.wait_until_idle()


def gate_of(host: Live) -> GateSettings:
    assert host.service.answerer.gate is not None
    return host.service.answerer.gate


def ask_pausing(host: Live, max_tokens: int = 400, **fields: object) -> GenerationRequest:
    """Return a request about silence, with a scripted pause, or about a voice, with a pause by the real gate."""
    is_scripted = host.service.settings.engine == "scripted"
    samples_S = np.zeros(SAMPLE_RATE_HZ, np.float32) if is_scripted else decode(CLIP.read_bytes()).samples_S
    prompt = build_prompt(host.service.checkpoint.tokenizer, "What is heard?")
    stop = host.service.checkpoint.tokenizer.stop_ids
    fields = {"gate": gate_of(host), "stop_token_ids": stop, "cache_salt": "test", **fields}
    return GenerationRequest(f"pausing-{next(NUMBERS)}", prompt, (samples_S,), max_tokens, **fields)  # pyright: ignore


def spans(chunks: list[TokenChunk]) -> list[tuple[int, ...]]:
    return [chunk.span for chunk in chunks if chunk.span]


def test_a_pause_is_a_span_of_its_own_and_never_among_the_visible_tokens(pausing: Live) -> None:
    gate = gate_of(pausing)
    chunks = collect(pausing, ask_pausing(pausing))
    assert 1 <= len(spans(chunks)) <= gate.max_pauses
    assert set(spans(chunks)) == {(gate.open_id,) * gate.latent_tokens}
    assert not {gate.open_id, gate.close_id} & set(tokens(chunks))
    assert all(not chunk.token_ids and chunk.finish_reason is None for chunk in chunks if chunk.span)
    assert [chunk.report for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    report = chunks[-1].report
    assert report is not None and report.lowest is not None and 0 < report.lowest <= 1
    assert len(report.confidences) == len(spans(chunks)) and all(0 < each <= 1 for each in report.confidences if each)
    assert chunks[-1].finish_reason == "stop" and tokens(chunks)[-1] in pausing.service.checkpoint.tokenizer.stop_ids


def test_log_probabilities_leave_pauses_out_and_change_nothing(pausing: Live) -> None:
    plain = collect(pausing, ask_pausing(pausing))
    chunks = collect(pausing, ask_pausing(pausing, wants_logprobs=True))
    assert tokens(chunks) == tokens(plain) and spans(chunks) == spans(plain) != []
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
    assert all(math.isfinite(each) and each <= 0 for each in logprobs_of(chunks))
    assert chunks[-1].report is not None and plain[-1].report is not None
    assert chunks[-1].report.confidences == pytest.approx(plain[-1].report.confidences, abs=1e-4)


def test_a_budget_is_kept(pausing: Live) -> None:
    wanted = len(spans(collect(pausing, ask_pausing(pausing))))
    for budget in range(1, wanted + 1):
        assert len(spans(collect(pausing, ask_pausing(pausing, gate=gate_of(pausing).with_budget(budget))))) == budget


def test_pauses_do_not_count_against_max_tokens(pausing: Live) -> None:
    whole = collect(pausing, ask_pausing(pausing))
    for max_tokens in (1, 12, 40, len(tokens(whole))):
        chunks = collect(pausing, ask_pausing(pausing, max_tokens))
        assert tokens(chunks) == tokens(whole)[:max_tokens]
        assert chunks[-1].finish_reason == ("stop" if max_tokens == len(tokens(whole)) else "length")


def test_without_a_gate_nothing_pauses(pausing: Live) -> None:
    gate = gate_of(pausing)
    banned = (gate.open_id, gate.close_id)
    chunks = collect(pausing, ask_pausing(pausing, gate=None, banned_token_ids=banned))
    assert not spans(chunks) and not set(banned) & set(tokens(chunks))


def test_a_gate_without_a_budget_takes_no_pause_and_still_gives_up(pausing: Live) -> None:
    gate = gate_of(pausing).with_budget(0)
    chunks = collect(pausing, ask_pausing(pausing, gate=gate))
    assert not spans(chunks) and chunks[-1].finish_reason == "stop" and chunks[-1].report is not None
    strict = dataclasses.replace(gate, tau_abort=1.0)
    assert collect(pausing, ask_pausing(pausing, gate=strict))[-1].finish_reason == "abort"


def test_where_the_cache_cannot_hold_a_session_a_pause_is_written_token_by_token(
    pausing_vllm: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pausing_vllm.service.engine
    assert isinstance(engine, VllmEngine)
    fed = collect(pausing_vllm, ask_pausing(pausing_vllm))
    assert engine.cache_tokens > 10_000 and engine.session_tokens == 0
    monkeypatch.setattr(engine, "cache_tokens", 100)
    inline = collect(pausing_vllm, ask_pausing(pausing_vllm))
    assert (tokens(inline), spans(inline)) == (tokens(fed), spans(fed))
    first, last = inline[-1].report, fed[-1].report
    assert first is not None and last is not None
    assert first.confidences == pytest.approx(last.confidences, abs=1e-4)


def test_vllm_counts_the_time_of_a_pausing_request_from_its_arrival(pausing_vllm: Live) -> None:
    name = "vllm:time_to_first_token_seconds_sum"

    def total_s() -> float:
        lines = pausing_vllm.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before, started_s = total_s(), time.monotonic()
    num_chunks = 1 + len(spans(collect(pausing_vllm, ask_pausing(pausing_vllm))))
    took_s = time.monotonic() - started_s
    # vLLM counts a step after its output, so the last reply may arrive before its count.
    while (counted_s := total_s() - before) == 0 and time.monotonic() - started_s < took_s + 10:
        time.sleep(0.05)
    assert 0 < counted_s <= num_chunks * took_s


def test_a_seed_repeats_itself_with_its_pauses(pausing: Live) -> None:
    first, second = (collect(pausing, ask_pausing(pausing, temperature=0.8, seed=3)) for _ in range(2))
    assert tokens(first) == tokens(second) and spans(first) == spans(second)


def test_a_completion_that_is_closed_at_a_pause_is_aborted(pausing: Live) -> None:
    async def leave() -> None:
        async with aclosing(pausing.service.engine.generate(ask_pausing(pausing))) as chunks:
            async for chunk in chunks:
                if chunk.span:
                    return

    pausing.run(leave())
    assert pausing.service.engine.num_in_flight == 0 and pausing.service.engine.is_alive
    assert spans(collect(pausing, ask_pausing(pausing)))


def test_pausing_completions_do_not_depend_on_their_neighbours(pausing: Live) -> None:
    alone = collect(pausing, ask_pausing(pausing))
    plain = collect(pausing, ask_pausing(pausing, gate=None))

    async def read(request: GenerationRequest) -> list[TokenChunk]:
        async with aclosing(pausing.service.engine.generate(request)) as chunks:
            return [chunk async for chunk in chunks]

    async def read_all() -> list[list[TokenChunk]]:
        gates = [gate_of(pausing), None] * 4
        return await asyncio.gather(*(read(ask_pausing(pausing, gate=gate)) for gate in gates))

    for chunks, expected in zip(pausing.run(read_all()), [alone, plain] * 4, strict=True):
        assert tokens(chunks) == tokens(expected) and spans(chunks) == spans(expected)
