"""The gates inside vLLM equal the pure gate, row for row, for both runners and all events."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hyper_model.checkpoint import open_checkpoint
from hyper_model.pause import Decision, Gate, GateReport, GateSettings, Verdict
from hyper_model.trace import PauseMode, Section, TraceTokenizer, add_position_tokens
from server.engines.scripted import scripted_checkpoint

with warnings.catch_warnings():
    # torch and vLLM raise deprecation warnings at import.
    warnings.simplefilter("ignore")
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    from hyper_model import pause_vllm
    from hyper_model.pause_vllm import PauseV1, PauseV2, arguments, check_arguments, processor_name

CHECKPOINT = scripted_checkpoint()
add_position_tokens(CHECKPOINT.tokenizer.tokenizer, 3)
TOKENIZER = TraceTokenizer(CHECKPOINT.tokenizer.tokenizer)
OPEN, CLOSE = CHECKPOINT.manifest.pause.open_id, CHECKPOINT.manifest.pause.close_id
TAGS = TOKENIZER.tag_ids
TAG_IDS = [tag_id for ids in TAGS.values() for tag_id in ids]
WORDS = TOKENIZER.encode_text("abcd")
VOCAB_SIZE = TOKENIZER.vocab_size + 3  # the output layer is padded
MAX_LEN, MAX_REQS = 600, 6
POSITIONS = TOKENIZER.with_positions(3).position_ids


def gate_settings(*, is_fed: bool = False, **fields: Any) -> GateSettings:
    """Return settings with changed values; the mode "positions" is parallel with one token per position."""
    manifest = CHECKPOINT.manifest
    fields = {"window_tokens": 3, "rest_tokens": 2, "latent_tokens": 3, "loop_tokens": 16} | fields
    if fields.get("mode") == "positions":
        fields |= {"mode": "parallel", "position_ids": POSITIONS}
    found = GateSettings.of(manifest.model_copy(update={"pause": manifest.pause.model_copy(update=fields)}), TOKENIZER)
    assert found is not None
    return replace(found, is_fed=is_fed)


def config(**fields: Any) -> Any:
    """Return the part of vLLM's configuration read by the processors."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model=""),
        scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS),
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False),
        speculative_config=None,
        **fields,
    )


def request_states() -> Any:
    """Return the V2 runner's buffers as CPU tensors; their `np` and `gpu` sides share memory."""

    def shared() -> SimpleNamespace:
        gpu = torch.zeros(MAX_REQS, dtype=torch.int32)
        return SimpleNamespace(gpu=gpu, np=gpu.numpy())

    return SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=MAX_REQS,
        vocab_size=VOCAB_SIZE,
        all_token_ids=SimpleNamespace(gpu=torch.zeros(MAX_REQS, MAX_LEN, dtype=torch.int32)),
        prompt_len=shared(),
        prefill_len=shared(),
        total_len=shared(),
    )


def make_v1(found: GateSettings | None) -> PauseV1:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pause_vllm, "checkpoint_settings", lambda _: found)
        return PauseV1(config(), torch.device("cpu"), is_pin_memory=False)


def make_v2(found: GateSettings | None) -> PauseV2:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pause_vllm, "checkpoint_settings", lambda _: found)
        return PauseV2(config(), request_states())


def sampling(extra: dict[str, Any] | None) -> SamplingParams:
    return SamplingParams(max_tokens=16, extra_args=extra)


def expected(row: torch.Tensor, decision: Decision, settings: GateSettings) -> torch.Tensor:
    """Apply a decision to one row, as documented in `Decision`."""
    row = row.clone()
    if decision.forced_id is not None:
        row.fill_(-math.inf)
        row[decision.forced_id] = 0.0
        return row
    if decision.is_biased:
        row[settings.open_id] += settings.acoustic_bias
    for token_id in decision.banned_ids:
        row[token_id] = -math.inf
    return row


