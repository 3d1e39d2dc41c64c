"""Checks on one card, without vLLM: the gate, the packed encoder, a Stage I step at 7B shapes, and memory.

`run.sh` starts it; docs/gpu.md has the figures. Every part prints one JSON line. A failed part does not stop the next.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import Qwen2AudioConfig, WhisperFeatureExtractor
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from hyper_model.audio_encoder import LogMel, encode
from loadtests.qwen_shapes import FULL, GIBIBYTE, SCALES, Shapes
from tests.gpu import vllm_interface
from training.policy import IGNORED, Row, adapt, freeze_encoder, pack
from training.recipes import Lora, qwen2_audio_7b_sft
from training.trainer import MasterAdamW

SAMPLE_RATE_HZ = 16_000
DURATIONS_S = (0.5, 2.0, 5.0, 10.0, 30.0)
TOLERANCE = 1.25
"""Permitted error of the packed pass in bfloat16, as a multiple of the padded pass's own."""
ADAPTERS = Lora(rank=16, alpha=32)
MEMORY_TOLERANCE = 1.5
NUM_STATES = 16 * 250
"""Encoder states of sixteen clips of 5 s."""
PROMPT_TOKENS, TRACE_TOKENS, CLIP_S = 60, 400, 10.0
TINY_TRACE_TOKENS = 40


@dataclass(frozen=True)
class Card:
    """The device of a run and its clocks.

    Attributes:
        layers: Decoder layers of the trained model.
        seen: Figures of the finished parts.
    """

    device: torch.device
    shapes: Shapes
    scale: str
    layers: int
    seen: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    @property
    def is_full(self) -> bool:
        """Return whether the shapes are 7B's."""
        return self.shapes is FULL

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        """Start a new measurement of memory."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def allocated_gib(self, *, is_peak: bool = False) -> float | None:
        """Return the device's allocated memory, or None on a CPU."""
        if self.device.type != "cuda":
            return None
        num_bytes = torch.cuda.max_memory_allocated() if is_peak else torch.cuda.memory_allocated()
        return round(num_bytes / GIBIBYTE, 3)


def noise(duration_s: float, seed: int) -> np.ndarray:
    """Return a clip of noise with a slow envelope."""
    random = np.random.default_rng(seed)
    num = round(duration_s * SAMPLE_RATE_HZ)
    envelope = 0.2 + 0.2 * np.sin(np.arange(num) / SAMPLE_RATE_HZ * 7)
    return (envelope * random.standard_normal(num)).clip(-1, 1).astype(np.float32)


def check_gate(card: Card) -> dict[str, Any]:
    """Compare the V2 gate with the pure gate on device tensors."""
    from tests.gpu import gate_check

    num_rows, num_steps = (32, 250) if card.is_full else (6, 100)
    vocab_size = card.shapes.vocab_size or 1_000
    return gate_check.check(card.device, num_rows=num_rows, num_steps=num_steps, vocab_size=vocab_size, sync=card.sync)


