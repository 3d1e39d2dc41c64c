"""Ask a question about a clip: python examples/ask.py CLIP QUESTION [CHOICE ...]"""

import sys

import hyper


def main(clip: str, question: str, *choices: str) -> None:
    with hyper.Client() as client:
        reply = client.ask(clip, question, choices=choices)
    print("answer:", reply.answer.text)
    for choice, score in zip(choices, reply.answer.scores or [], strict=False):
        print(f"  {score:4.0%} {choice}")
    if reply.perception is not None:
        print("background:", reply.perception.environment_text)
        print("words:", reply.perception.transcript)
    for warning in reply.warnings:
        print("warning:", warning.message)


if __name__ == "__main__":
    main(*sys.argv[1:])
