"""The pause gate inside vLLM: its two logits processors and their request arguments.

vLLM has two model runners, with different logits-processor interfaces: V1 (CPU builds, and GPUs with V2 off) and V2.
`processor_name` returns the processor for an engine. Both read the thresholds from the checkpoint's manifest in the
model directory. So a plain `python -m vllm.entrypoints.openai.api_server --logits-processors NAME` pauses too.

Extra arguments arm a request (over HTTP: `vllm_xargs`):
  - `hyper_pause`: the maximum number of pauses. With 0 the gate still aborts hopeless or repetitive completions.
    Without this argument the processor ignores the request.
  - `hyper_pause_fed`: 1 if the reader of the completion feeds the span of a parallel pause. The completion must then
    stop on the pause token, and on the closing token of a pause, written by the gate to abort.
  - `hyper_pause_tau`: two numbers to replace the manifest's tau_pause and tau_abort, for calibration and training.
  - `hyper_pause_state`: the gate's state at the end of the previous chunk (`Gate.state`).
  - `hyper_pause_key`: a string unique to a session in the engine, the same for all its chunks. It restores the gate
    after a preemption. With V1 it also finds the gate for the session's next chunk and for `GateReports`.

With V1 the gate of a session stays in the engine, and `GateReports` returns its summary. With V2 the gate is on the
device, and reading it would make the engine wait. Instead, the reader of the completion requests the log-probability of
the likeliest token, runs its own gate, and sends its state with each chunk. The same would work with V1, but would slow
a small model's step by 5 to 8 %.

The module is independent of HTTP and text.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from hyper_model.checkpoint import open_checkpoint
from hyper_model.pause import (
    KEYWORD_MEMORY_TOKENS,
    LOOP_PERIOD_TOKENS,
    NUM_OPEN_SETS,
    Gate,
    GateReport,
    GateSettings,
)
from hyper_model.trace import PauseMode, Section

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BUDGET, FED, TAU, STATE = "hyper_pause", "hyper_pause_fed", "hyper_pause_tau", "hyper_pause_state"
KEY = "hyper_pause_key"
PREFIX = BUDGET


def arguments(gate: Gate, key: str | None = None) -> dict[str, Any]:
    """Return the extra arguments of a request, or of its next chunk, to continue with this gate.

    Args:
        gate: The gate before the first token of the request.
        key: Unique key of the request in the engine; without it a preemption empties the gate's window.
    """
    settings = gate.settings
    taus = [settings.tau_pause, settings.tau_abort]
    extra_args = {BUDGET: settings.max_pauses, FED: int(settings.is_fed), TAU: taus, STATE: gate.state()}
    return extra_args if key is None else extra_args | {KEY: key}


def processor_name(*, is_v2: bool) -> str:
    """Return the processor's name for an engine's `logits_processors`; a name survives a spawn.

    There is no entry point: vLLM would load it in every engine on the machine, with either runner.
    """
    return f"{__name__}:{'PauseV2' if is_v2 else 'PauseV1'}"


def check_arguments(params: SamplingParams) -> None:
    """Check the extra arguments of a request.

    Raises:
        ValueError: If they define no gate; vLLM answers with status 400.
    """
    extra: Mapping[str, Any] = params.extra_args or {}
    for name, value in extra.items():
        if name in (BUDGET, FED):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number, 0 or more")
        elif name == TAU:
            numbers = cast("list[Any]", value) if isinstance(value, list | tuple) else []
            if len(numbers) != 2 or not all(isinstance(each, int | float) for each in numbers):
                raise ValueError(f"{name} must be two numbers, tau_pause and tau_abort")
        elif name == STATE:
            if not Gate.is_state(value):
                raise ValueError(f"{name} is not a state of the gate")
        elif name == KEY:
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be a string that is not empty")
            if params.n > 1:
                raise ValueError(f"{name} names one completion, and n asks for {params.n}")
        elif name.startswith(PREFIX):
            raise ValueError(f"{name} is no argument; there are {BUDGET}, {FED}, {TAU}, {STATE} and {KEY}")


def armed_settings(settings: GateSettings | None, params: SamplingParams) -> GateSettings | None:
    """Return the settings of a request's gate, or None if it has no gate."""
    extra: Mapping[str, Any] = params.extra_args or {}
    if settings is None or BUDGET not in extra:
        return None
    tau_pause, tau_abort = extra.get(TAU) or (settings.tau_pause, settings.tau_abort)
    budgeted = settings.with_budget(extra[BUDGET])
    return replace(budgeted, tau_pause=tau_pause, tau_abort=tau_abort, is_fed=bool(extra.get(FED)))


