"""The V2 gate on a device beside the pure gate, step for step."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hyper_model import pause_vllm
from hyper_model.pause import Gate, GateSettings
from hyper_model.trace import PauseMode, TraceTokenizer
from tests.builders import build_random_checkpoint

MAX_LEN = 1_200


class GateRun:
    """Requests with a gate on the device and a pure gate each.

    Args:
        vocab_size: Width of the logits; at least the tokenizer's.
    """

    def __init__(self, mode: str, num_rows: int, vocab_size: int, device: torch.device, seed: int) -> None:
        settings, self.tokenizer = gate_settings(mode)
        self.chance, self.device = random.Random(f"{mode}/{seed}"), device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.vocab_size = max(vocab_size, self.tokenizer.vocab_size)
        self.states = request_states(num_rows, self.vocab_size, device)
        self.gates = [Gate(settings.with_budget(self.chance.randint(0, 3))) for _ in range(num_rows)]
        self.prompt_len = 4
        pause_vllm.checkpoint_settings = lambda _: settings
        self.processor: Any = pause_vllm.PauseV2(engine_config(num_rows), self.states)
        self.tag_ids = [tag_id for ids in self.tokenizer.tag_ids.values() for tag_id in ids]
        self.words = self.tokenizer.encode_text("abcdefgh")
        self.slots = self.chance.sample(range(num_rows), num_rows)
        for slot, gate in zip(self.slots, self.gates, strict=True):
            for buffer in (self.states.prompt_len, self.states.prefill_len, self.states.total_len):
                buffer.np[slot] = self.prompt_len
                buffer.gpu[slot] = self.prompt_len
            params = pause_vllm.SamplingParams(
                max_tokens=MAX_LEN, extra_args=pause_vllm.arguments(gate, f"request-{slot}")
            )
            assert self.processor.add_request(slot, params)
        self.num_pauses = self.num_aborts = self.num_wrong = 0

    def step(self) -> None:
        """Run one step on the device, compare every row with the pure gate, and sample."""
        scale = torch.tensor([self.chance.choice([0.2, 2.0, 8.0, 16.0]) for _ in self.gates], device=self.device)
        raw = torch.randn(len(self.gates), self.vocab_size, generator=self.generator, device=self.device)
        raw *= scale[:, None]
        self.processor.apply_staged_writes()
        found = self.processor.apply(raw.clone(), context(self.slots, self.device))
        # On the device, so that both gates get the same bits.
        best = raw.log_softmax(-1, dtype=torch.float32).amax(-1).tolist()
        found, wanted = found.cpu(), raw.cpu()
        for row, gate in enumerate(self.gates):
            decision = gate.decide(math.exp(best[row]))
            if decision.forced_id is not None:
                wanted[row] = -math.inf
                wanted[row, decision.forced_id] = 0.0
            else:
                if decision.is_biased:
                    wanted[row, gate.settings.open_id] += gate.settings.acoustic_bias
                wanted[row, list(decision.banned_ids)] = -math.inf
        self.num_wrong += int((found != wanted).any(-1).sum())
        for row, gate in enumerate(self.gates):
            self._sample(row, gate, found, math.exp(best[row]))

    def _sample(self, row: int, gate: Gate, found: torch.Tensor, confidence: float) -> None:
        kind = self.chance.random()
        choice = self.chance.choice(self.tag_ids if kind < 0.2 else self.words)
        if found[row, choice].item() == -math.inf:
            choice = int(found[row].argmax())
        slot = self.slots[row]
        place = int(self.states.total_len.np[slot])
        self.states.all_token_ids.gpu[slot, place] = choice
        self.states.total_len.np[slot] += 1
        self.states.total_len.gpu[slot] += 1
        was_aborted, before = gate.is_aborted, gate.num_pauses
        gate.push(choice, confidence)
        self.num_pauses += gate.num_pauses - before
        self.num_aborts += gate.is_aborted and not was_aborted


def gate_settings(mode: str) -> tuple[GateSettings, TraceTokenizer]:
    """Return a gate that pauses and aborts often."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = build_random_checkpoint(Path(folder) / "gate")
    fields = {"mode": mode, "window_tokens": 3, "rest_tokens": 2, "latent_tokens": 4, "loop_tokens": 16}
    pause = checkpoint.manifest.pause.model_copy(update={**fields, "acoustic_bias": 2.0, "max_pauses": 3})
    found = GateSettings.of(checkpoint.manifest.model_copy(update={"pause": pause}), checkpoint.tokenizer)
    assert found is not None
    words = checkpoint.tokenizer.encode_text("ab")
    return replace(found, tau_pause=0.5, tau_abort=0.02, keyword_ids=(tuple(words),)), checkpoint.tokenizer


