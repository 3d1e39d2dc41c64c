"""Discovery of an ffmpeg program, used to encode synthesized training audio.

Clips are decoded without it (`hyper_model.libav`).
"""

from __future__ import annotations

import shutil
from functools import cache
from typing import Any, cast

from hyper_model.errors import HyperError


@cache
def find_ffmpeg() -> str:
    """Return the path of `ffmpeg` from PATH (patched by the system), else the one of imageio-ffmpeg.

    Raises:
        HyperError: If neither exists.
    """
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg  # pyright: ignore[reportMissingTypeStubs]

        return cast(str, cast(Any, imageio_ffmpeg).get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        raise HyperError("ffmpeg is missing: put it on PATH or install the package imageio-ffmpeg.") from None
