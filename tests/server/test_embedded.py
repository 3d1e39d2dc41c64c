"""Choice of the checkpoint: configured, composed, embedded, or the fallback."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from hyper_model.compose import PARTS_FILE, untrained, write_parts
from hyper_model.errors import CheckpointError
from server import embedded
from server.app import create_app
from server.embedded import EMBEDDED_CHECKPOINT, choose_checkpoint
from server.settings import Settings
from tests.gguf_file import compose_tiny

PARTS = EMBEDDED_CHECKPOINT.parent / "hyper-small"


def test_hyper_mini_is_served_without_a_preferred_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PREFERRED_PARTS", None)
    chosen = choose_checkpoint(Settings())
    assert (chosen.checkpoint.manifest.name, chosen.fallback_reason) == ("hyper-mini", None)


def test_a_service_without_any_checkpoint_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PREFERRED_PARTS", None)
    # An installed package contains no checkpoint.
    monkeypatch.setattr(embedded, "EMBEDDED_CHECKPOINT", Path("nowhere"))
    with pytest.raises(CheckpointError, match="HYPER_CHECKPOINT"):
        create_app(Settings())


def test_a_service_falls_back_to_hyper_mini_and_reports_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(PARTS, tmp_path / "hyper-small")
    (tmp_path / "hyper-small/parts.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(embedded, "PREFERRED_PARTS", tmp_path / "hyper-small")
    with caplog.at_level(logging.WARNING, "hyper.server"):
        chosen = choose_checkpoint(Settings())
    assert chosen.checkpoint.manifest.name == "hyper-mini"
    assert "using hyper-mini: hyper-small cannot be composed" in caplog.text
    assert chosen.fallback_reason is not None and str(tmp_path) not in chosen.fallback_reason


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
        chosen = choose_checkpoint(Settings(checkpoint=tmp_path / "parts"))
        assert chosen.checkpoint.manifest.name == "tiny"
    assert len(calls) == 1
