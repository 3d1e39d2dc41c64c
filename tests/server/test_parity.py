"""The service's tokens and scores equal those of a plain loop over transformers' model.

Twenty clips, greedy, in float32, on the embedded checkpoint with a gate of three pauses per trace. The loop shares only
the prompt and the gate with the service. Padded features, encoder, attention and cache are transformers' own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from hyper_model.answering import AnswerResult, Question, softmax
from hyper_model.audio import SAMPLE_RATE_HZ, Waveform, decode
from hyper_model.checkpoint import Checkpoint, open_checkpoint
from hyper_model.pause import Gate, GateSettings
from hyper_model.positions import give_positions
from hyper_model.trace import Section, build_prompt
from hyper_model.trace_parser import TraceParser
from server.answering import AnswerRun, discard
from server.request_context import RequestContext
from tests.conftest import PAUSING, VllmHost
from tests.paths import CLIPS

TRUTH: list[dict[str, Any]] = json.loads((CLIPS / "truth.json").read_text(encoding="utf-8"))
MAX_TOKENS = 300


def clips() -> list[tuple[Waveform, str, tuple[str, ...]]]:
    """Twenty clips with a question: each of the ten whole, with its choices, and the first 60 % of each, without."""
    whole = [(decode((CLIPS / row["file"]).read_bytes()), row["question"], tuple(row["choices"])) for row in TRUTH]
    return whole + [(clip.slice(0, 0.6 * clip.duration_s), question, ()) for clip, question, _ in whole]


class PlainLoop:
    """Greedy decoding with transformers alone, one token per step and one span per chunk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(
            checkpoint.path, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.extractor = WhisperFeatureExtractor.from_pretrained(checkpoint.path)
        settings = GateSettings.of(checkpoint.manifest, checkpoint.tokenizer)
        assert settings is not None
        self.settings = settings

    def embeds(self, waveform: Waveform, token_ids: list[int]) -> torch.Tensor:
        """Return the embeddings of a prompt, with the clip's states at its placeholder: [1, T, H]."""
        model, audio_id = self.model, self.checkpoint.tokenizer.audio_id
        features = self.extractor(
            waveform.samples_S,
            sampling_rate=SAMPLE_RATE_HZ,
            padding="max_length",
            return_attention_mask=True,
            return_tensors="pt",
        )
        frames = int(features["attention_mask"].sum())
        num_states = (frames - 1) // 2 + 1
        num_audio = (num_states - 2) // 2 + 1
        mask = torch.zeros(1, 1, 1500, 1500)
        mask[..., num_states:] = float("-inf")
        tower, projector = model.model.audio_tower, model.model.multi_modal_projector
        states = tower(features["input_features"], attention_mask=mask).last_hidden_state
        audio = projector(states)[:, :num_audio]
        at = token_ids.index(audio_id)
        embed = model.get_input_embeddings()
        before, after = torch.tensor([token_ids[:at]]), torch.tensor([token_ids[at + 1 :]])
        return torch.cat([embed(before), audio, embed(after)], dim=1)

    def logits(self, embeds: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Return the logits after each of the tokens, [T, V], and extend the cache by them."""
        decoder = self.model.model.language_model
        start = cache.get_seq_length()
        positions = torch.arange(start, start + embeds.shape[1])[None]
        hidden = decoder(inputs_embeds=embeds, past_key_values=cache, position_ids=positions, use_cache=True)
        return self.model.lm_head(hidden.last_hidden_state)[0]

    def embed(self, token_ids: list[int]) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor([token_ids]))

    @torch.inference_mode()
    def write(self, waveform: Waveform, prompt: list[int], stop: set[int]) -> list[int]:
        """Return a completion with its spans, the stop token included."""
        gate, cache, written = Gate(self.settings), DynamicCache(), list[int]()
        row = self.logits(self.embeds(waveform, prompt), cache)[-1]
        for _ in range(MAX_TOKENS):
            confidence = float(row.softmax(-1).max())
            decision = gate.decide(confidence)
            allowed = row.clone()
            allowed[list(decision.banned_ids)] = -torch.inf
            token_id = int(allowed.argmax()) if decision.forced_id is None else decision.forced_id
            if token_id in stop:
                return [*written, token_id]
            gate.push(token_id, confidence)
            span = list(gate.feed_span()) if token_id == self.settings.open_id else [token_id]
            written += span
            row = self.logits(self.embed(span), cache)[-1]
        return written

    @torch.inference_mode()
    def score(self, waveform: Waveform, prompt: list[int], candidates: list[list[int]]) -> list[float]:
        """Return the log-probability of each candidate after a prompt."""
        totals: list[float] = []
        for candidate in candidates:
            cache = DynamicCache()
            embeds = torch.cat([self.embeds(waveform, prompt), self.embed(candidate)], dim=1)
            logprobs = self.logits(embeds, cache)[-len(candidate) - 1 : -1].log_softmax(-1)
            totals.append(float(logprobs[range(len(candidate)), candidate].sum()))
        return totals


@pytest.fixture(scope="module")
def positioned_host(pausing_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmHost]:
    """Host of the engine on the same checkpoint with one token per position of a pause."""
    directory = tmp_path_factory.mktemp("positions") / "hyper-mini"
    give_positions(pausing_checkpoint, directory)
    host = VllmHost(directory)
    yield host
    host.close()


@pytest.fixture(scope="module", params=["pausing_host", "positioned_host"], ids=["copies", "positions"])
def host(request: pytest.FixtureRequest) -> VllmHost:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def loop(host: VllmHost) -> PlainLoop:
    return PlainLoop(open_checkpoint(host.checkpoint, verify=False))


def ask(host: VllmHost, waveform: Waveform, prompt: list[int], choices: tuple[str, ...]) -> AnswerResult:
    """Ask through the running service's own driver; HTTP adds nothing to tokens and scores."""
    live = host.live()
    answerer = live.service.answerer
    question = Question(tuple(prompt), choices, max_tokens=MAX_TOKENS, gate=answerer.gate)
    return live.run(
        AnswerRun(answerer, RequestContext("parity", is_body_complete=True), question, waveform).run(discard)
    )


def test_twenty_clips_get_the_tokens_and_the_scores_of_a_plain_loop(host: VllmHost, loop: PlainLoop) -> None:
    tokenizer = loop.checkpoint.tokenizer
    opens_answer, closes_answer = tokenizer.tag_ids[Section.FINAL_ANSWER]
    num_pauses, worst = list[int](), 0.0
    for waveform, question, choices in clips():
        prompt = build_prompt(tokenizer, question, choices)
        result = ask(host, waveform, prompt, choices)
        stop = {*tokenizer.stop_ids, opens_answer if choices else closes_answer}
        written = loop.write(waveform, prompt, stop)
        if written[-1] in tokenizer.stop_ids:
            del written[-1]  # It ends a turn and is not part of the trace.
        assert [*result.token_ids[: len(written)]] == written, question
        num_pauses.append(result.num_pauses)
        assert result.num_pause_tokens == result.num_pauses * PAUSING["latent_tokens"]
        assert "PAUSE" not in result.parsed.raw
        latent = [each for each in result.token_ids if each in tokenizer.latent_ids]
        assert latent == [*loop.settings.span_ids] * result.num_pauses
        if choices:
            parser = TraceParser(tokenizer, latent_tokens=PAUSING["latent_tokens"])
            for token_id in written:
                parser.feed(token_id)
            prefix = [*prompt, *written, *parser.ids_to_final_answer()]
            logprobs = loop.score(waveform, prefix, tokenizer.choice_ids(choices, by_letter=False))
            confidence = loop.checkpoint.manifest.confidence
            assert confidence is not None and confidence.choices is not None
            scores = softmax(logprobs, confidence.choices.temperature)
            worst = max(worst, float(np.abs(np.subtract(scores, result.scores)).max()))
    print(f"20 clips, {sum(num_pauses)} pauses; scores differ by at most {worst:.1e}")
    assert worst <= 1e-3
    assert min(num_pauses) >= 1 and sum(num_pauses) >= 40
