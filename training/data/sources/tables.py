"""Tables of the sources, in TOML files beside this module."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any


def read_table(name: str) -> dict[str, Any]:
    """Return the content of `NAME.toml`, in the order of the file: draws depend on it."""
    return tomllib.loads(files("training.data.sources").joinpath(f"{name}.toml").read_text(encoding="utf-8"))
