"""Small checkpoints for tests: real files in real formats, with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hyper_model.answering import AnswerResult
from hyper_model.checkpoint import Checkpoint, export
from hyper_model.pause import GateReport
from hyper_model.trace import PauseMode, train_tokenizer
from hyper_model.trace_parser import parse
from hyper_model.weights import DEFAULT_SHARD_BYTES

# Training texts of the tokenizer: long enough to make common words short, short enough to train fast.
TOKENIZER_TEXTS = (
    "What does the first speaker say? Who cannot come on Friday? How many people talk, and what is heard behind them?",
    'S1 woman: "please close the window" S2 man: "the train leaves at nine"',
    "rain, engine, crowd, alarm, keyboard, quiet, music and a dog barking in the background",
    "The first voice asks and the second answers. The answer is the second choice. A. one B. two C. three D. four",
)


def tiny_tokenizer() -> Tokenizer:
    """Train a byte-level BPE tokenizer of about 460 tokens, with every special token."""
    return train_tokenizer(TOKENIZER_TEXTS, vocab_size=640)


def tiny_config(vocab_size: int, **text_fields: Any) -> dict[str, Any]:
    """Return a Qwen2-Audio config of about 0.4M parameters: 2 + 2 layers, 64 wide, 80 mel bins."""
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": "qwen2_audio",
        "audio_token_index": 0,
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 80,
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "max_source_positions": 1500,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            # Heads of 32: vLLM on a CPU has no attention kernel for 16, and fails only at the first request.
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            # Room for two full windows, a question and a trace.
            "max_position_embeddings": 2048,
            **text_fields,
        },
    }


def random_model(config: Mapping[str, Any], *, seed: int = 0) -> Any:
    """Build a transformers model with random weights, without changing torch's random state.

    The weights are wider than transformers' usual 0.02. With the usual width all next tokens are about equally likely,
    so two models would give almost the same output.
    """
    import torch
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig.from_dict(dict(config))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.1)
    return model


def build_random_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    name: str = "random-tiny",
    num_padding_rows: int = 0,
    manifest_fields: Mapping[str, Any] | None = None,
    dtype: Any = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Checkpoint:
    """Export a tiny HyPeR checkpoint with random weights; everything but its answers is realistic.

    Args:
        directory: The new directory; must be missing or empty.
        seed: Seed of the weights.
        name: The checkpoint's name.
        num_padding_rows: Rows of the embedding beyond the tokenizer's last id, as in Qwen's models.
        manifest_fields: Fields to replace defaults, such as `{"pause": {"max_pauses": 1}}`.
        dtype: A torch dtype; None keeps float32.
        max_shard_bytes: Size of a weight file.
    """
    tokenizer = tiny_tokenizer()
    config = tiny_config(tokenizer.get_vocab_size() + num_padding_rows)
    fields = {
        "name": name,
        "base_model": "none: random weights",
        "recipe": "tests.builders",
        "environment_labels": ["rain", "engine"],
        **(manifest_fields or {}),
    }
    return export(
        directory,
        state_dict=random_model(config, seed=seed).state_dict(),
        config=config,
        tokenizer_json=tokenizer.to_str(),
        manifest_fields=fields,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def answer_result(checkpoint: Checkpoint, token_ids: Sequence[int]) -> AnswerResult:
    """Return the answer of an open question with this completion, as the answering procedure would."""
    pause = checkpoint.manifest.pause
    mode, latent_tokens = PauseMode(pause.mode), pause.latent_tokens
    parsed = parse(token_ids, checkpoint.tokenizer, pause_mode=mode, latent_tokens=latent_tokens)
    return AnswerResult(
        text=parsed.answer_text or "",
        choice_index=None,
        scores=(),
        parsed=parsed,
        token_ids=tuple(token_ids),
        num_completion_tokens=len(token_ids),
        num_pauses=len(parsed.pauses),
        num_pause_tokens=sum(seen.num_latent for seen in parsed.pauses),
        report=GateReport(),
    )


def write_entry_points(directory: Path, commands: Mapping[str, str]) -> None:
    """Make a directory on sys.path look like an installed package with `hyper` sub-commands.

    Args:
        directory: The directory.
        commands: Targets by name, such as `{"checkpoint": "hyper_model.commands:checkpoint"}`.
    """
    installed = directory / "hyper_test_commands-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: hyper-test-commands\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in commands.items()]
    (installed / "entry_points.txt").write_text("\n".join(["[hyper.commands]", *lines, ""]))
