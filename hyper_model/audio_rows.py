"""Read the form of the projector's input from a model's config: rows per audio token, and layers beside the last.

This module imports no torch. Fields of hyper-small in `config.json`; plain transformers ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast


def audio_stack(config: Any) -> int:
    """Return the number of neighbouring rows (40 ms each) that one audio token joins, from a model's config.

    Qwen2-Audio joins none: its audio tokens are 40 ms long. A checkpoint whose config.json says `"audio_stack": 2` has
    tokens of 80 ms, half as many, and a projector of twice the width.

    Args:
        config: A config object of transformers, or `config.json` as a dictionary.
    """
    if isinstance(config, Mapping):
        return int(cast("Mapping[str, Any]", config).get("audio_stack", 1))
    return int(getattr(config, "audio_stack", 1))


def audio_layers(config: Any) -> tuple[int, ...]:
    """Return the tower's layers, counted from 1, with states joined to those of the last layer, from a model's config.

    Qwen2-Audio joins none. Whisper's last layer holds less of the background than its first: linear probes of the
    class reach 0.30 on the last and 0.73 on the first layer of Whisper base (docs/LOG.md).

    Args:
        config: As in `audio_stack`.
    """
    if isinstance(config, Mapping):
        return tuple(cast("Mapping[str, Any]", config).get("audio_layers", ()))
    return tuple(getattr(config, "audio_layers", ()))


def row_width(config: Any) -> int:
    """Return the width of the projector's input from a model's config.

    Args:
        config: As in `audio_stack`.
    """
    is_json = isinstance(config, Mapping)
    audio: Any = cast("Mapping[str, Any]", config)["audio_config"] if is_json else config.audio_config
    width: int = audio["d_model"] if is_json else audio.d_model
    return width * (1 + len(audio_layers(config))) * audio_stack(config)
