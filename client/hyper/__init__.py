"""The Python client of a HyPeR service: `Client`, `AsyncClient`, typed replies and events, an exception per error code.

    import hyper

    with hyper.Client("http://127.0.0.1:8000") as client:
        print(client.ask("clip.wav", "How many people speak?").answer.text)

Names are imported on first use, so `import hyper` and `hyper --help` load no HTTP library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hyper import client, errors, events, jobs, webhooks
    from hyper.client import *  # noqa: F403
    from hyper.errors import *  # noqa: F403
    from hyper.events import *  # noqa: F403
    from hyper.jobs import *  # noqa: F403
    from hyper.webhooks import *  # noqa: F403

    __all__: list[str] = []
    __all__ += client.__all__
    __all__ += errors.__all__
    __all__ += events.__all__
    __all__ += jobs.__all__
    __all__ += webhooks.__all__

_MODULES = ("errors", "events", "jobs", "webhooks", "client")


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        for module in (importlib.import_module(f"hyper.{each}") for each in _MODULES):
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module 'hyper' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(name for each in _MODULES for name in importlib.import_module(f"hyper.{each}").__all__)
