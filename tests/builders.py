"""Builds small checkpoints for tests: real files of the real formats, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hyper_model.checkpoint import Checkpoint, export
from hyper_model.trace import train_tokenizer
from hyper_model.weights import DEFAULT_SHARD_BYTES

# What the tokenizer learns its merges from: enough that common words are a few tokens, little enough to take no time.
TOKENIZER_TEXTS = (
    "What does the first speaker say? Who cannot come on Friday? How many people talk, and what is heard behind them?",
    'S1 woman: "please close the window" S2 man: "the train leaves at nine"',
    "rain, engine, crowd, alarm, keyboard, quiet, music and a dog barking in the background",
    "The first voice asks and the second answers. The answer is the second choice. A. one B. two C. three D. four",
)


def tiny_tokenizer() -> Tokenizer:
    """Trains a byte-level BPE tokenizer with every special token, of about 460 tokens."""
    return train_tokenizer(TOKENIZER_TEXTS, vocab_size=640)


def tiny_config(vocab_size: int, **text_fields: Any) -> dict[str, Any]:
    """Describes a Qwen2-Audio of about 0.4M parameters: encoder and decoder of 2 layers, 64 wide, 80 mel bins."""
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
            # Heads of 32: vLLM on a CPU has no attention kernel for 16, and says so only at the first request.
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            # Two whole windows, a question and a trace.
            "max_position_embeddings": 2048,
            **text_fields,
        },
    }


def random_model(config: Mapping[str, Any], *, seed: int = 0) -> Any:
    """Makes a transformers model with random weights, leaving torch's own random state as it was.

    The weights are wider than transformers' usual 0.02: with those every next token is about equally likely, and two
    different models would hardly differ in what they say.
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
    """Exports a tiny random HyPeR checkpoint: its answers are noise, everything about it is otherwise real.

    Args:
        directory: Where to; must not exist or be empty.
        seed: Of the weights.
        num_padding_rows: Rows of the embedding beyond the tokenizer's last id, such as Qwen's models have.
        manifest_fields: Laid over the default fields, such as `{"pause": {"max_pauses": 1}}`.
        dtype: A torch dtype; None keeps float32.
        max_shard_bytes: Splits the weights into several files.
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


def write_entry_points(directory: Path, commands: Mapping[str, str]) -> None:
    """Makes a directory on sys.path look like an installed package that brings `hyper` sub-commands.

    Args:
        commands: Names and where they are, such as `{"checkpoint": "hyper_model.commands:checkpoint"}`.
    """
    installed = directory / "hyper_test_commands-0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: hyper-test-commands\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in commands.items()]
    (installed / "entry_points.txt").write_text("\n".join(["[hyper.commands]", *lines, ""]))