def engine_config(num_rows: int) -> Any:
    """Return the part of vLLM's configuration read by the gate."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model=""),
        scheduler_config=SimpleNamespace(max_num_seqs=num_rows),
        parallel_config=SimpleNamespace(enable_batch_sharded_sampling=False),
        speculative_config=None,
    )


def request_states(num_rows: int, vocab_size: int, device: torch.device) -> Any:
    """Return the V2 runner's buffers: one side on the device, one in numpy."""

    def both() -> SimpleNamespace:
        return SimpleNamespace(
            gpu=torch.zeros(num_rows, dtype=torch.int32, device=device), np=np.zeros(num_rows, np.int32)
        )

    return SimpleNamespace(
        device=device,
        max_num_reqs=num_rows,
        vocab_size=vocab_size,
        all_token_ids=SimpleNamespace(gpu=torch.zeros(num_rows, MAX_LEN, dtype=torch.int32, device=device)),
        prompt_len=both(),
        prefill_len=both(),
        total_len=both(),
    )


def context(slots: list[int], device: torch.device) -> Any:
    """Return the layout of a step with one row per request."""
    mapping = torch.tensor(slots, dtype=torch.int32, device=device)
    nothing = torch.zeros(len(slots), dtype=torch.int32, device=device)
    return pause_vllm.LogitsContext(
        expanded_idx_mapping=mapping,
        idx_mapping=mapping,
        idx_mapping_np=np.array(slots, dtype=np.int32),
        expanded_local_pos=nothing,
        input_ids=nothing,
        pos=nothing,
        seq_lens_upper_bound_np=np.zeros(len(slots), dtype=np.int32),
    )


def check(device: torch.device, *, num_rows: int, num_steps: int, vocab_size: int, sync: Callable[[], None]) -> Any:
    """Compare both gates in every mode, and time a step of the device's gate."""
    figures: dict[str, Any] = {"rows": 0, "wrong_rows": 0, "pauses": 0, "aborts": 0}
    for mode in (PauseMode.PARALLEL.value, PauseMode.SAMPLED.value):
        run = GateRun(mode, num_rows, 0, device, seed=1)
        for _ in range(num_steps):
            run.step()
        figures["rows"] += num_rows * num_steps
        figures["wrong_rows"] += run.num_wrong
        figures["pauses"] += run.num_pauses
        figures["aborts"] += run.num_aborts
    figures |= time_step(device, num_rows, vocab_size, sync)
    figures["is_met"] = figures["wrong_rows"] == 0 and figures["pauses"] > 0 and figures["aborts"] > 0
    return figures


def time_step(device: torch.device, num_rows: int, vocab_size: int, sync: Callable[[], None]) -> dict[str, float]:
    """Return the milliseconds of a step of the gate, and of one log-softmax over the same logits."""
    run = GateRun("parallel", num_rows, vocab_size, device, seed=2)
    logits = torch.randn(num_rows, run.vocab_size, device=device)
    layout = context(run.slots, device)
    run.processor.apply_staged_writes()

    def gate() -> None:
        run.processor.apply(logits, layout)

    def softmax() -> None:
        logits.log_softmax(-1, dtype=torch.float32).amax(-1)

    return {"gate_step_ms": milliseconds(gate, sync), "log_softmax_ms": milliseconds(softmax, sync)}


def milliseconds(work: Callable[[], None], sync: Callable[[], None], rounds: int = 20) -> float:
    """Return the mean time of a call."""
    work()
    sync()
    started_s = time.perf_counter()
    for _ in range(rounds):
        work()
    sync()
    return round(1_000 * (time.perf_counter() - started_s) / rounds, 3)
