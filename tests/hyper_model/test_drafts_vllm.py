"""With drafts, the gate inside vLLM writes the same tokens and measures the same confidences as without.

A fake model stands for vLLM's: its logits are a function of the tokens before them. The loop has vLLM's order of calls,
with batches that change, pauses fed as sessions or written token by token, and any drafts.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_model import draft_support
from hyper_model.drafts import DraftTable
from hyper_model.pause import Gate, GateReport, GateSettings
from hyper_model.trace import PauseMode, Section, Speaker, Trace, TraceTokenizer, build_prompt, render
from server.engines.scripted import scripted_checkpoint

with warnings.catch_warnings():
    # torch and vLLM raise deprecation warnings at import.
    warnings.simplefilter("ignore")
    from vllm import SamplingParams
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    from hyper_model import pause_vllm
    from hyper_model.drafts_vllm import DraftProposer, verify, with_accepted
    from hyper_model.pause_vllm import PauseV1, arguments

CHECKPOINT = scripted_checkpoint()
TOKENIZER = TraceTokenizer(CHECKPOINT.tokenizer.tokenizer)
VOCAB_SIZE = TOKENIZER.vocab_size
OPENS_ANSWER = TOKENIZER.tag_ids[Section.FINAL_ANSWER][0]
STOP = (*TOKENIZER.stop_ids, OPENS_ANSWER)
PROMPT = build_prompt(TOKENIZER, "Who?", ("a", "b"))
MAX_LEN = 700
SCRIPT = TOKENIZER.encode_trace(
    render(
        Trace(
            planning="who",
            environment="tone",
            speakers=(Speaker("S1", "man", ("no no no", "so")),),
            transcript="no no no. so",
            reasoning="S1 says no no no",
            summary="no no no",
            response="no no no",
            final_answer="no",
        )
    )
)

Drafts = Callable[["Run", list[int]], list[int]]


def gate_settings(**fields: Any) -> GateSettings:
    manifest = CHECKPOINT.manifest
    fields = {"window_tokens": 3, "rest_tokens": 4, "latent_tokens": 5, "loop_tokens": 16, "max_pauses": 3} | fields
    found = GateSettings.of(manifest.model_copy(update={"pause": manifest.pause.model_copy(update=fields)}), TOKENIZER)
    assert found is not None
    return found


def logits_after(written: Sequence[int], seed: int) -> torch.Tensor:
    """Return the fake model's logits: mostly the script's next token, with any confidence."""
    num_visible = sum(token_id not in TOKENIZER.pause_ids for token_id in written)
    rng = random.Random(hash((seed, num_visible, *written[-3:])))
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    logits = torch.randn(VOCAB_SIZE, generator=generator)
    if rng.random() < 0.9:
        logits[SCRIPT[num_visible % len(SCRIPT)]] += rng.choice([3.0, 6.0, 9.0, 12.0])
    if rng.random() < 0.05:
        logits[TOKENIZER.pause_id] += 15.0
    return logits


@dataclass
class Run:
    """One completion: its chunks so far, and its reader's gate as in the service."""

    key: str
    seed: int
    reader: Gate
    temperature: float = 0.0
    done: list[int] = field(default_factory=list[int])
    output: list[int] = field(default_factory=list[int])
    draft: list[int] = field(default_factory=list[int])
    is_over: bool = False

    @property
    def written(self) -> list[int]:
        return [*self.done, *self.output]

    @property
    def stops(self) -> tuple[int, ...]:
        settings = self.reader.settings
        return (*STOP, settings.open_id, settings.close_id) if settings.is_fed else STOP

    def params(self, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            stop_token_ids=list(self.stops),
            extra_args=arguments(self.reader, self.key),
        )