def checkpoint_settings(vllm_config: VllmConfig) -> GateSettings | None:
    """Read the gate settings of the checkpoint served by an engine."""
    checkpoint = open_checkpoint(vllm_config.model_config.model, verify=False)
    return GateSettings.of(checkpoint.manifest, checkpoint.tokenizer)


@dataclass
class _Row:
    """One armed request with its gate.

    Attributes:
        key: The request's key, else the identity of its output; unique because the output is referenced here.
        output: The request's own list of tokens; vLLM appends sampled tokens to it.
        num_seen: Number of its tokens already pushed to the gate.
        confidence: Last computed confidence of the position behind them.
        num_output: Length of `output` at the last accepted draft. Until vLLM appends the draft, `num_seen` is larger.
        num_drafted, num_accepted: Drafted tokens of the completion, and those accepted.
    """

    key: str | int
    params: SamplingParams
    output: list[int]
    gate: Gate
    num_seen: int = 0
    confidence: float | None = None
    num_output: int = -1
    num_drafted: int = 0
    num_accepted: int = 0

    def __post_init__(self) -> None:
        self.is_draftable = is_plain_greedy(self.params)

    def catch_up(self) -> None:
        """Push all newly sampled tokens to the gate.

        A step of an incomplete prompt calls this too, but samples nothing; its decision is then requested again. The
        confidence is unknown for tokens sampled in between, as for a request that lost its row and its memory.
        """
        if len(self.output) == self.num_output:
            return
        self.num_output = -1
        # Tokens dropped by vLLM, to be sampled again, were pushed already.
        self.num_seen = min(self.num_seen, len(self.output))
        # A token below 0 is vLLM's placeholder for one still being sampled.
        while self.num_seen < len(self.output) and self.output[self.num_seen] >= 0:
            self.gate.push(self.output[self.num_seen], self.confidence)
            self.num_seen += 1
            self.confidence = None

    def accept(self, draft: Sequence[int], logits: torch.Tensor, likeliest: list[int], best: list[float]) -> int:
        """Push the drafted tokens that greedy decoding under the gate would choose, and return their number.

        Args:
            draft: K drafted tokens.
            logits: float32 [K, V], the logits at their positions; unchanged.
            likeliest: Likeliest token at each position, before the gate.
            best: Log-probability of each.
        """
        self.catch_up()
        gate, num_accepted = self.gate, 0
        for place, token_id in enumerate(draft):
            confidence = math.exp(best[place]) if gate.is_listening else None
            decision = gate.decide(1.0 if confidence is None else confidence)
            if decision.forced_id is not None:
                chosen = decision.forced_id
            elif decision.is_biased or likeliest[place] in decision.banned_ids:
                constrained = logits[place].clone()
                if decision.is_biased:
                    constrained[gate.settings.open_id] += gate.settings.acoustic_bias
                constrained[list(decision.banned_ids)] = -math.inf
                chosen = int(constrained.argmax())
            else:
                chosen = likeliest[place]
            if chosen != token_id:
                break
            gate.push(token_id, confidence)
            num_accepted += 1
        self.num_drafted += len(draft)
        self.num_accepted += num_accepted
        if num_accepted:
            self.num_seen += num_accepted
            self.num_output = len(self.output)
            self.confidence = None
        return num_accepted


def is_plain_greedy(params: SamplingParams) -> bool:
    """Return whether a request takes the likeliest token, changed by nothing but the gate."""
    return (
        params.temperature == 0
        and not (params.presence_penalty or params.frequency_penalty or params.min_p or params.min_tokens)
        and params.repetition_penalty == 1
        and not (params.logit_bias or params.allowed_token_ids or params.bad_words or params.structured_outputs)
        and params.logprobs is None
        and params.logprob_token_ids is None
    )