@torch.inference_mode()
def check_encoder(card: Card) -> dict[str, Any]:
    """Compare the packed pass in bfloat16 with the padded one, both beside the padded pass in float32."""
    shapes = card.shapes
    config = Qwen2AudioEncoderConfig(
        num_mel_bins=shapes.num_mel_bins,
        d_model=shapes.audio_width,
        encoder_layers=shapes.audio_layers,
        encoder_attention_heads=shapes.audio_heads,
        encoder_ffn_dim=shapes.audio_ffn,
        max_source_positions=shapes.num_positions,
    )
    torch.manual_seed(0)
    exact: Any = random_parameters(Qwen2AudioEncoder(config).eval(), 0.03)
    rounded: Any = Qwen2AudioEncoder(config).eval()
    exact, rounded = exact.to(card.device), rounded.to(card.device, torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    # The same weights in both, so that only the arithmetic differs.
    exact.load_state_dict(rounded.state_dict())
    clips = [noise(duration_s, seed) for seed, duration_s in enumerate(DURATIONS_S)]
    log_mel = LogMel(shapes.num_mel_bins)
    mels = [log_mel(clip) for clip in clips]
    packed_AD, lengths = encode(rounded, [mel.to(card.device) for mel in mels])
    errors: dict[str, list[float]] = {"packed": [], "padded": []}
    for clip, packed in zip(clips, packed_AD.split(lengths), strict=True):
        wanted = padded_pass(exact, clip, card.device)
        for name, found in (("packed", packed), ("padded", padded_pass(rounded, clip, card.device))):
            errors[name].append(float((found.float() - wanted).square().mean().sqrt()))
    packed_error, padded_error = max(errors["packed"]), max(errors["padded"])
    exact_AD, _ = encode(exact, [mel.to(card.device) for mel in mels])
    exact_errors = [
        float((found - padded_pass(exact, clip, card.device)).abs().max())
        for clip, found in zip(clips, exact_AD.split(lengths), strict=True)
    ]
    card.reset_peak()
    before_gib = card.allocated_gib()
    sixteen = [mels[2].to(card.device)] * 16
    encode(rounded, sixteen)
    peak_gib = card.allocated_gib(is_peak=True)
    card.sync()
    started_s = time.perf_counter()
    encode(rounded, sixteen)
    card.sync()
    return {
        "packed_rms_error": packed_error,
        "padded_rms_error": padded_error,
        "float32_max_abs_diff": max(exact_errors),
        "sixteen_5s_clips_ms": round(1_000 * (time.perf_counter() - started_s), 2),
        "sixteen_5s_clips_gib": None if peak_gib is None or before_gib is None else round(peak_gib - before_gib, 3),
        "is_met": packed_error <= TOLERANCE * padded_error and max(exact_errors) < 1e-2,
    }


def random_parameters(model: Any, std: float) -> Any:
    """Fill the matrices of a model with random numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
    return model


def padded_pass(tower: Any, samples_S: np.ndarray, device: torch.device) -> torch.Tensor:
    """Encode a clip as transformers does: padded to 30 s, with a mask."""
    dtype = tower.conv1.weight.dtype
    extractor: Any = WhisperFeatureExtractor(feature_size=tower.config.num_mel_bins)
    features = extractor(
        samples_S,
        sampling_rate=SAMPLE_RATE_HZ,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="pt",
    )
    frames = features["attention_mask"].sum(-1)
    num_states, num_tokens = (int(length) for length in tower._get_feat_extract_output_lengths(frames))
    mask = torch.zeros(1, 1, 1_500, 1_500, dtype=dtype, device=device)
    mask[..., num_states:] = float("-inf")
    mel = features["input_features"].to(device, dtype)
    return tower(mel, attention_mask=mask).last_hidden_state[0, :num_tokens].float()


def check_training(card: Card) -> dict[str, Any]:
    """Time a Stage I step of the 7B recipe with adapters: the rows of one rank of eight."""
    from training.policy import HyperPolicy

    shapes, recipe = card.shapes, qwen2_audio_7b_sft()
    trace_tokens = TRACE_TOKENS if card.is_full else TINY_TRACE_TOKENS
    card.reset_peak()
    started_s = time.perf_counter()
    policy: Any = build_policy(HyperPolicy, shapes, card)
    freeze_encoder(policy)
    weights_gib = card.allocated_gib()
    model = adapt(policy, ADAPTERS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    built_s = time.perf_counter() - started_s
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = MasterAdamW([{"params": parameters}], lr=1e-4, betas=(0.9, recipe.adam_beta2), fused=True)
    micros = micro_batches(card, recipe.batch_size // 8, recipe.rows_at_once, trace_tokens)
    num_tokens = sum(int(micro["token_ids_BT"].numel()) for micro in micros)
    losses: list[float] = []
    seconds: list[float] = []
    for _ in range(4):
        card.sync()
        started_s = time.perf_counter()
        loss = 0.0
        for micro in micros:
            scores = model(**micro)
            share = -scores.logprobs_N.mean() / len(micros)
            share.backward()
            loss += float(share)
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        card.sync()
        seconds.append(time.perf_counter() - started_s)
        losses.append(loss)
    # The first step allocates. Frozen weights need no gradient of their own: forward, once more, and the inputs' one.
    step_s = min(seconds[1:])
    num_active = shapes.num_parameters(card.layers) - shapes.vocab_size * shapes.hidden_size
    return {
        "layers": card.layers,
        "build_s": round(built_s, 1),
        "step_s": round(step_s, 4),
        "tokens_per_s": round(num_tokens / step_s),
        "tflops_per_s": round(3 * 2 * num_active * num_tokens / step_s / 1e12, 1),
        "first_loss": round(losses[0], 3),
        "last_loss": round(losses[-1], 3),
        "weights_gib": weights_gib,
        "step_peak_gib": card.allocated_gib(is_peak=True),
        "is_met": all(map(math.isfinite, losses)) and losses[-1] < losses[0],
    }


def build_policy(kind: Any, shapes: Shapes, card: Card) -> Any:
    """Build a random policy in bfloat16 on the device."""
    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": shapes.num_mel_bins,
            "d_model": shapes.audio_width,
            "encoder_layers": shapes.audio_layers,
            "encoder_attention_heads": shapes.audio_heads,
            "encoder_ffn_dim": shapes.audio_ffn,
            "max_source_positions": shapes.num_positions,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": shapes.vocab_size or 1_000,
            "hidden_size": shapes.hidden_size,
            "intermediate_size": shapes.intermediate_size,
            "num_hidden_layers": card.layers,
            "num_attention_heads": shapes.num_heads,
            "num_key_value_heads": shapes.num_heads,
            "max_position_embeddings": 8_192,
        },
        audio_token_index=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with card.device:
            torch.manual_seed(0)
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def micro_batches(card: Card, num_rows: int, rows_at_once: int, trace_tokens: int) -> list[dict[str, Any]]:
    """Return random rows with a clip each, packed as in training."""
    random = np.random.default_rng(0)
    vocab_size = card.shapes.vocab_size or 1_000
    log_mel = LogMel(card.shapes.num_mel_bins)
    clip_s = CLIP_S if card.is_full else 1.0
    batches: list[dict[str, Any]] = []
    for start in range(0, num_rows, rows_at_once):
        rows: list[Row] = []
        for place in range(rows_at_once):
            ids = random.integers(1, vocab_size, PROMPT_TOKENS + trace_tokens).tolist()
            targets = [IGNORED] * (PROMPT_TOKENS - 1) + ids[PROMPT_TOKENS:] + [IGNORED]
            rows.append(Row(ids, targets, 5, place))
        mels = [log_mel(noise(clip_s, start + place)).to(card.device) for place in range(rows_at_once)]
        batch = pack(rows, mels, pad_id=0, is_encoded=False)
        batches.append(
            {name: value.to(card.device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        )
    return batches


def check_memory(card: Card) -> dict[str, Any]:
    """Compare the memory of the finished parts with the plan of docs/gpu.md."""
    encoder, training = card.seen.get("encoder", {}), card.seen.get("training", {})
    measured = {
        "weights_gib": (training.get("weights_gib"), card.shapes.weights_gib(card.layers)),
        "encoder_gib": (encoder.get("sixteen_5s_clips_gib"), NUM_STATES * card.shapes.state_bytes() / GIBIBYTE),
    }
    figures: dict[str, Any] = {"step_peak_gib": training.get("step_peak_gib")}
    is_met = True
    for name, (found, planned) in measured.items():
        figures[name], figures[f"planned_{name}"] = found, round(planned, 3)
        # The plan has the tensors alone; the allocator rounds, and the encoder keeps its input too.
        is_met &= found is None or found <= MEMORY_TOLERANCE * planned
    return {**figures, "is_met": is_met}


PARTS: dict[str, Callable[[Card], dict[str, Any]]] = {
    "gate": check_gate,
    "encoder": check_encoder,
    "training": check_training,
    "memory": check_memory,
}


def machine(card: Card) -> dict[str, Any]:
    """Describe the machine and the planned memory."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": card.device.type, "scale": card.scale}
    found["vllm"] = "absent" if is_stand_in() else "installed"
    if card.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"card": properties.name, "card_gib": round(properties.total_memory / GIBIBYTE, 1)}
        free, total = torch.cuda.mem_get_info()
        found["context_gib"] = round((total - free - torch.cuda.memory_reserved()) / GIBIBYTE, 3)
    return found


