"""Finds an ffmpeg program, to encode what training synthesizes. Clips are decoded without one (`hyper_model.libav`)."""

from __future__ import annotations

import shutil
from functools import cache
from typing import Any, cast

from hyper_model.errors import HyperError


@cache
def find_ffmpeg() -> str:
    """Finds `ffmpeg` on PATH (which the system keeps patched), else the one inside imageio-ffmpeg.

    Raises:
        HyperError: There is neither.
    """
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg  # pyright: ignore[reportMissingTypeStubs]

        return cast(str, cast(Any, imageio_ffmpeg).get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise HyperError("There is no ffmpeg: put it on PATH or install the package imageio-ffmpeg.") from None
