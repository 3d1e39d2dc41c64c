"""Ask one question about many clips at once: python examples/many_clips.py QUESTION CLIP ..."""

import asyncio
import sys

import hyper

NUM_AT_ONCE = 8


async def main(question: str, *clips: str) -> None:
    slots = asyncio.Semaphore(NUM_AT_ONCE)
    async with hyper.AsyncClient(max_retries=5) as client:

        async def ask(clip: str) -> str:
            async with slots:
                try:
                    return (await client.ask(clip, question, priority="batch")).answer.text
                except hyper.AudioError as error:
                    return f"no answer: {error.message}"

        for clip, answer in zip(clips, await asyncio.gather(*map(ask, clips)), strict=True):
            print(f"{clip}: {answer}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