def is_stand_in() -> bool:
    """Return whether stand-ins take vLLM's place."""
    return getattr(sys.modules.get("vllm"), "SamplingParams", None) is vllm_interface.SamplingParams


def write(part: str, figures: dict[str, Any]) -> None:
    """Print the figures of a part, and append them to $OUT/gpu.jsonl."""
    line = json.dumps({"part": part, **figures})
    print(line, flush=True)
    if out := os.environ.get("OUT"):
        with (Path(out) / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@click.command()
@click.option("--scale", type=click.Choice(list(SCALES)), default="full", help="Shapes; tiny is for a CPU.")
@click.option("--layers", type=click.IntRange(1), help="Decoder layers.  [default: 32, or 2 with tiny]")
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, help="Run only this part.")
@click.option("--without-vllm", is_flag=True, help="Use the stand-ins even if vLLM is installed.")
def main(scale: str, layers: int | None, parts: tuple[str, ...], without_vllm: bool) -> None:
    """Run the checks; exit with 1 if a part fails or misses its aim."""
    if without_vllm or importlib.util.find_spec("vllm") is None:
        vllm_interface.install()
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if scale == "full" and device.type == "cpu":
        raise click.UsageError("no GPU is visible: full shapes need one; use --scale tiny on a CPU")
    card = Card(device, SCALES[scale], scale, layers or (32 if scale == "full" else 2))
    write("machine", machine(card))
    is_met = True
    for name in parts or PARTS:
        started_s = time.perf_counter()
        try:
            figures = PARTS[name](card)
        except Exception as error:  # The next part must still run.
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {error}", "is_met": False}
        card.seen[name] = figures
        write(name, {**figures, "seconds": round(time.perf_counter() - started_s, 1)})
        is_met &= bool(figures["is_met"])
    sys.exit(int(not is_met))


if __name__ == "__main__":
    main()
