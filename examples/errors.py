"""Handle refusals: python examples/errors.py CLIP QUESTION"""

import sys

import hyper


def main(clip: str, question: str) -> None:
    with hyper.Client(max_retries=3) as client:
        try:
            print(client.ask(clip, question, timeout_ms=20_000).answer.text)
        except hyper.AudioTooLongError as error:
            print(f"The clip has {error.actual} s; the limit is {error.limit:g} s.")
        except hyper.DeadlineExceededError as error:
            print("Too late. Trace so far:", (error.partial or {}).get("trace", {}).get("raw"))
        except hyper.RateLimitError as error:
            print(f"Over the quota; try again in {error.retry_after_s:g} s.")
        except hyper.ServiceError as error:
            print(f"{error.code}: {error}")
        except hyper.ConnectionFailedError as error:
            print(f"No service: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
