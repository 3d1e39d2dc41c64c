"""Properties of whole-file writes and checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from hyper_model.files import replacing, sha256_of, write_whole


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old ü\n")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    write_whole(path, "ü")
    assert path.read_text(encoding="utf-8") == "ü"


def test_an_error_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(RuntimeError, match="half"), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError("half way")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "old"


def test_a_checksum_is_of_the_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5_000
    write_whole(tmp_path / "a", content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