class Loop:
    """vLLM's V1 runner over the fake model, with drafts if given a source of them."""

    def __init__(self, found: GateSettings, drafts: Drafts | DraftProposer | None, max_tokens: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pause_vllm, "checkpoint_settings", lambda _: found)
            config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=8))
            self.gate = PauseV1(config, torch.device("cpu"), is_pin_memory=False)
        self.drafts, self.max_tokens = drafts, max_tokens
        if isinstance(drafts, DraftProposer):
            drafts.gate = self.gate
        self.rows: list[Run] = []
        self.num_steps = 0

    def write(self, runs: Sequence[Run]) -> list[GateReport]:
        """Write all completions, each begun one step after the one before; return the gates' reports."""
        waiting, reports = list(runs), list[GateReport]()
        while waiting or self.rows:
            if waiting:
                self.start([waiting.pop(0)])
            self.step()
        for run in runs:
            report = self.gate.report(run.key)
            assert report is not None
            reports.append(report)
        return reports

    def start(self, runs: Sequence[Run], removed: Sequence[int] = ()) -> None:
        added: list[Any] = []
        for run in runs:
            run.output = []
            self.rows.append(run)
            added.append((len(self.rows) - 1, run.params(self.max_tokens - len(run.done)), None, run.output))
        self.gate.update_state(BatchUpdate(len(self.rows), removed=list(removed), added=added, moved=[]))

    def step(self) -> None:
        self.num_steps += 1
        drafts = [run.draft for run in self.rows]
        rows = [
            logits_after([*run.written, *run.draft[:num]], run.seed)
            for run in self.rows
            for num in range(len(run.draft) + 1)
        ]
        logits = torch.stack(rows)
        if any(drafts):
            chosen, accepted = verify(self.gate, logits, drafts)
            logits = logits[chosen]
        else:
            accepted = [() for _ in self.rows]
        sampled = self.gate.apply(logits.clone()).argmax(-1, keepdim=True)
        output = with_accepted(SamplerOutput(sampled.int(), None), accepted)
        tokens, _ = RejectionSampler.parse_output(output.sampled_token_ids, VOCAB_SIZE)
        for run, token_ids in zip(self.rows, tokens, strict=True):
            run.output += token_ids
            assert not {*token_ids[:-1]} & {*run.stops}, "a stop token ends a step"
        self.propose(tokens)
        self.end_chunks()

    def propose(self, tokens: list[list[int]]) -> None:
        if isinstance(self.drafts, DraftProposer):
            all_ids = np.zeros((len(self.rows), MAX_LEN), np.int32)
            num_tokens = np.zeros(len(self.rows), np.int32)
            for row, run in enumerate(self.rows):
                ids = [*PROMPT, *run.written]
                all_ids[row, : len(ids)], num_tokens[row] = ids, len(ids)
            proposed = self.drafts.propose(tokens, num_tokens, all_ids)
        else:
            proposed = [[] if self.drafts is None else self.drafts(run, run.written) for run in self.rows]
        for run, draft in zip(self.rows, proposed, strict=True):
            # vLLM's scheduler runs no draft beyond the limit.
            run.draft = draft[: max(0, self.max_tokens - len(run.written) - 1)]

    def end_chunks(self) -> None:
        """End the completions at their stop token or limit, and start the next chunk behind a fed pause."""
        ended = {row for row, run in enumerate(self.rows) if run.output[-1] in run.stops}
        ended |= {row for row, run in enumerate(self.rows) if len(run.written) >= self.max_tokens}
        if not ended:
            return
        kept = [run for row, run in enumerate(self.rows) if row not in ended]
        again: list[Run] = []
        for row in sorted(ended):
            run = self.rows[row]
            for token_id in run.output:
                run.reader.push(token_id, None)
            run.draft = []
            if run.output[-1] == TOKENIZER.pause_id and len(run.written) < self.max_tokens:
                run.done = [*run.written[:-1], *run.reader.feed_span()]
                again.append(run)
            else:
                run.is_over = True
        # A batch never keeps a hole, so all rows are written anew; their lists of tokens stay.
        removed = list(range(len(self.rows)))
        self.rows = kept
        added: list[Any] = [
            (row, self.gate.rows[old].params, None, run.output)
            for row, run in enumerate(kept)
            for old in removed
            if self.gate.rows[old].output is run.output
        ]
        self.gate.update_state(BatchUpdate(len(kept), removed=removed, added=added, moved=[]))
        if again:
            self.start(again)


