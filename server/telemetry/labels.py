"""Label values of metrics and spans, as closed sets to bound the number of time series."""

from __future__ import annotations

from typing import Literal, get_args

Priority = Literal["interactive", "batch"]
"""Class of a request in every queue."""

Phase = Literal["upload", "decode", "queue", "generate", "done"]
"""Progress of a request."""

AbortedBy = Literal["client", "deadline", "shutdown"]
"""Cause of a request's early end."""

StageBeforeEngine = Literal["receive", "validate", "prompt", "decode_wait", "decode", "inspect"]
StageInEngine = Literal["queue", "first_token", "generate", "score", "serialize"]
StagePart = Literal["features", "engine_queue", "prefill", "parse"]
Stage = StageBeforeEngine | StageInEngine | StagePart
"""One stage of a request, in order.

A part lies inside another stage: the first three in `first_token`, and `parse` in `generate`. In a stream, `serialize`
lies in `generate` too.
"""

STAGES: tuple[str, ...] = (*get_args(StageBeforeEngine), *get_args(StageInEngine), *get_args(StagePart))

WorkerFailure = Literal["late", "died", "invalid_reply", "helper", "odd_file", "out_of_memory"]
"""Cause of a missing result from a decoder worker.

A time limit, a death by a signal, an invalid reply, or loss of the whole helper may be an attack. A worker that ends in
order and reports an unexpected exception (`odd_file`) or a lack of memory has met a file that nobody thought of.
"""

FormFailure = Literal["malformed", "weak", "trailing_text"]
"""Fault in a trace's form: its format (`TraceFormat`), or text after its end."""

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
"""Status of a job."""
