"""Assembles the embedded checkpoint from the frozen encoder and a Stage I run, and exports it as a HyPeR directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from hyper_model.checkpoint import Checkpoint, export
from hyper_model.trace import TraceTokenizer
from training import sounds
from training.assets import MissingDataError
from training.encoder import load_encoder
from training.recipes import SftRecipe
from training.sft import MiniPolicy

MAX_MODEL_LEN = 2048


def export_mini(run_dir: Path, encoder_file: Path, directory: Path, *, overwrite: bool = False) -> Checkpoint:
    """Write the checkpoint that a Stage I run has reached, in bfloat16.

    Raises:
        MissingDataError: the run has not saved a state yet.
        CheckpointError: what was written does not verify.
    """
    if not (run_dir / "state.pt").exists():
        raise MissingDataError(f"no trained state in {run_dir}: train first (make train)")
    recipe = SftRecipe(**json.loads((run_dir / "recipe.json").read_text(encoding="utf-8")))
    tokenizer = TraceTokenizer.from_file(run_dir / "tokenizer.json")
    state = torch.load(run_dir / "state.pt", weights_only=True)
    policy = MiniPolicy(recipe, tokenizer.vocab_size)
    policy.load_state_dict(state["policy"], strict=True)
    encoder = load_encoder(encoder_file)
    tensors = {f"audio_tower.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors |= {f"multi_modal_projector.linear.{name}": t for name, t in policy.projector.state_dict().items()}
    tensors |= {f"language_model.{name}": tensor for name, tensor in policy.decoder.state_dict().items()}
    config = {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_config": encoder.config.to_dict(),
        "text_config": policy.decoder.config.to_dict(),
    }
    return export(
        directory,
        state_dict=tensors,
        config=config,
        tokenizer_json=run_dir / "tokenizer.json",
        dtype=torch.bfloat16,
        overwrite=overwrite,
        manifest_fields={
            "name": "hyper-mini",
            "base_model": "Whisper tiny.en encoder (frozen) + Qwen2 decoder trained from scratch",
            "recipe": json.dumps(asdict(recipe) | {"trained_steps": state["step"]}, sort_keys=True),
            "data_card": "README.md",
            "environment_labels": [*sounds.labels(), sounds.QUIET, sounds.BACKGROUND_SPEECH],
            "max_model_len": MAX_MODEL_LEN,
            "trace": {"answer_style": "text"},
            # Training holds latent spans; a gate that opens them needs thresholds, which calibrating sets.
            "pause": {"mode": "parallel", "latent_tokens": recipe.latent_tokens, "max_pauses": 0},
        },
    )