def confidence_of(row: torch.Tensor) -> float:
    return math.exp(row.log_softmax(-1, dtype=torch.float32).max().item())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def state_of(processor: PauseV2, row: int) -> dict[str, Any]:
    """Return a row of the tensors in the form of `Gate.state`."""
    assert processor.settings is not None
    size = processor.settings.window_tokens
    rows = pause_vllm._Rows(processor.ints[row : row + 1], processor.floats[row : row + 1])
    num = int(rows.num_window.item())
    window = rows.window[0].tolist()
    num_resting, age, lowest = rows.num_resting.item(), rows.keyword_age.item(), rows.lowest.item()
    return {
        "total": rows.total.item(),
        "lowest": None if lowest == math.inf else lowest,
        "num_pauses": rows.num_pauses.item(),
        "num_resting": num_resting,
        "open_sections": rows.open_sections.item(),
        "seen_sections": rows.seen_sections.item(),
        "num_in_span": rows.num_in_span.item(),
        "keyword_age": None if age < 0 else age,
        "num_closed_loops": rows.num_closed_loops.item(),
        "is_aborted": bool(rows.is_aborted.item()),
        "window": [window[place % size] for place in range(max(0, num - size), num)],
        "recent": [each for each in reversed(rows.recent[0].tolist()) if each >= 0],
        "repeats": rows.repeats[0].tolist(),
        "forced": rows.forced[0, : int(rows.num_forced.item())].tolist(),
    }


def assert_same_state(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare states; confidences may differ in their last bit, because torch's exp in double precision does."""
    numbers = ("total", "lowest", "window")
    assert {name: found[name] for name in found if name not in numbers} == {
        name: wanted[name] for name in wanted if name not in numbers
    }
    for name in numbers:
        if wanted[name] is None:
            assert found[name] is None
            continue
        assert found[name] == pytest.approx(wanted[name], rel=1e-12, abs=1e-12), name


# --- The arguments of a request ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        {"hyper_pause": -1},
        {"hyper_pause": True},
        {"hyper_pause": "2"},
        {"hyper_pause_fed": 1.5},
        {"hyper_pause_state": [1]},
        {"hyper_pause_state": {}},
        {"hyper_pause_state": Gate(gate_settings()).state() | {"open_sections": 1 << 20}},
        {"hyper_pause_state": Gate(gate_settings()).state() | {"repeats": [0]}},
        {"hyper_pause_state": Gate(gate_settings()).state() | {"window": ["0.5"]}},
        {"hyper_pause_state": Gate(gate_settings()).state() | {"total": None}},
        {"hyper_pause_state": Gate(gate_settings()).state() | {"num_in_span": -1}},
        {"hyper_pause_key": 7},
        {"hyper_pause_key": ""},
        {"hyper_pause_tau": [0.5]},
        {"hyper_pauses": 1},
    ],
)
@pytest.mark.parametrize("processor", [PauseV1, PauseV2])
def test_arguments_that_make_no_gate_are_refused_at_the_door(processor: Any, extra: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="hyper_pause"):
        processor.validate_params(sampling(extra))


def test_the_arguments_that_we_write_are_accepted() -> None:
    check_arguments(sampling(arguments(Gate(gate_settings()), "a key") | {"another": "argument"}))
    check_arguments(sampling(None))


def test_a_key_for_several_completions_is_refused() -> None:
    with pytest.raises(ValueError, match="one completion"):
        check_arguments(SamplingParams(n=2, extra_args=arguments(Gate(gate_settings()), "key")))


def test_without_a_key_none_is_written() -> None:
    assert "hyper_pause_key" not in arguments(Gate(gate_settings()))


@pytest.mark.parametrize("is_v2", [False, True])
def test_a_processor_is_found_by_its_name(is_v2: bool) -> None:
    module, _, name = processor_name(is_v2=is_v2).partition(":")
    assert module == pause_vllm.__name__
    assert getattr(pause_vllm, name) is (PauseV2 if is_v2 else PauseV1)


def test_both_read_the_settings_of_the_checkpoint_that_is_served(random_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(random_checkpoint)
    served = config()
    served.model_config.model = str(random_checkpoint)
    wanted = GateSettings.of(checkpoint.manifest, checkpoint.tokenizer)
    assert PauseV1(served, torch.device("cpu"), is_pin_memory=False).settings == wanted
    assert PauseV2(served, request_states()).settings == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"speculative_config": object()},
        {"parallel_config": SimpleNamespace(enable_batch_sharded_sampling=True)},
    ],
)
def test_v2_refuses_to_start_where_it_would_be_wrong(fields: dict[str, Any]) -> None:
    served = config()
    vars(served).update(fields)
    with pytest.raises(ValueError, match="turn one of them off"):
        PauseV2(served, request_states())


def test_a_checkpoint_without_a_gate_arms_nothing() -> None:
    v1, v2 = make_v1(None), make_v2(None)
    params, logits = sampling({"hyper_pause": 3}), torch.randn(1, VOCAB_SIZE)
    kept = logits.clone()
    v1.update_state(BatchUpdate(batch_size=1, removed=[], added=[(0, params, None, [])], moved=[]))
    assert not v2.add_request(0, params)
    v2.apply_staged_writes()
    assert same_bits(v1.apply(logits), kept)
    assert same_bits(v2.apply(logits, context([0])), kept)


