"""Print a trace while the model writes it: python examples/stream.py CLIP QUESTION"""

import sys

import hyper


def main(clip: str, question: str) -> None:
    with hyper.Client() as client, client.ask(clip, question, stream=True) as events:
        for event in events:
            match event:
                case hyper.SectionStart(section):
                    print(f"\n{section}: ", end="")
                case hyper.SectionDelta(_, text):
                    print(text, end="", flush=True)
                case hyper.Pause(_, latent_tokens):
                    print(f"[pause of {latent_tokens} tokens]", end="")
                case hyper.AnswerDone(answer):
                    print(f"\n\nanswer: {answer.text}")
                case _:
                    pass
    print(f"{events.reply.usage.completion_tokens} tokens in {events.reply.timings_ms.total:.0f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