def proposer(max_tokens: int = draft_support.MAX_DRAFT_TOKENS, max_batch: int = 8) -> DraftProposer:
    made = object.__new__(DraftProposer)
    made.table = DraftTable(TOKENIZER, PauseMode.PARALLEL)
    made.gate, made.max_batch, made.max_tokens, made.max_model_len = None, max_batch, max_tokens, MAX_LEN
    return made


def guesses(seed: int, reference: Sequence[Sequence[int]] = ()) -> Drafts:
    """Return a source of drafts that are partly right: pieces of a completion, mixed with noise and placeholders."""
    rng = random.Random(seed)

    def draft(run: Run, written: list[int]) -> list[int]:
        whole = reference[int(run.key)] if reference else SCRIPT
        ids = [token_id for token_id in whole[len(written) : len(written) + rng.randrange(9)] if token_id not in STOP]
        if rng.random() < 0.4:
            ids = [rng.choice([token_id, rng.randrange(VOCAB_SIZE), -1]) for token_id in ids]
        end = next((place for place, token_id in enumerate(ids) if token_id in run.stops), len(ids))
        return ids[:end] if written and written[-1] not in run.stops else []

    return draft


def completions(found: GateSettings, drafts: Any, seeds: Sequence[int], max_tokens: int) -> tuple[list[Any], Loop]:
    loop = Loop(found, drafts, max_tokens)
    runs = [Run(str(number), seed, Gate(found)) for number, seed in enumerate(seeds)]
    reports = loop.write(runs)
    return [(run.written, report[:2]) for run, report in zip(runs, reports, strict=True)], loop


GATES = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["parallel", "sampled"]),
        "tau_pause": st.sampled_from([0.0, 0.5, 0.8, 1.0]),
        "tau_abort": st.sampled_from([0.0, 0.1, 0.3]),
        "window_tokens": st.integers(1, 5),
        "rest_tokens": st.integers(0, 6),
        "latent_tokens": st.integers(1, 6),
        "acoustic_bias": st.sampled_from([0.0, 5.0]),
        "loop_tokens": st.sampled_from([6, 64]),
        "max_closed_loops": st.integers(0, 2),
    }
)


@settings(max_examples=40)
@given(fields=GATES, is_fed=st.booleans(), seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3), data=st.data())
def test_the_tokens_and_the_confidences_are_those_without_drafts(
    fields: dict[str, Any], is_fed: bool, seeds: list[int], data: st.DataObject
) -> None:
    found = replace(gate_settings(**fields), is_fed=is_fed and fields["mode"] == "parallel")
    plain, loop = completions(found, None, seeds, 120)
    source = data.draw(st.sampled_from(["drafter", "script", "completion"]))
    number = data.draw(st.integers(0, 999))
    drafts = {
        "drafter": proposer(max_tokens=1 + number % 9),
        "script": guesses(number),
        "completion": guesses(number, [written for written, _ in plain]),
    }[source]
    assert completions(found, drafts, seeds, 120)[0] == plain
    assert loop.num_steps >= max(len(written) for written, _ in plain) / (1 + found.latent_tokens)


def test_a_pause_inside_a_draft_cuts_it_and_drafts_save_steps() -> None:
    found = replace(gate_settings(tau_pause=1.0, tau_abort=0.0), is_fed=True)
    plain, slow = completions(found, None, [3], 120)
    # The completion without its spans is a draft that runs over every pause.
    visible = [token_id for token_id in plain[0][0] if token_id not in TOKENIZER.pause_ids]

    def over_the_pause(run: Run, written: list[int]) -> list[int]:
        num = sum(token_id not in TOKENIZER.pause_ids for token_id in written)
        return [] if written[-1] == TOKENIZER.pause_id else [t for t in visible[num : num + 6] if t not in STOP]

    with_drafts, fast = completions(found, over_the_pause, [3], 120)
    assert with_drafts == plain
    assert plain[0][0].count(TOKENIZER.pause_id) == 3 * found.latent_tokens
    assert fast.num_steps < 0.4 * slow.num_steps


