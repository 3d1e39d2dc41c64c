"""The service serves int8 weights if the settings require them, or if they are faster on this processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from hyper_model import int8_gain
from hyper_model.checkpoint import Checkpoint, open_checkpoint
from hyper_model.errors import CheckpointError
from hyper_model.int8_gain import Gain, estimate, gain_of, has_int8_products, product_shapes
from server import quantization
from server.quantization import choose_weights
from server.settings import Settings
from tests.builders import build_random_checkpoint


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A checkpoint with a compared accuracy, and an empty cache."""
    monkeypatch.setattr(quantization, "COMPARED", frozenset({"hyper-small"}))
    monkeypatch.setenv("HYPER_CACHE", str(tmp_path / "cache"))
    return build_random_checkpoint(tmp_path / "model", name="hyper-small")


def put_gain(monkeypatch: pytest.MonkeyPatch, gain: Gain | None) -> None:
    """Replace the measurement, which depends on the processor of the test."""
    monkeypatch.setattr(quantization, "has_int8_products", lambda: True)
    monkeypatch.setattr(quantization, "gain_of", lambda checkpoint, cache: gain)


def test_forced_int8_weights_are_written_once(ours: Checkpoint, tmp_path: Path) -> None:
    settings = Settings(quantize="on")
    first, second = choose_weights(settings, ours), choose_weights(settings, ours)
    assert first.manifest.quantization == "w8a8" and first.path.parent == tmp_path / "cache"
    assert first.manifest_sha256 == second.manifest_sha256
    assert choose_weights(settings, first) is first, "int8 weights are served as they are"


def test_damaged_int8_weights_are_written_anew(ours: Checkpoint) -> None:
    settings = Settings(quantize="on")
    path = choose_weights(settings, ours).path
    (path / "config.json").write_text("{}")
    assert choose_weights(settings, ours).path == path
    open_checkpoint(path)


def test_float_weights_are_served_without_int8(ours: Checkpoint, tmp_path: Path) -> None:
    assert choose_weights(Settings(quantize="off"), ours) is ours
    assert choose_weights(Settings(quantize="on", engine="scripted"), ours) is ours
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("gain", "form"), [(Gain(20, 10, 1.4), "w8a8"), (Gain(1, 1, 1.0), None), (None, None)])
def test_our_checkpoint_is_int8_where_that_is_faster(
    ours: Checkpoint, monkeypatch: pytest.MonkeyPatch, gain: Gain | None, form: str | None
) -> None:
    put_gain(monkeypatch, gain)
    assert choose_weights(Settings(quantize="auto"), ours).manifest.quantization == form


def test_another_checkpoint_stays_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gain(monkeypatch, Gain(20, 10, 1.4))
    theirs = build_random_checkpoint(tmp_path / "model", name="theirs")
    assert choose_weights(Settings(quantize="auto"), theirs) is theirs


def test_a_processor_without_int8_products_is_not_measured(ours: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "has_int8_products", lambda: False)
    monkeypatch.setattr(quantization, "gain_of", lambda *_: pytest.fail("measured"))
    assert choose_weights(Settings(quantize="auto"), ours) is ours


def test_an_unwritable_cache_stops_only_forced_int8(
    ours: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_gain(monkeypatch, Gain(20, 10, 1.4))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYPER_CACHE", str(tmp_path / "file/cache"))
    assert choose_weights(Settings(quantize="auto"), ours) is ours
    with pytest.raises(CheckpointError, match="cannot be written"):
        choose_weights(Settings(quantize="on"), ours)


@pytest.mark.parametrize(
    ("flags", "has"),
    [("flags : avx2 avx512_vnni fma", True), ("Features : fp asimddp", True), ("flags : avx2 avx512_bf16", False)],
)
def test_int8_products_are_read_from_the_processor(tmp_path: Path, flags: str, has: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name : x\n{flags}\n")
    assert has_int8_products(tmp_path / "cpuinfo") is has
    assert not has_int8_products(tmp_path / "absent")


def test_a_gain_counts_the_other_work_of_a_step() -> None:
    # Seven products per layer and the head.
    none, large = estimate(1.0, 1.0, 36), estimate(20.0, 10.0, 211)
    assert none.speedup == 1.0
    assert 1.4 < large.speedup < 2.0


def test_the_gain_is_measured_with_the_engines_kernels_and_kept(
    ours: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_gain, "TIMEOUT_S", 900.0)
    assert len(product_shapes(ours.path)) == 15
    measured = gain_of(ours.path, tmp_path / "cache")
    assert measured is not None and measured.float_ms > 0 and measured.int8_ms > 0
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text('{"float_ms": 3, "int8_ms": 2, "speedup": 1.25}')
    assert gain_of(ours.path, tmp_path / "cache") == Gain(3, 2, 1.25)
    kept.write_text("damaged")
    again = gain_of(ours.path, tmp_path / "cache")
    assert again is not None and again != Gain(3, 2, 1.25)


def test_a_failed_measurement_has_no_gain(ours: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_gain.sys, "executable", "/absent/python")
    assert gain_of(ours.path, tmp_path / "cache") is None