def context(slots: Sequence[int]) -> LogitsContext:
    """Return the layout of a step without speculative decoding: one row per request."""
    mapping = torch.tensor(slots, dtype=torch.int32)
    nothing = torch.zeros(len(slots), dtype=torch.int32)
    return LogitsContext(
        expanded_idx_mapping=mapping,
        idx_mapping=mapping,
        idx_mapping_np=np.array(slots, dtype=np.int32),
        expanded_local_pos=nothing,
        input_ids=nothing,
        pos=nothing,
        seq_lens_upper_bound_np=np.zeros(len(slots), dtype=np.int32),
    )


# --- Both runners, and the pure gate beside them ----------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """One request of the scheduler: its state in the engine, and the expected gate."""

    params: SamplingParams
    gate: Gate | None
    key: str
    prompt: list[int]
    output: list[int] = field(default_factory=list[int])
    slot: int | None = None
    num_partial: int = 0
    num_steps: int = 0

    @property
    def is_running(self) -> bool:
        return self.slot is not None


class Engine:
    """Driver of both processors, in the way of their runners, compared with the pure gate at every step.

    For V1: the persistent batch, condensed, reordered and reported in one BatchUpdate per step. For V2: the slots, and
    tokens written into the buffers after sampling.
    """

    def __init__(self, found: GateSettings, seed: int = 0) -> None:
        self.found, self.chance = found, random.Random(seed)
        self.v1, self.v2 = make_v1(found), make_v2(found)
        self.states: Any = self.v2.req_states
        self.batch: list[Request | None] = []
        self.removed: list[int] = []
        self.added: list[Request] = []
        self.free = list(range(MAX_REQS))
        self.generator = torch.Generator().manual_seed(seed)
        self.num_made = 0
        self.seen: set[str] = set()

    def make(self, gate: Gate | None, prompt_len: int = 4, *, has_key: bool = True) -> Request:
        """Make a request; without a gate it is not armed."""
        self.num_made += 1
        key = f"request-{self.num_made}"
        extra = None if gate is None else arguments(gate, key if has_key else None)
        return Request(sampling(extra), gate, key, [WORDS[0]] * prompt_len)

    def start(self, request: Request, *, slot: int | None = None, num_partial: int = 0) -> None:
        """Add a request to the batch: a new one, a preempted one, or the next chunk."""
        request.slot = self.free.pop() if slot is None else slot
        if slot is not None:
            self.free.remove(slot)
        request.num_partial = num_partial
        self.added.append(request)
        states, ids = self.states, request.prompt + request.output
        states.prompt_len.np[request.slot] = len(request.prompt)
        states.prefill_len.np[request.slot] = states.total_len.np[request.slot] = len(ids)
        states.all_token_ids.gpu[request.slot, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        assert self.v2.add_request(request.slot, request.params) == (request.gate is not None)

    def stop(self, request: Request) -> None:
        """Remove a request from the batch, finished or preempted; neither runner reports the difference."""
        assert request.slot is not None
        self.free.append(request.slot)
        request.slot = None
        index = self.batch.index(request)
        self.batch[index] = None
        self.removed.append(index)

    def next_chunk(self, request: Request, fed: Sequence[int], *, slot: int | None = None) -> None:
        """Continue a session: sampled tokens become prompt, and the same list starts anew."""
        assert request.gate is not None
        self.stop(request)
        request.prompt = request.prompt + request.output + list(fed)
        request.output.clear()
        request.gate = Gate.resume(request.gate.settings, request.gate.state())
        request.params = sampling(arguments(request.gate, request.key))
        self.start(request, slot=slot)

    def update_batch(self) -> None:
        """Report changes to V1: new rows fill the gaps, then the last rows do; sometimes two swap places."""
        removed, added, moved = sorted(self.removed), list[Any](), list[Any]()
        for request in self.added:
            index = removed.pop(0) if removed else len(self.batch)
            if index == len(self.batch):
                self.batch.append(None)
            self.batch[index] = request
            added.append((index, request.params, None, request.output))
        for hole in list(removed):
            while self.batch and self.batch[-1] is None:
                self.batch.pop()
            if hole < len(self.batch):
                self.batch[hole] = self.batch.pop()
                moved.append((len(self.batch), hole, MoveDirectionality.UNIDIRECTIONAL))
        if len(self.batch) > 1 and self.chance.random() < 0.2:
            a, b = self.chance.sample(range(len(self.batch)), 2)
            self.batch[a], self.batch[b] = self.batch[b], self.batch[a]
            moved.append((a, b, MoveDirectionality.SWAP))
        is_changed = bool(removed or added or moved)
        update = BatchUpdate(batch_size=len(self.batch), removed=removed, added=added, moved=moved)
        self.v1.update_state(update if is_changed else None)
        self.removed, self.added = [], []

    def logits(self) -> torch.Tensor:
        """Draw one row, of a confident, an unsure or an undecided model."""
        scale = self.chance.choice([0.2, 0.2, 2.0, 4.0, 8.0])
        return torch.randn(VOCAB_SIZE, generator=self.generator) * scale

    def step(self, choices: dict[str, int] | None = None, rows: dict[str, torch.Tensor] | None = None) -> None:
        """Run one step and check it; draw missing logits and tokens."""
        self.update_batch()
        self.v2.apply_staged_writes()
        batch = [request for request in self.batch if request is not None]
        assert len(batch) == len(self.batch)
        raw = torch.stack([(rows or {}).get(request.key, self.logits()) for request in batch])
        shuffled = self.chance.sample(range(len(batch)), len(batch))
        by_v1 = self.v1.apply(raw.clone())
        slots = [cast("int", batch[index].slot) for index in shuffled]
        by_v2 = torch.empty_like(raw)
        by_v2[shuffled] = self.v2.apply(raw[shuffled], context(slots))
        assert same_bits(by_v1, by_v2)
        for index, request in enumerate(batch):
            self.check(request, raw[index], by_v1[index], self.v1.rows.get(index))
        for index, request in enumerate(batch):
            request.num_steps += 1
            if request.num_partial:
                request.num_partial -= 1
                continue
            self.sample(request, raw[index], by_v1[index], (choices or {}).get(request.key))

    def check(self, request: Request, raw: torch.Tensor, found: torch.Tensor, row: Any) -> None:
        gate = request.gate
        assert (gate is None) == (row is None)
        if gate is None:
            assert same_bits(found, raw)
            return
        assert row.gate.state() == gate.state()
        assert_same_state(state_of(self.v2, cast("int", request.slot)), gate.state())
        decision = gate.decide(confidence_of(raw))
        assert same_bits(found, expected(raw, decision, gate.settings))
        self.seen.add(decision.verdict.value)
        self.seen |= {"biased"} if decision.is_biased else set()
        self.seen |= {"queue"} if gate.forced else set()
        self.seen |= {"closed"} if gate.num_closed_loops else set()
        self.seen |= {"span"} if gate.num_in_span else set()

    def sample(self, request: Request, raw: torch.Tensor, masked: torch.Tensor, choice: int | None) -> None:
        allowed = masked > -math.inf
        if choice is None:
            kind = self.chance.random()
            pool = TAG_IDS if kind < 0.15 else [OPEN, CLOSE, POSITIONS[1]] if kind < 0.25 else WORDS
            choice = self.chance.choice(pool)
        if not allowed[choice]:
            choice = int(masked.argmax())
        request.output.append(choice)
        slot = cast("int", request.slot)
        self.states.all_token_ids.gpu[slot, self.states.total_len.gpu[slot]] = choice
        self.states.total_len.gpu[slot] += 1
        if request.gate is not None:
            request.gate.push(choice, confidence_of(raw))


def row_with(confidence: float, token_id: int = WORDS[0]) -> torch.Tensor:
    """Return logits with about this probability for the likeliest token."""
    row = torch.full((VOCAB_SIZE,), math.log((1 - confidence) / (VOCAB_SIZE - 1) + 1e-30))
    row[token_id] = math.log(confidence)
    return row


def write(engine: Engine, request: Request, token_ids: Sequence[int], confidence: float = 0.9) -> None:
    """Make a request write these tokens; it is the only one, or the only one of interest."""
    for token_id in token_ids:
        engine.step({request.key: token_id}, {request.key: row_with(confidence)})
        assert request.output[-1] == token_id


REASONING = (TAGS[Section.THINK][0], TAGS[Section.REASONING][0])
MODES = pytest.mark.parametrize(
    ("mode", "is_fed"),
    [("parallel", False), ("parallel", True), ("positions", False), ("positions", True), ("sampled", False)],
    ids=["inline", "fed", "positions-inline", "positions-fed", "sampled"],
)


@MODES
@pytest.mark.parametrize("bias", [0.0, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_both_are_the_pure_gate_row_for_row(mode: str, is_fed: bool, bias: float, seed: int) -> None:
    # The manifest never defines whether spans are fed: each request does.
    loops: dict[str, Any] = {"loop_tokens": 3, "max_closed_loops": 2} if seed >= 2 else {}
    found = gate_settings(mode=mode, tau_pause=0.5, tau_abort=0.02 if seed % 2 else 0.0, acoustic_bias=bias, **loops)
    # In place of words like "tone", absent from a random text.
    found = replace(found, keyword_ids=((WORDS[1], WORDS[2]), (WORDS[3],)) if bias else ())
    engine, chance = Engine(found, seed), random.Random(seed)
    preempted: list[Request] = []

    def new() -> Request:
        if chance.random() < 0.25:
            return engine.make(None)
        settings = replace(found.with_budget(chance.randint(1, 3)), is_fed=is_fed)
        if chance.random() < 0.3:
            settings = replace(settings, tau_pause=chance.random(), tau_abort=0.01)
        gate = Gate(settings)
        if chance.random() < 0.7:
            for tag_id in REASONING:
                gate.push(tag_id, None)
        return engine.make(gate, chance.randint(1, 6))

    def live() -> list[Request]:
        return [request for request in [*engine.batch, *engine.added] if request is not None and request.is_running]

    for _ in range(150):
        settled = [request for request in live() if request not in engine.added]
        for request in settled:
            draw = chance.random()
            gate = request.gate
            if gate is not None and is_fed and gate.is_pausing:
                engine.next_chunk(request, gate.feed_span()[1:])
            elif draw < 0.02 or len(request.prompt) + len(request.output) > MAX_LEN - 10:
                engine.stop(request)
            elif draw < 0.08:
                engine.stop(request)
                preempted.append(request)
            elif gate is not None and draw < 0.10 and not request.num_partial:
                engine.next_chunk(request, [])
        while engine.free and chance.random() < 0.6:
            # As in vLLM's queue, returning requests precede new ones.
            if preempted:
                request = preempted.pop(chance.randrange(len(preempted)))
                if request.output and chance.random() < 0.5:
                    request.output = list(request.output)  # as with asynchronous scheduling
            else:
                request = new()
            slot = chance.choice(engine.free)
            engine.start(request, slot=slot, num_partial=chance.choice([0, 0, 1, 2]))
        if not live():
            engine.start(new())
        engine.step()
    assert {"continue", "pause"} <= engine.seen
    assert ("biased" in engine.seen) == bool(bias)
    assert ("closed" in engine.seen) == bool(loops)


def test_both_end_the_section_of_a_loop_and_abort_the_next_one() -> None:
    gate = Gate(gate_settings(tau_pause=0.0, tau_abort=0.0, max_closed_loops=1))
    engine = Engine(gate.settings)
    request = engine.make(gate)
    engine.start(request)
    write(engine, request, REASONING)
    write(engine, request, [WORDS[0]] * (1 + gate.settings.loop_tokens))
    # The model goes on with the word; the gate forces the tag.
    engine.step({request.key: WORDS[0]}, {request.key: row_with(0.9)})
    assert request.output[-1] == TAGS[Section.REASONING][1]
    write(engine, request, [TAGS[Section.SUMMARY][0], *[WORDS[1]] * (1 + gate.settings.loop_tokens)])
    engine.step({request.key: WORDS[1]}, {request.key: row_with(0.9)})
    assert request.output[-1] == CLOSE and gate.is_aborted


def test_the_comparison_sees_aborts_spans_and_queues() -> None:
    found = gate_settings(mode="sampled", tau_pause=0.5, tau_abort=0.05)
    engine = Engine(found)
    gate = Gate(found)
    request = engine.make(gate)
    engine.start(request)
    write(engine, request, REASONING)
    write(engine, request, [WORDS[0], WORDS[1]], confidence=0.3)
    write(engine, request, [OPEN], confidence=0.3)
    write(engine, request, [WORDS[2]] * 3)
    write(engine, request, [CLOSE])
    write(engine, request, [WORDS[0], WORDS[1]], confidence=0.04)
    write(engine, request, [CLOSE], confidence=0.04)
    write(engine, request, [TAGS[Section.REASONING][1], TAGS[Section.THINK][1], TAGS[Section.FINAL_ANSWER][0]])
    write(engine, request, [WORDS[0]])
    assert engine.seen == {"continue", "pause", "abort", "span", "queue"}
    assert gate.is_aborted and not gate.forced


def test_after_an_abort_in_the_answer_the_completion_is_ended() -> None:
    found = gate_settings()
    engine = Engine(found)
    request = engine.make(Gate(found))
    engine.start(request)
    write(engine, request, [TAGS[Section.FINAL_ANSWER][0], *[WORDS[0]] * 17, CLOSE])
    write(engine, request, [TAGS[Section.FINAL_ANSWER][1], TOKENIZER.stop_ids[0]])


def test_a_prompt_that_is_not_whole_samples_nothing_and_tells_the_gate_nothing() -> None:
    engine = Engine(gate_settings())
    request = engine.make(Gate(engine.found))
    engine.start(request, num_partial=3)
    for _ in range(3):
        engine.step(rows={request.key: row_with(0.01)})
    assert request.output == []
    write(engine, request, [*REASONING, *WORDS])
    assert request.gate is not None and request.gate.lowest == pytest.approx(0.9)


@pytest.mark.parametrize("is_new_list", [False, True], ids=["same-list", "another-list"])
def test_a_preempted_request_comes_back_to_its_window(is_new_list: bool) -> None:
    engine = Engine(gate_settings(tau_pause=0.5))
    request, other = engine.make(Gate(engine.found)), engine.make(Gate(engine.found))
    engine.start(request, slot=2)
    write(engine, request, [*REASONING, *WORDS[:2]], confidence=0.2)
    engine.stop(request)
    engine.start(other, slot=2)
    write(engine, other, WORDS)
    if is_new_list:
        request.output = list(request.output)
    engine.start(request, slot=4, num_partial=1)
    engine.step()
    engine.step(rows={request.key: row_with(0.2)})
    assert request.output[-1] == OPEN


def test_a_preempted_request_may_come_back_into_its_own_slot_or_trade_slots() -> None:
    engine = Engine(gate_settings())
    first, second = engine.make(Gate(engine.found)), engine.make(Gate(engine.found))
    engine.start(first, slot=0)
    engine.start(second, slot=1)
    for _ in range(6):
        engine.step()
    engine.stop(first)
    engine.stop(second)
    engine.start(second, slot=0)
    engine.start(first, slot=1)
    for _ in range(3):
        engine.step()
    engine.stop(first)
    engine.start(first, slot=1)
    for _ in range(3):
        engine.step()


def test_a_preempted_request_that_wrote_nothing_begins_anew() -> None:
    engine = Engine(gate_settings())
    request = engine.make(Gate(engine.found))
    engine.start(request, slot=3, num_partial=5)
    engine.step()
    engine.stop(request)
    engine.start(request, slot=1)
    write(engine, request, [*REASONING, *WORDS])


@MODES
def test_without_its_state_a_request_keeps_its_budget_and_its_place(mode: str, is_fed: bool) -> None:
    """Cover a request without a key in the V2 runner, and one whose state was dropped after a long preemption."""
    found = gate_settings(mode=mode, is_fed=is_fed, tau_pause=0.5, tau_abort=0.0)
    engine = Engine(found)
    request = engine.make(Gate(found), has_key=False)
    engine.start(request)
    write(engine, request, [*REASONING, *WORDS[:2]], confidence=0.2)
    engine.step(rows={request.key: row_with(0.2)})
    assert request.output[-1] == OPEN
    engine.stop(request)
    # Make V1 drop its state; give the pure gate the tokens read again by both.
    engine.v1.parked.clear()
    engine.update_batch()
    engine.v1.parked.clear()
    request.output = list(request.output)
    request.params = sampling(request.params.extra_args)
    again = Gate(found)
    for token_id in request.output:
        again.push(token_id, None)
    assert (again.num_pauses, again.open_sections) == (1, cast("Gate", request.gate).open_sections)
    request.gate = again
    engine.start(request, num_partial=1)
    for _ in range(12):
        engine.step()


def test_the_next_chunk_of_a_session_goes_on_from_the_state_that_it_brings() -> None:
    found = gate_settings(tau_pause=0.5, tau_abort=0.0, is_fed=True)
    engine = Engine(found)
    request = engine.make(Gate(found))
    engine.start(request, slot=1)
    output = request.output
    write(engine, request, [*REASONING, *WORDS[:2], OPEN], confidence=0.2)
    gate = request.gate
    assert gate is not None
    engine.next_chunk(request, gate.feed_span()[1:], slot=1)
    assert request.output is output
    gate = request.gate
    assert gate is not None and (gate.num_pauses, gate.num_resting, gate.num_in_span) == (1, 2, 0)
    write(engine, request, WORDS, confidence=0.8)
    assert len(engine.v2.places) == 1 and not engine.v2.parked


def test_with_v1_a_session_keeps_its_window_though_its_reader_hears_no_confidences() -> None:
    found = gate_settings(tau_pause=0.5, tau_abort=0.0, max_pauses=1, is_fed=True)
    processor, pure, reader = make_v1(found), Gate(found), Gate(found)
    generator = torch.Generator().manual_seed(0)

    def write(token_ids: Sequence[int], scale: float) -> None:
        output: list[int] = []
        params = sampling(arguments(reader, "one"))
        processor.update_state(BatchUpdate(batch_size=1, removed=[], added=[(0, params, None, output)], moved=[]))
        for token_id in token_ids:
            logits = torch.randn(1, VOCAB_SIZE, generator=generator) * scale
            confidence = confidence_of(logits[0])
            decision = pure.decide(confidence)
            assert same_bits(processor.apply(logits.clone())[0], expected(logits[0], decision, found))
            assert decision.forced_id in (None, token_id)
            pure.push(token_id, confidence)
            reader.push(token_id, None)
            output.append(token_id)

    write([*REASONING, *WORDS[:2], OPEN], scale=1.0)
    assert pure.feed_span() == reader.feed_span()
    write(WORDS, scale=9.0)
    assert reader.report() == GateReport(None, (None,))
    worker = pause_vllm.GateReports()
    (report,) = worker.gate_reports(["one"])
    assert report == pure.report() and report.lowest is not None and report.confidences[0] is not None
    processor.update_state(BatchUpdate(batch_size=0, removed=[0], added=[], moved=[]))
    assert worker.gate_reports(["one", "another"]) == [pure.report(), GateReport()]
    # A report is dropped after its first reading, so finished requests leave nothing in the engine.
    assert worker.gate_reports(["one"]) == [GateReport()]


def test_a_step_that_was_under_way_when_a_chunk_ended_leaves_no_trace() -> None:
    """With asynchronous scheduling the next step starts before the pause token's end of the chunk is known."""
    found = gate_settings(tau_pause=0.5, tau_abort=0.0, is_fed=True)
    engine = Engine(found)
    request = engine.make(Gate(found))
    engine.start(request, slot=1)
    write(engine, request, [*REASONING, *WORDS[:2], OPEN], confidence=0.2)
    state, num_tokens = cast("Gate", request.gate).state(), len(request.output)
    engine.step()
    del request.output[num_tokens:]
    request.gate = Gate.resume(found, state)
    engine.next_chunk(request, request.gate.feed_span()[1:])
    write(engine, request, WORDS, confidence=0.8)


def test_tokens_that_are_dropped_and_sampled_again_are_told_once() -> None:
    """After a reset of the prefix cache under a running request, vLLM drops its tokens and samples them again."""
    engine = Engine(gate_settings())
    request = engine.make(Gate(engine.found))
    engine.start(request, slot=1)
    write(engine, request, [*REASONING, *WORDS], confidence=0.8)
    told = cast("Gate", request.gate).state()
    write(engine, request, [WORDS[0]])
    engine.stop(request)
    del request.output[-2:]
    request.gate = Gate.resume(engine.found, told)
    engine.start(request, slot=1)
    for _ in range(6):
        engine.step()


def test_rows_that_are_not_armed_keep_every_bit() -> None:
    engine = Engine(gate_settings())
    armed, plain = engine.make(Gate(engine.found)), engine.make(None)
    engine.start(armed)
    engine.start(plain)
    odd = torch.tensor([-0.0, math.inf, -math.inf, 1e-45])
    for _ in range(4):
        row = torch.cat([odd, engine.logits()[4:]])
        row[[OPEN, CLOSE]] = -0.0
        engine.step(rows={plain.key: row})


def test_a_slot_that_an_armed_request_left_is_as_if_new() -> None:
    engine = Engine(gate_settings())
    armed = engine.make(Gate(engine.found))
    engine.start(armed, slot=0)
    for _ in range(8):
        engine.step()
    engine.stop(armed)
    plain = engine.make(None)
    engine.start(plain, slot=0)
    engine.step()
    engine.stop(plain)
    engine.start(engine.make(Gate(engine.found)), slot=0)
    engine.start(engine.make(None), slot=1)
    for _ in range(4):
        engine.step()


def test_the_oldest_of_too_many_parked_requests_is_forgotten() -> None:
    engine = Engine(gate_settings())
    num_places = 4 * MAX_REQS
    for _ in range(num_places + 3):
        request = engine.make(Gate(engine.found))
        engine.start(request, slot=0)
        engine.step()
        engine.stop(request)
    assert len(engine.v2.parked) == num_places
    assert not engine.v2.free
    assert "request-1" not in engine.v2.places and "request-20" in engine.v2.places
    assert len({place.row for place in engine.v2.places.values()}) == len(engine.v2.places)


class Recorder(TorchDispatchMode):
    """Record of the operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        indices = args[1] if self.names[-1].startswith(("index", "_index")) and isinstance(args[1], list) else []
        assert not any(index is not None and index.dtype is torch.bool for index in indices), "its size is not known"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("mode", ["parallel", "positions", "sampled"])
def test_v2_waits_for_nothing_and_does_as_much_for_many_rows_as_for_one(mode: str) -> None:
    counts: list[int] = []
    for num_rows in (1, MAX_REQS):
        processor = make_v2(gate_settings(mode=mode))
        processor.req_states.prompt_len.gpu.fill_(4)
        cast("Any", processor.req_states).total_len.gpu.fill_(5)
        for slot in range(num_rows):
            cast("Any", processor.req_states).prefill_len.np[slot] = 4
            assert processor.add_request(slot, sampling(arguments(Gate(gate_settings(mode=mode)))))
        processor.apply_staged_writes()
        logits = torch.randn(num_rows, VOCAB_SIZE)
        layout = context(range(num_rows))
        with Recorder() as recorder:
            processor.apply(logits, layout)
        waiting = {
            "_local_scalar_dense",
            "item",
            "nonzero",
            "masked_select",
            "unique",
            "_unique2",
            "equal",
            "is_nonzero",
        }
        assert not waiting & set(recorder.names)
        counts.append(len(recorder.names))
    assert counts[0] == counts[1]


def test_where_nothing_is_armed_no_tensor_is_touched() -> None:
    processor = make_v2(gate_settings())
    assert not processor.add_request(0, sampling(None))
    processor.apply_staged_writes()
    logits, layout = torch.randn(1, VOCAB_SIZE), context([0])
    with Recorder() as recorder:
        assert processor.apply(logits, layout) is logits
    assert recorder.names == []


@pytest.mark.parametrize("mode", ["parallel", "positions"])
def test_both_force_the_token_of_each_position_and_ban_it_elsewhere(mode: str) -> None:
    found = gate_settings(mode=mode, tau_pause=0.5, tau_abort=0.0)
    engine = Engine(found)
    request = engine.make(Gate(found))
    engine.start(request)
    write(engine, request, [*REASONING, *WORDS[:2]], confidence=0.2)
    # Whatever the model prefers.
    for token_id in POSITIONS if mode == "positions" else [OPEN] * 3:
        engine.step({request.key: WORDS[3]}, {request.key: row_with(0.2, WORDS[3])})
        assert request.output[-1] == token_id
    engine.step({request.key: POSITIONS[1]}, {request.key: row_with(0.9, POSITIONS[1])})
    assert (request.output[-1] == POSITIONS[1]) == (mode == "parallel"), "a token that no manifest names is any other"


@pytest.mark.parametrize("place", [3, 1000])
def test_a_state_from_outside_may_say_a_place_behind_the_span(place: int) -> None:
    found = gate_settings(mode="positions")
    engine = Engine(found)
    engine.start(engine.make(Gate(found, num_in_span=place)))
    engine.step()
    engine.step()


def test_forced_and_banned_logits_are_what_the_decision_says() -> None:
    found = gate_settings(mode="sampled", tau_pause=0.5, tau_abort=0.0)
    engine = Engine(found)
    request = engine.make(Gate(found))
    engine.start(request)
    write(engine, request, [*REASONING, *WORDS[:2]], confidence=0.2)
    engine.update_batch()
    logits = row_with(0.2)[None]
    for found_logits in (
        engine.v1.apply(logits.clone()),
        engine.v2.apply(logits.clone(), context([request.slot or 0])),
    ):
        assert found_logits[0, OPEN] == 0.0
        assert (found_logits[0] > -math.inf).sum() == 1
    assert cast("Gate", request.gate).decide(confidence_of(logits[0])).verdict is Verdict.PAUSE
    write(engine, request, [OPEN], confidence=0.2)
    logits = row_with(0.2)[None]
    hidden = engine.v1.apply(logits.clone())[0]
    banned = {int(token_id) for token_id in (hidden == -math.inf).nonzero()}
    # The answer's tags are banned too: they would end the part with pauses in the middle of a span.
    assert banned == {OPEN, *TOKENIZER.stop_ids, *TAGS[Section.FINAL_ANSWER]}
    assert found.mode is PauseMode.SAMPLED