def test_a_span_written_by_the_gate_is_drafted_whole() -> None:
    found = gate_settings(tau_pause=1.0, tau_abort=0.0, latent_tokens=6)
    plain, slow = completions(found, None, [3], 120)
    with_drafts, fast = completions(found, proposer(), [3], 120)
    assert with_drafts == plain and plain[0][0].count(TOKENIZER.pause_id) == 18
    assert fast.num_steps <= slow.num_steps - 15


def test_an_abort_comes_at_the_same_token_and_its_tags_are_drafted() -> None:
    found = gate_settings(tau_pause=0.0, tau_abort=0.6, window_tokens=2)
    for seed in range(9):
        plain, slow = completions(found, None, [seed], 120)
        with_drafts, fast = completions(found, proposer(), [seed], 120)
        assert with_drafts == plain and fast.num_steps < slow.num_steps


def test_accepted_and_drafted_tokens_are_counted_over_all_chunks_of_a_session() -> None:
    found = replace(gate_settings(tau_pause=1.0, tau_abort=0.0), is_fed=True)
    run = Run("0", 3, Gate(found))
    loop = Loop(found, proposer(), 120)
    (report,) = loop.write([run])
    num_sampled = len(run.written) - 3 * (found.latent_tokens - 1)
    assert loop.num_steps == num_sampled - report.num_accepted
    assert 0 < report.num_accepted <= report.num_drafted


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.7}, {"logprobs": 1}, {"presence_penalty": 0.1}, {"logit_bias": {1: 2.0}}]
)
def test_only_plain_greedy_requests_get_drafts(fields: dict[str, Any]) -> None:
    assert pause_vllm.is_plain_greedy(SamplingParams(temperature=0))
    changed: dict[str, Any] = {"temperature": 0.0, **fields}
    assert not pause_vllm.is_plain_greedy(SamplingParams(**changed))


def test_a_batch_above_the_limit_gets_no_drafts() -> None:
    found = gate_settings(tau_pause=0.0, tau_abort=0.0)
    plain, slow = completions(found, None, [1, 1, 1], 60)
    with_drafts, fast = completions(found, proposer(max_batch=0), [1, 1, 1], 60)
    assert (with_drafts, fast.num_steps) == (plain, slow.num_steps)


def test_log_probabilities_move_with_the_sampled_token() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sampled = SamplerOutput(
        torch.tensor([[7], [8]], dtype=torch.int32), LogprobsTensors(values.int(), values, values[:, 0])
    )
    assert with_accepted(sampled, [(), ()]) is sampled
    spread = with_accepted(sampled, [(), (5, 6)])
    tokens, logprobs = RejectionSampler.parse_output(
        spread.sampled_token_ids, 99, logprobs_tensors=spread.logprobs_tensors
    )
    assert tokens == [[7], [5, 6, 8]] and logprobs is not None
    assert logprobs.slice_request(0, 1).logprobs.tolist() == [[1.0, 2.0]]
    assert logprobs.slice_request(1, 3).logprobs.tolist()[-1] == [3.0, 4.0]


def test_the_installed_vllm_is_the_tested_one() -> None:
    assert list(draft_support.changed_methods(draft_support.vllm_folder())) == []
    assert draft_support.why_not(CHECKPOINT.manifest) is None


def test_another_vllm_turns_drafts_off_with_the_reason(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_support, "vllm_folder", lambda: tmp_path)
    reason = draft_support.why_not(CHECKPOINT.manifest)
    assert reason is not None and "GPUModelRunner._sample" in reason
    monkeypatch.undo()
    source = (draft_support.vllm_folder() / "v1/worker/cpu_worker.py").read_text()
    (tmp_path / "v1/worker").mkdir(parents=True)
    (tmp_path / "v1/worker/cpu_worker.py").write_text(
        source.replace("def init_device(self):", "def init_device(self, new):")
    )
    assert "CPUWorker.init_device" in list(draft_support.changed_methods(tmp_path))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    assert "V2" in (draft_support.why_not(CHECKPOINT.manifest) or "")


def test_a_checkpoint_without_a_gate_has_no_drafts() -> None:
    manifest = CHECKPOINT.manifest
    silent = manifest.model_copy(update={"pause": manifest.pause.model_copy(update={"max_pauses": 0})})
    assert "no pause gate" in (draft_support.why_not(silent) or "")