class PauseV1(LogitsProcessor):
    """Logits processor for vLLM's V1 model runner: one `Gate` per row, one pass over the logits for all rows."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse invalid extra arguments."""
        check_arguments(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.settings = checkpoint_settings(vllm_config)
        self.rows: dict[int, _Row] = {}
        # A preempted request loses its row, and so does a session between two chunks. Both need their window when they
        # return. Finished requests look the same here, so the oldest rows are dropped.
        self.parked: OrderedDict[str | int, _Row] = OrderedDict()
        self.max_parked = 4 * vllm_config.scheduler_config.max_num_seqs
        # The banned rows and columns rarely change from one step to the next.
        self.banned: tuple[list[int], list[int]] = ([], [])
        self.banned_index: tuple[torch.Tensor, torch.Tensor] | None = None
        self.minus_infinity = torch.tensor(-math.inf, device=device)
        _PROCESSORS.add(self)

    def is_argmax_invariant(self) -> bool:
        """Return False: the gate forces tokens, so greedy sampling needs it too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Apply the batch's removed, added and moved rows, in this order."""
        if batch_update is None:
            return
        # Process all removed rows before any added one: it may be the same request at another index.
        for index in [*batch_update.removed, *(added[0] for added in batch_update.added)]:
            self._park(index)
        for index, params, _, output in batch_update.added:
            row = self._row(params, output)
            if row is not None:
                self.rows[index] = row
        for source, target, direction in batch_update.moved:
            moved, other = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if other is None:
                continue
            if direction is MoveDirectionality.SWAP:
                self.rows[source] = other
            else:
                # vLLM names a removed row only by the row moved into its place.
                self._keep(other)

    def _park(self, index: int) -> None:
        row = self.rows.pop(index, None)
        if row is not None:
            self._keep(row)

    def _keep(self, row: _Row) -> None:
        self.parked[row.key] = row
        if len(self.parked) > self.max_parked:
            self.parked.popitem(last=False)

    def _row(self, params: SamplingParams, output: list[int]) -> _Row | None:
        settings = armed_settings(self.settings, params)
        if settings is None:
            return None
        extra: Mapping[str, Any] = params.extra_args or {}
        key: str | int = extra.get(KEY) or id(output)
        parked = self.parked.pop(key, None)
        if parked is None and output:
            # With asynchronous scheduling vLLM gives a returning request a new list. Requests of one process may share
            # their parameters. If several rows match, the request's tokens are read again.
            same = [other for other, row in self.parked.items() if row.params is params]
            parked = self.parked.pop(same[0]) if len(same) == 1 else None
        if parked is not None and parked.params is params:
            parked.output = output
            return parked
        gate = Gate.resume(settings, extra.get(STATE))
        if parked is not None and KEY in extra and not gate.window:
            # The next chunk of a session whose reader has no confidences.
            gate.inherit(parked.gate, parked.confidence)
        row = _Row(key, params, output, gate)
        if parked is not None:
            row.num_drafted, row.num_accepted = parked.num_drafted, parked.num_accepted
        return row

    def report(self, key: str) -> GateReport | None:
        """Return the summary of a request's gate, or None for an unknown key; drop it if the request is over."""
        row = self.parked.pop(key, None) or next((row for row in self.rows.values() if row.key == key), None)
        if row is None:
            return None
        row.catch_up()
        return row.gate.report()._replace(num_drafted=row.num_drafted, num_accepted=row.num_accepted)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Ban and force tokens in the rows of armed requests; other rows keep every bit.

        Args:
            logits: float32 [B, V], changed in place.
        """
        if not self.rows:
            return logits
        self._measure(logits)
        banned_rows: list[int] = []
        banned_ids: list[int] = []
        forced: list[tuple[int, int]] = []
        for index, row in self.rows.items():
            decision = row.gate.decide(1.0 if row.confidence is None else row.confidence)
            if decision.forced_id is not None:
                forced.append((index, decision.forced_id))
                continue
            banned_rows += [index] * len(decision.banned_ids)
            banned_ids += decision.banned_ids
            if decision.is_biased:
                logits[index, row.gate.settings.open_id] += row.gate.settings.acoustic_bias
        if banned_rows:
            banned = (banned_rows, banned_ids)
            if self.banned_index is None or banned != self.banned:
                self.banned = banned
                self.banned_index = (_index(banned_rows, logits.device), _index(banned_ids, logits.device))
            logits.index_put_(self.banned_index, self.minus_infinity)
        for index, token_id in forced:
            logits[index] = -math.inf
            logits[index, token_id] = 0.0
        return logits

    def apply_with_spec_decode(
        self, logits: torch.Tensor, num_draft_tokens: Sequence[int], draft_token_ids: Sequence[Sequence[int]]
    ) -> list[int]:
        """Return the number of accepted drafted tokens of each request.

        Call it before `apply`, which then constrains the position after the accepted tokens. vLLM's own hook for drafts
        (vllm#43672) comes after `apply`. The gate needs this order, because a position's decision depends on the
        confidences of the drafted tokens before it.

        Args:
            logits: float32 [D, V], the logits at all drafted positions, request after request; unchanged.
            num_draft_tokens: Number of drafted tokens of each request, of sum D.
            draft_token_ids: The drafted tokens of each request.
        """
        num_accepted = [0] * len(num_draft_tokens)
        # As in `_measure`, so that accepted tokens have the same confidences as without drafts.
        tensor = logits.log_softmax(dim=-1, dtype=torch.float32).amax(dim=-1)
        best = cast("list[float]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]
        likeliest = cast("list[int]", logits.argmax(dim=-1).tolist())  # pyright: ignore[reportUnknownMemberType]
        start = 0
        for index, (num, draft) in enumerate(zip(num_draft_tokens, draft_token_ids, strict=True)):
            row, drafted = self.rows.get(index), slice(start, start + num)
            start += num
            if num and row is not None and row.is_draftable:
                num_accepted[index] = row.accept(draft, logits[drafted], likeliest[drafted], best[drafted])
        return num_accepted

    def _measure(self, logits: torch.Tensor) -> None:
        """Push sampled tokens to the gates, and store the confidence of each listening row."""
        listening: list[tuple[int, _Row]] = []
        for index, row in self.rows.items():
            row.catch_up()
            if row.gate.is_listening:
                listening.append((index, row))
        if not listening:
            return
        # Indexing rows copies them, at about the cost of computing twice as many.
        is_all = 2 * len(listening) > logits.shape[0]
        chosen = logits if is_all else logits[[index for index, _ in listening]]
        # Compute this exactly as vLLM computes its returned log-probabilities, so that their reader gets the same bits.
        tensor = chosen.log_softmax(dim=-1, dtype=torch.float32).amax(dim=-1)
        best = cast("list[float]", tensor.tolist())  # pyright: ignore[reportUnknownMemberType]
        for place, (index, row) in enumerate(listening):
            row.confidence = math.exp(best[index if is_all else place])


def _index(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


_PROCESSORS: weakref.WeakSet[PauseV1] = weakref.WeakSet()
"""Processors of this process. A vLLM worker has one."""


class GateReports:
    """Methods of an engine's workers for `collective_rpc`, mixed in through `worker_extension_cls`."""

    def gate_reports(self, keys: Sequence[str]) -> list[GateReport]:
        """Return the summaries of requests' gates; empty for an unknown or dropped key."""
        return [
            next((report for processor in _PROCESSORS if (report := processor.report(key)) is not None), GateReport())
            for key in keys
        ]


_NUM_FORCED = len(Section) + 1
"""Maximum number of tags forced by an abort: every section's closing tag, and the answer's."""

_NUM_INTS = 15
"""Number of single integers in a row, before its lists."""


class _Rows:
    """Named columns of `PauseV2`'s state rows; an in-place change of a column changes its tensor.

    Fields not listed here are as in `Gate` and `GateSettings`.

    Attributes:
        ints, floats: int64 [R, ...] and float64 [R, ...], the storage of all other fields.
        num_seen: Sampled tokens pushed so far.
        has_confidence: Whether `confidence` belongs to the position behind them.
        num_window: Confidences stored so far. Modulo the length of the ring `window`, it is the next one's place.
        lowest, keyword_age: As `Gate`'s, with infinity and -1 for None.
        recent: The latest token first; -1 for no token.
        forced: Forced tokens; `num_forced` is their number.
    """

    def __init__(self, ints: torch.Tensor, floats: torch.Tensor) -> None:
        self.ints, self.floats = ints, floats
        self.is_armed, self.is_fed, self.max_pauses, self.num_seen, self.has_confidence = ints[:, :5].unbind(1)
        self.num_window, self.num_pauses, self.num_resting, self.open_sections = ints[:, 5:9].unbind(1)
        self.seen_sections, self.num_in_span, self.keyword_age, self.is_aborted = ints[:, 9:13].unbind(1)
        self.num_forced, self.num_closed_loops = ints[:, 13:_NUM_INTS].unbind(1)
        end_recent, end_repeats = _NUM_INTS + LOOP_PERIOD_TOKENS, _NUM_INTS + 2 * LOOP_PERIOD_TOKENS
        self.recent, self.repeats = ints[:, _NUM_INTS:end_recent], ints[:, end_recent:end_repeats]
        self.forced = ints[:, end_repeats:]
        self.tau_pause, self.tau_abort, self.confidence, self.total, self.lowest = floats[:, :5].unbind(1)
        self.window = floats[:, 5:]

    @staticmethod
    def encode(gate: Gate | None, window_tokens: int) -> tuple[list[int], list[float]]:
        """Return the row of a gate before its first token, or of no gate."""
        if gate is None:
            return [0] * (_NUM_INTS + 2 * LOOP_PERIOD_TOKENS + _NUM_FORCED), [0.0] * (5 + window_tokens)
        window, settings = gate.window[-window_tokens:], gate.settings
        age = -1 if gate.keyword_age is None else gate.keyword_age
        ints = [1, int(settings.is_fed), settings.max_pauses, 0, 0]
        ints += [len(window), gate.num_pauses, gate.num_resting, gate.open_sections]
        ints += [gate.seen_sections, gate.num_in_span, age, int(gate.is_aborted), len(gate.forced)]
        ints += [gate.num_closed_loops]
        ints += _padded(gate.recent[::-1], LOOP_PERIOD_TOKENS, -1) + gate.repeats
        ints += _padded(gate.forced, _NUM_FORCED, 0)
        lowest = math.inf if gate.lowest is None else gate.lowest
        floats = [settings.tau_pause, settings.tau_abort, 0.0, gate.total, lowest]
        return ints, floats + window + [0.0] * (window_tokens - len(window))


def _put(field: torch.Tensor, mask: torch.Tensor, values: torch.Tensor) -> None:
    """Write the values into the field at the mask's true entries."""
    torch.where(mask, values, field, out=field)


def _padded(ids: list[int], length: int, filler: int) -> list[int]:
    return (ids + [filler] * length)[:length]


@dataclass
class _Place:
    """Place of a keyed request's state: its slot, or one of the parked rows behind the slots."""

    prompt_len: int
    row: int


class PauseV2(LogitsProcessorV2):
    """Logits processor for vLLM's V2 model runner: `Gate` for all rows at once, on the device.

    `apply` never waits for the device, as asynchronous scheduling requires. Shapes depend on the batch alone, and masks
    select the behaviour of each row. Floating-point operations follow the order of `Gate`'s, so the decisions are
    equal. Two tensors hold a few hundred bytes of state per slot. A step gathers the batch's rows, changes them and
    writes them back, in about two hundred small operations for any number of rows.

    A preempted request leaves its slot without notice and is added again later, to any slot. With a `hyper_pause_key`
    it recovers its state, from the old slot or from a parked row. Without a key, or after its parked row was dropped,
    its tokens are read again. Budget, sections, rest and loop guard are then as before. The window is empty, and the
    lowest confidence covers only later tokens. That reading takes one pass of small operations per token.

    vLLM applies bias and bans before the processors of either runner; V2 applies its penalties before them too. They
    would change the confidence, defined on raw logits, so armed requests must not use them.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse invalid extra arguments."""
        check_arguments(sampling_params)

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        if vllm_config.speculative_config is not None:
            raise ValueError("the gate does not work with speculative decoding: turn one of them off")
        if vllm_config.parallel_config.enable_batch_sharded_sampling:
            # A request could return to a slot of another rank, without its state.
            raise ValueError("the gate does not work with batch-sharded sampling: turn one of them off")
        self.req_states = req_states
        self.settings = checkpoint_settings(vllm_config)
        self.is_armed = np.zeros(req_states.max_num_reqs, dtype=np.bool_)
        if self.settings is not None:
            self._allocate(self.settings)

    def _allocate(self, settings: GateSettings) -> None:
        num_slots, device = self.req_states.max_num_reqs, self.req_states.device
        num_rows = 5 * num_slots  # the slots, and four times as many parked
        ints, floats = _Rows.encode(None, settings.window_tokens)
        self.ints = torch.zeros(num_rows, len(ints), dtype=torch.int64, device=device)
        self.floats = torch.zeros(num_rows, len(floats), dtype=torch.float64, device=device)
        # By row: its content from the next step on, as values or as the index of the row to copy.
        self.staged: dict[int, int | tuple[list[int], list[float]]] = {}
        self.num_unread: dict[int, int] = {}
        self.places: dict[str, _Place] = {}
        self.keys: dict[int, str] = {}
        self.free = list(range(num_slots, num_rows))
        self.parked: OrderedDict[str, None] = OrderedDict()

        vocab_size = max(self.req_states.vocab_size, *(token_id + 1 for token_id in settings.tags))
        effects = torch.tensor([NUM_OPEN_SETS - 1, 0, 0]).repeat(vocab_size, 1)
        for token_id, effect in settings.tags.items():
            effects[token_id] = torch.tensor(effect)
        self.effects = effects.to(device)
        self.gated = torch.tensor([mask in settings.gated for mask in range(NUM_OPEN_SETS)], device=device)
        answers = [0, NUM_OPEN_SETS - 1]  # no answer yet, and one
        closings = [
            [Gate(settings, open_sections=mask, seen_sections=seen).ids_to_answer() for mask in range(NUM_OPEN_SETS)]
            for seen in answers
        ]
        self.closings = torch.tensor([[_padded(ids, _NUM_FORCED, 0) for ids in each] for each in closings]).to(device)
        self.num_closing = torch.tensor([len(ids) for ids in closings[0]], device=device)
        loop_closings = [settings.loop_closing_ids.get(mask, -1) for mask in range(NUM_OPEN_SETS)]
        self.loop_closings = torch.tensor(loop_closings, device=device)
        self.answer_place = tuple(Section).index(Section.FINAL_ANSWER)
        # A keyword longer than the memory never matches in `Gate` either.
        keywords = [ids[::-1] for ids in settings.keyword_ids if 0 < len(ids) <= LOOP_PERIOD_TOKENS]
        self.has_keywords = bool(keywords)
        self.keywords = torch.tensor([_padded(list(ids), LOOP_PERIOD_TOKENS, -2) for ids in keywords], device=device)
        # The end tokens of a completion are banned in hidden tokens only.
        others = settings.position_ids[1:] if settings.mode is PauseMode.PARALLEL else settings.end_ids
        columns = [*dict.fromkeys((settings.open_id, settings.close_id, *others))]
        self.columns = torch.tensor(columns, device=device)
        self.span_ids = torch.tensor(settings.span_ids, device=device)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Fill a slot from the request's arguments, or from its state before a preemption."""
        settings = armed_settings(self.settings, sampling_params)
        if self.settings is None or (settings is None and not self.is_armed[req_idx]):
            return False
        extra: Mapping[str, Any] = sampling_params.extra_args or {}
        key: str | None = None if settings is None else extra.get(KEY)
        prompt_len = int(self.req_states.prompt_len.np[req_idx])
        num_output = int(self.req_states.prefill_len.np[req_idx]) - prompt_len
        source = self._claim(key, prompt_len) if num_output else self._claim(key, -1)
        self._vacate(req_idx)
        self.is_armed[req_idx] = settings is not None
        if source is not None:
            self.staged[req_idx] = source
        else:
            gate = None if settings is None else Gate.resume(settings, extra.get(STATE))
            self.staged[req_idx] = _Rows.encode(gate, self.settings.window_tokens)
            if gate is not None and num_output:
                self.num_unread[req_idx] = num_output
        if key is not None:
            self.places[key], self.keys[req_idx] = _Place(prompt_len, req_idx), key
        return settings is not None

    def _claim(self, key: str | None, prompt_len: int) -> int | tuple[list[int], list[float]] | None:
        """Remove and return the state of a keyed request, or None if it is not of this chunk.

        A session's prompt grows with every chunk; a preempted request's prompt keeps its length.
        """
        place = None if key is None else self.places.pop(key, None)
        if key is None or place is None:
            return None
        state = self.staged.get(place.row, place.row)
        if key in self.parked:
            del self.parked[key]
            self.free.append(place.row)
        else:
            del self.keys[place.row]
        return state if place.prompt_len == prompt_len else None

    def _vacate(self, slot: int) -> None:
        """Park the state of a slot with a key, because vLLM reports a preemption and an end alike."""
        self.num_unread.pop(slot, None)
        key = self.keys.pop(slot, None)
        if key is None:
            return
        if not self.free:
            oldest, _ = self.parked.popitem(last=False)
            self.free.append(self.places.pop(oldest).row)
        row = self.free.pop()
        self.staged[row] = self.staged.get(slot, slot)
        self.places[key].row = row
        self.parked[key] = None

    def apply_staged_writes(self) -> None:
        """Write the changes staged by `add_request` to the device, and read tokens without state again."""
        if self.settings is None or not self.staged:
            return
        copies = [(row, source) for row, source in self.staged.items() if isinstance(source, int)]
        writes = [(row, source) for row, source in self.staged.items() if not isinstance(source, int)]
        self.staged.clear()
        if copies:
            targets, sources = (
                self._indices([row for row, _ in copies]),
                self._indices([source for _, source in copies]),
            )
            # Read all sources before writing any row: one may be another's target.
            ints, floats = self.ints[sources], self.floats[sources]
            self.ints.index_copy_(0, targets, ints)
            self.floats.index_copy_(0, targets, floats)
        if writes:
            targets = self._indices([row for row, _ in writes])
            self.ints.index_copy_(0, targets, self._to_device([source[0] for _, source in writes], torch.int64))
            self.floats.index_copy_(0, targets, self._to_device([source[1] for _, source in writes], torch.float64))
        if self.num_unread:
            slots = self._indices(list(self.num_unread))
            rows, num_output = _Rows(self.ints[slots], self.floats[slots]), self._num_output(slots)
            for _ in range(max(self.num_unread.values())):
                self._catch_up(rows, slots, num_output)
            self.ints.index_copy_(0, slots, rows.ints)
            self.floats.index_copy_(0, slots, rows.floats)
            self.num_unread.clear()

    def _indices(self, rows: list[int]) -> torch.Tensor:
        return self._to_device(rows, torch.int64)

    def _to_device(self, values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        device = self.req_states.device
        # A copy from pinned memory does not wait; torch keeps the memory until the copy is done.
        return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Ban and force tokens in the rows of armed requests; other rows keep every bit.

        Args:
            logits: float32 [R, V], changed in place.
            ctx: The mapping from rows to slots; one to one without speculative decoding.
        """
        if self.settings is None or not self.is_armed[ctx.idx_mapping_np].any():
            return logits
        settings = self.settings
        slots = ctx.expanded_idx_mapping.long()
        rows, num_output = _Rows(self.ints[slots], self.floats[slots]), self._num_output(slots)
        # vLLM drops tokens and samples them again after a reset of its prefix cache under running requests. Those
        # tokens were pushed already.
        torch.minimum(rows.num_seen, num_output, out=rows.num_seen)
        self._catch_up(rows, slots, num_output)
        # Compute this exactly as vLLM computes its returned log-probabilities, so that their reader gets the same bits.
        best = logits.log_softmax(dim=-1, dtype=torch.float32).amax(dim=-1)
        rows.confidence.copy_(best.double().exp_())
        rows.has_confidence.fill_(1)
        is_forced, forced_ids, may_open, is_hidden = self._decide(rows)
        self.ints.index_copy_(0, slots, rows.ints)
        self.floats.index_copy_(0, slots, rows.floats)

        is_chosen = rows.is_armed.bool() & ~is_forced
        columns = self.columns
        if is_hidden is None:
            banned = torch.stack([is_chosen & ~may_open, *[is_chosen] * (len(columns) - 1)], dim=1)
        else:
            ends = [is_hidden] * (len(columns) - 2)
            banned = torch.stack([~may_open, ~is_hidden, *ends], dim=1) & is_chosen[:, None]
        values = logits[:, columns]
        if settings.acoustic_bias:
            is_biased = may_open & (rows.keyword_age >= 0)
            values[:, 0] = torch.where(is_biased, values[:, 0] + settings.acoustic_bias, values[:, 0])
        logits.index_copy_(1, columns, values.masked_fill_(banned, -math.inf))
        logits.masked_fill_(is_forced[:, None], -math.inf)
        forced_ids = torch.where(is_forced, forced_ids, 0)[:, None]
        logits.scatter_(1, forced_ids, logits.gather(1, forced_ids).masked_fill_(is_forced[:, None], 0.0))
        return logits

    def _num_output(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the number of tokens sampled so far; none during an incomplete prompt."""
        return (self.req_states.total_len.gpu[slots] - self.req_states.prompt_len.gpu[slots]).long()

    def _window_mean(self, rows: _Rows, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `Gate.window_confidence`, whether the window is full, and the confidence leaving it."""
        oldest = rows.window.gather(1, (rows.num_window % size)[:, None])[:, 0]
        oldest = torch.where(rows.num_window >= size, oldest, 0.0)
        return (rows.total - oldest + rows.confidence) / size, rows.num_window >= size - 1, oldest

    def _decide(self, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Compute `Gate.decide` for all rows.

        Returns:
            For each row: whether a token is forced, the forced token, whether a pause may be sampled, and whether the
            token is hidden (None if no row's is). An unarmed row has no forced token and no permission.
        """
        assert self.settings is not None
        settings = self.settings
        is_queued = rows.num_forced > 0
        is_in_span = ~is_queued & (rows.num_in_span > 0)
        is_free = rows.is_armed.bool() & ~is_queued & ~is_in_span & (rows.is_aborted == 0)
        is_loop, closing_ids = self._loops(rows)
        is_loop &= is_free
        is_ended = is_loop & (closing_ids >= 0)
        is_gated = is_free & ~is_loop & self.gated[rows.open_sections]
        mean, is_full, _ = self._window_mean(rows, settings.window_tokens)
        is_hopeless = is_gated & is_full & (mean <= rows.tau_abort)
        may_pause = is_gated & ~is_hopeless & (rows.num_resting == 0) & (rows.num_pauses < rows.max_pauses)
        is_pause = may_pause & is_full & (mean <= rows.tau_pause)
        # An unarmed slot has only zeros, so it has no forced tokens and no span.
        is_closed, is_opened = is_loop & ~is_ended | is_hopeless, is_queued | is_pause | is_ended
        if settings.mode is PauseMode.PARALLEL:
            is_opened |= is_in_span
            is_hidden = None
        else:
            is_spent = is_in_span & (rows.num_in_span > settings.latent_tokens)
            is_closed |= is_spent
            is_hidden = is_in_span & ~is_spent
        # Outside a span the position is 0, the pause token's.
        latent_ids = self.span_ids[rows.num_in_span.clamp(max=settings.latent_tokens - 1)]
        forced_ids = torch.where(is_closed, settings.close_id, latent_ids)
        _put(forced_ids, is_queued, rows.forced[:, 0])
        _put(forced_ids, is_ended, closing_ids)
        return is_closed | is_opened, forced_ids, may_pause & ~is_pause, is_hidden

    def _loops(self, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `Gate.is_looping` and `Gate.loop_closing_id`, -1 for None."""
        assert self.settings is not None
        closing_ids = self.loop_closings[rows.open_sections]
        is_spent = rows.num_closed_loops >= self.settings.max_closed_loops
        is_loop = rows.repeats.amax(dim=1) >= self.settings.loop_tokens
        return is_loop, closing_ids.masked_fill(is_spent, -1)

    def _catch_up(self, rows: _Rows, slots: torch.Tensor, num_output: torch.Tensor) -> None:
        """Push the next unread token of each row, if it has one."""
        all_ids = self.req_states.all_token_ids.gpu
        places = self.req_states.prompt_len.gpu[slots] + rows.num_seen
        token_ids = all_ids[slots, places.clamp_(max=all_ids.shape[1] - 1)].long()
        is_new = rows.is_armed.bool() & (rows.num_seen < num_output)
        self._push(rows, token_ids, is_new)
        rows.num_seen += is_new
        rows.has_confidence *= ~is_new

    def _push(self, rows: _Rows, token_ids: torch.Tensor, is_new: torch.Tensor) -> None:
        """Compute `Gate.push` for the rows with a new token."""
        assert self.settings is not None
        settings = self.settings
        is_queued = is_new & (rows.num_forced > 0) & (token_ids == rows.forced[:, 0])
        is_open, rest = rows.num_in_span > 0, is_new & ~is_queued
        is_latent = rest & is_open
        rest &= ~is_open
        is_begin, is_abort = rest & (token_ids == settings.open_id), rest & (token_ids == settings.close_id)
        is_sampled = rest & ~is_begin & ~is_abort

        _put(rows.forced, is_queued[:, None], rows.forced.roll(-1, dims=1))
        rows.num_forced -= is_queued.long()
        is_loop, closing_ids = self._loops(rows)
        is_ended = is_sampled & is_loop & (rows.is_aborted == 0) & (token_ids == closing_ids)
        rows.num_closed_loops += is_ended
        # A forced token has no confidence.
        rows.has_confidence *= ~is_ended
        self._note_sampled(rows, token_ids, is_sampled)

        rows.num_in_span += is_latent | is_begin
        if settings.mode is PauseMode.PARALLEL:
            rows.num_in_span *= ~((is_latent | is_begin) & (rows.num_in_span >= settings.latent_tokens))
        else:
            rows.num_in_span *= ~(is_latent & (token_ids == settings.close_id))
        rows.num_pauses += is_begin
        rows.num_resting.masked_fill_(is_begin, settings.rest_tokens)

        rows.is_aborted.masked_fill_(is_abort, 1)
        is_closing = is_abort & (rows.is_fed == 0)
        has_answer = rows.seen_sections >> self.answer_place & 1
        _put(rows.forced, is_closing[:, None], self.closings[has_answer, rows.open_sections])
        _put(rows.num_forced, is_closing, self.num_closing[rows.open_sections])
        # Last, because the code above needs the sections open before this token. A tag is never one of the tokens
        # above.
        self._note_tag(rows, token_ids, is_queued | is_sampled)

    def _note_sampled(self, rows: _Rows, token_ids: torch.Tensor, is_sampled: torch.Tensor) -> None:
        assert self.settings is not None
        size = self.settings.window_tokens
        enters = is_sampled & rows.has_confidence.bool() & self.gated[rows.open_sections]
        mean, is_full, oldest = self._window_mean(rows, size)
        _put(rows.lowest, enters & is_full & (mean < rows.lowest), mean)
        place = (rows.num_window % size)[:, None]
        entering = torch.where(enters, rows.confidence, rows.window.gather(1, place)[:, 0])
        rows.window.scatter_(1, place, entering[:, None])
        _put(rows.total, enters, rows.total - oldest + rows.confidence)
        rows.num_window += enters

        rows.num_resting -= (is_sampled & (rows.num_resting > 0)).long()
        repeats = torch.where(rows.recent == token_ids[:, None], rows.repeats + 1, 0)
        _put(rows.repeats, is_sampled[:, None], repeats)
        recent = torch.cat([token_ids[:, None], rows.recent[:, :-1]], dim=1)
        _put(rows.recent, is_sampled[:, None], recent)
        if self.has_keywords:
            is_same = (rows.recent[:, None] == self.keywords) | (self.keywords == -2)
            is_keyword = is_same.all(dim=2).any(dim=1)
            older = rows.keyword_age + 1
            age = torch.where((rows.keyword_age >= 0) & (older < KEYWORD_MEMORY_TOKENS), older, -1)
            _put(rows.keyword_age, is_sampled, age.masked_fill_(is_keyword, 0))

    def _note_tag(self, rows: _Rows, token_ids: torch.Tensor, is_noted: torch.Tensor) -> None:
        effects = self.effects[token_ids.clamp(0, self.effects.shape[0] - 1)]
        keeps, adds, needs = effects.unbind(1)
        is_noted = is_noted & ((rows.open_sections & needs) == needs)
        _put(rows.seen_sections, is_noted, rows.seen_sections | adds)
        _put(rows.open_sections, is_noted, rows.open_sections & keeps | adds)
