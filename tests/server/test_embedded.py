"""Choice of the checkpoint: configured, composed or embedded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hyper_model.compose import PARTS_FILE, untrained, write_parts
from hyper_model.errors import CheckpointError
from server import embedded
from server.app import create_app
from server.embedded import choose_checkpoint
from server.settings import Settings
from tests.gguf_file import compose_tiny


def test_the_embedded_checkpoint_is_served_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_checkpoint(Settings()).manifest.name == "hyper-mini"
    # An installed package contains no checkpoint.
    monkeypatch.setattr(embedded, "EMBEDDED_CHECKPOINT", Path("nowhere"))
    with pytest.raises(CheckpointError, match="HYPER_CHECKPOINT"):
        create_app(Settings())


def test_configured_parts_are_composed_into_the_cache_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_parts(tmp_path / "parts", {}, name="tiny", audio_stack=2, lora_scale=1.0)
    composed = compose_tiny(untrained("tiny", 2), tmp_path, width=32)
    calls: list[str] = []

    def compose(parts: object, destination: Path, **_: object) -> object:
        calls.append(destination.name)
        shutil.copytree(composed.path, destination)
        return composed

    monkeypatch.setenv("HYPER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hyper_model.compose.compose", compose)
    assert (tmp_path / "parts" / PARTS_FILE).is_file()
    for _ in range(2):
        assert choose_checkpoint(Settings(checkpoint=tmp_path / "parts")).manifest.name == "tiny"
    assert len(calls) == 1
