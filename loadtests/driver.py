"""Keeps a fixed number of clients busy until every request is answered.

A closed loop: a client sends its next request when the last one ended, so the load falls when the service slows down.
That is right for a smoke test and wrong for overload, which needs arrivals that do not wait.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import httpx

from loadtests.client import Outcome, ask

CLIP_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".webm"})
QUESTIONS = (
    "What is in the background?",
    "How many people speak?",
    "What is said?",
    "Which sounds can be heard, and in what order?",
)


def find_clips(directory: Path) -> list[Path]:
    """Returns the directory's audio files in order of name.

    Raises:
        FileNotFoundError: There are none.
    """
    clips = sorted(path for path in directory.iterdir() if path.suffix.lower() in CLIP_SUFFIXES)
    if not clips:
        raise FileNotFoundError(f"no audio file in {directory} ({', '.join(sorted(CLIP_SUFFIXES))})")
    return clips


async def run_closed_loop(
    url: str, clips: list[Path], *, num_clients: int, num_requests: int, timeout_s: float
) -> list[Outcome]:
    """Sends `num_requests`, at most `num_clients` at a time, each clip once with one question, then with the next.

    A pair comes again only after all others, so that caches help no more than they help real users.
    """
    pairs = itertools.cycle(itertools.product(QUESTIONS, clips))
    work = itertools.islice(pairs, num_requests)
    limits = httpx.Limits(max_connections=num_clients, max_keepalive_connections=num_clients)
    async with httpx.AsyncClient(base_url=url, timeout=timeout_s, limits=limits) as client:

        async def one_client() -> list[Outcome]:
            return [await ask(client, clip, question) for question, clip in work]

        outcomes = await asyncio.gather(*(one_client() for _ in range(num_clients)))
    return list(itertools.chain.from_iterable(outcomes))
