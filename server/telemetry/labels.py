"""Label values of metrics and spans: closed sets, so that the number of time series is bounded."""

from __future__ import annotations

from typing import Literal, get_args

Phase = Literal["upload", "decode", "queue", "generate", "done"]
"""How far a request has come."""

AbortedBy = Literal["client", "deadline", "shutdown"]
"""Why a request ended early."""

StageBeforeEngine = Literal["receive", "validate", "prompt", "decode_wait", "decode", "inspect"]
StageInEngine = Literal["queue", "first_token", "generate", "score", "serialize"]
StagePart = Literal["features", "engine_queue", "prefill", "parse"]
Stage = StageBeforeEngine | StageInEngine | StagePart
"""One stage of a request, in order. A part lies inside another stage: the first three in `first_token`, and `parse` in
`generate`; so does `serialize` in a stream."""

STAGES: tuple[str, ...] = (*get_args(StageBeforeEngine), *get_args(StageInEngine), *get_args(StagePart))

WorkerFailure = Literal["late", "died", "invalid_reply", "helper"]
"""Why a decoder worker returned nothing usable: time limit, death, an invalid reply, or the whole helper was lost."""

FormFailure = Literal["malformed", "weak", "trailing_text"]
"""How a trace broke the form: its format (`TraceFormat`), or text after its end."""
