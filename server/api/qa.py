"""The door: reads requests, checks them against the model and the limits, and writes replies and event streams."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import time
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from hyper_model.audio import FORMATS, SAMPLE_RATE_HZ, Waveform, require_single_window
from hyper_model.errors import AudioTooLongError
from hyper_model.trace import MAX_CHOICE_CHARS, MAX_CHOICES, MAX_QUESTION_CHARS, Section, build_prompt
from server.answering import ANSWER_TOKENS, CLOSING_TOKENS, QaRun, Question
from server.api.openapi import EVERYWHERE, METRICS_RESPONSES, QA_PATH, QA_RESPONSES
from server.api.types import (
    CheckpointInfo,
    DecodingInfo,
    InfoReply,
    LimitsInfo,
    PauseInfo,
    QaBody,
    QaOptions,
    QaReply,
    Readiness,
)
from server.errors import RequestError, to_request_error
from server.pause_budget import Budget
from server.replies import record_metrics
from server.request_context import RequestContext, StageTime
from server.service import COME_AGAIN, Service
from server.telemetry.metrics import version

logger = logging.getLogger("hyper.server")
router = APIRouter(responses=EVERYWHERE)

# More than one question can need, so that what is wrong can be named; the totals are bounded by the body limit.
MAX_FIELDS = 128
MAX_FILES = 2
MAX_FIELD_BYTES = 64 * 1024
MAX_KEYS = 64
MAX_LISTED_CHOICES = 128

# The names of UTF-8 in a form's content type. Other codecs are not for strangers to choose: one takes quadratic time.
CHARSETS = (b"utf-8", b"utf8")

ASCII_WHITE_SPACE = b" \t\r\n\v\f"

# What a client that has stopped reading may take to accept the last words of a stream; less than the server gives its
# connections when it closes.
LAST_WORDS_TIMEOUT_S = 3.0

Options = TypeVar("Options", bound=QaOptions)


@router.post(QA_PATH, summary="Ask a question about a clip", response_model=QaReply, responses=QA_RESPONSES)
async def audio_qa(request: Request) -> Response:
    """Answers one question about one clip, with what the model heard and how it reasoned.

    With `stream=true` the reply is a stream of server-sent events: `section.start`, `section.delta`, `section.end`,
    `pause`, `answer.delta`, `answer.done`, `usage`, `done` (the whole reply), or `error`.
    """
    service: Service = request.app.state.service
    context = RequestContext.of(request.scope)
    with contextlib.ExitStack() as stack:
        stack.enter_context(service.admit(context))
        try:
            options, data = await read_question(request, service)
        except ClientDisconnect:
            service.metrics.aborted.labels("upload", "client").inc()
            raise
        finally:
            context.record("receive", context.started_s, context.received_s)
            if context.received_s is not None:
                context.record("validate", context.received_s)
        timeout_ms = options.timeout_ms or service.settings.default_timeout_ms
        deadline_s = context.started_s + timeout_ms / 1000
        service.require_time(context, deadline_s)
        context.phase = "decode"
        work = prepare(service, context, options, data, deadline_s)
        run = await service.run_until_disconnect(work, context, request.receive, deadline_s)
        if options.stream:
            return EventStream(service, context, run, deadline_s, stack.pop_all())
        try:
            reply = await service.run_until_disconnect(run.run(drop), context, request.receive, deadline_s)
        except RequestError as fault:
            raise cut_short(fault, service, run) from None
        record_metrics(service, run, reply)
        with context.timing("serialize"):
            return JSONResponse(reply.model_dump(mode="json"))


async def read_question(request: Request, service: Service) -> tuple[QaOptions, bytes]:
    """Reads the options and the clip's bytes from a multipart or a JSON body."""
    match request.headers.get("content-type", "").partition(";")[0].strip().lower():
        case "multipart/form-data":
            options, data = await read_form(request)
        case "application/json":
            options, data = await service.in_pool(read_json, await request.body())
        case _:
            message = "Send multipart/form-data with the clip as `file`, or application/json with it as base64."
            raise RequestError("unsupported_media_type", message)
    check_limits(options, service)
    return options, data


async def read_form(request: Request) -> tuple[QaOptions, bytes]:
    """Reads a multipart body: one `file`, any number of `choices`, and every other field at most once."""
    # The parser that Starlette uses, so that both see the same parameters.
    _, parameters = parse_options_header(request.headers.get("content-type"))
    if parameters.get(b"charset", b"utf-8").lower() not in CHARSETS:
        raise RequestError("invalid_multipart", "The multipart body must be in UTF-8.", hint="Leave `charset` out.")
    async with contextlib.aclosing(request.stream()) as stream:
        parser = MultiPartParser(
            request.headers, stream, max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
        )
        # Of a body that breaks off inside a clip the parser says nothing, and leaves the file open.
        spooled = parser._files_to_close_on_error  # pyright: ignore[reportPrivateUsage]
        try:
            form = await parser.parse()
        except (MultiPartException, UnicodeError):
            hint = f"At most {MAX_FIELDS} fields of {MAX_FIELD_BYTES} bytes each, and a boundary in the content type."
            raise RequestError("invalid_multipart", "The multipart body cannot be read.", hint=hint) from None
        except OSError as error:
            # A clip of more than 1 MiB is kept in a temporary file. What the system says of that names our paths.
            logger.error("a clip cannot be stored", exc_info=error)
            for file in spooled:
                with contextlib.suppress(OSError):
                    file.close()
            message = "The service has no room to store the clip."
            raise RequestError("storage_full", message, hint=COME_AGAIN) from None
    try:
        if len(spooled) > sum(isinstance(value, UploadFile) for _, value in form.multi_items()):
            raise RequestError("invalid_multipart", "The multipart body breaks off inside a file.")
        fields: dict[str, Any] = {}
        files: list[UploadFile] = []
        for name, value in form.multi_items():
            if name == "file" and isinstance(value, UploadFile):
                files.append(value)
            elif isinstance(value, UploadFile):
                raise RequestError("unknown_parameter", "Only the part named `file` may be a file.", param="file")
            elif name == "choices":
                fields.setdefault("choices", []).append(value)
            elif name in fields:
                raise RequestError("invalid_parameter", "A field is given twice; only `choices` may be.")
            else:
                fields[name] = value
        if len(files) > 1:
            raise RequestError(
                "invalid_parameter", "A question is about one clip.", param="file", limit=1, actual=len(files)
            )
        if "file" in fields:
            raise RequestError(
                "invalid_parameter", "`file` must be sent as a file: curl -F file=@clip.wav.", param="file"
            )
        options = validate(QaOptions, fields, strict=False)
        if not files:
            raise RequestError("missing_parameter", "`file` is required: the clip.", param="file")
        return options, await files[0].read()
    finally:
        for file in spooled:
            file.close()


def read_json(body: bytes) -> tuple[QaOptions, bytes]:
    """Reads a JSON body: the options, and the clip as base64 among them."""
    options = validate(QaBody, parse_json(body), strict=True)
    return options, decode_base64(options.audio.data)


def parse_json(body: bytes) -> Any:
    """Parses a JSON body as the standard says: no NaN, no infinity, no endless nesting."""

    def refuse(_: str) -> None:
        raise ValueError

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise RequestError("invalid_json", "The body is not valid JSON.") from None


def decode_base64(text: str) -> bytes:
    """Decodes a clip inside a JSON body; line breaks, which many encoders write, are left out."""
    try:
        return base64.b64decode(text.encode("ascii").translate(None, ASCII_WHITE_SPACE), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("invalid_parameter", "`audio.data` is not base64.", param="audio.data") from None


def validate(kind: type[Options], fields: Any, *, strict: bool) -> Options:
    """Checks the fields' types and ranges; a form's are all strings, JSON's must have the right type."""
    if not isinstance(fields, Mapping):
        raise RequestError("invalid_request", "The body must be a JSON object.")
    check_sizes(cast("Mapping[str, Any]", fields))
    return kind.model_validate(fields, strict=strict)


def check_sizes(fields: Mapping[str, Any]) -> None:
    """Refuses more fields and choices than can be meant: pydantic would make an error of each of them."""
    for param, value in ((None, fields), ("audio", fields.get("audio"))):
        if isinstance(value, Mapping) and len(cast("Mapping[str, Any]", value)) > MAX_KEYS:
            num_keys = len(cast("Mapping[str, Any]", value))
            message = "The request has too many fields."
            raise RequestError("unknown_parameter", message, param=param, limit=MAX_KEYS, actual=num_keys)
    choices = fields.get("choices")
    if isinstance(choices, list) and len(cast("list[Any]", choices)) > MAX_LISTED_CHOICES:
        num_choices = len(cast("list[Any]", choices))
        message = f"`choices` may have at most {MAX_CHOICES} items."
        raise RequestError("invalid_prompt", message, param="choices", limit=MAX_CHOICES, actual=num_choices)


def check_limits(options: QaOptions, service: Service) -> None:
    """Refuses options beyond what this service or this checkpoint allows."""
    settings = service.settings
    bounds = {
        "max_tokens": (options.max_tokens, settings.max_tokens),
        "timeout_ms": (options.timeout_ms, settings.max_timeout_ms),
        "pause": (options.pause, service.max_pauses),
    }
    for param, (value, limit) in bounds.items():
        if isinstance(value, int) and value > limit:
            message = f"`{param}` may be at most {limit}."
            raise RequestError("invalid_parameter", message, param=param, limit=limit, actual=value)
    if options.long_audio != "error":
        message = f"`long_audio={options.long_audio}` is not there yet; only `error` is."
        raise RequestError("invalid_parameter", message, param="long_audio")


async def prepare(
    service: Service, context: RequestContext, options: QaOptions, data: bytes, deadline_s: float
) -> QaRun:
    """Turns a request into a run: question before clip, as the cheaper to refuse."""
    metrics = service.metrics
    with context.timing("prompt"):
        prompt_token_ids: list[int] = await service.in_pool(
            build_prompt, service.checkpoint.tokenizer, options.question, options.choices
        )
    started_s = time.monotonic()
    waveform = await service.decode(data, context)
    context.decode_s = time.monotonic() - started_s
    metrics.audio_bytes.observe(len(data))
    metrics.audio_duration.observe(waveform.duration_s)
    metrics.audio_codec.labels(waveform.codec).inc()
    metrics.audio_silence_ratio.observe(waveform.quality.silence_ratio)
    require_window(waveform)
    left_s = deadline_s - time.monotonic()
    return QaRun(service, context, make_question(service, options, prompt_token_ids, waveform, left_s), waveform)


def require_window(waveform: Waveform) -> None:
    """Refuses a clip that one window cannot hold; nothing is ever cut in silence."""
    try:
        require_single_window(waveform)
    except AudioTooLongError as error:
        error.hint = (
            f"Send at most {error.limit:g} s. `long_audio` will offer `window` and `chunk` for longer clips; "
            "this version has only `error`."
        )
        raise


def make_question(
    service: Service, options: QaOptions, prompt_token_ids: list[int], waveform: Waveform, left_s: float
) -> Question:
    """Settles what is left open: how many tokens and pauses there is room for, and time in the seconds left."""
    manifest, settings = service.checkpoint.manifest, service.settings
    match options.pause:
        case "auto":
            budget = service.auto_budget(left_s)
        case "off":
            budget = None
        case number:
            budget = Budget(number)
    longest_choice = 0
    if manifest.trace.answer_style == "text":
        # As they are scored: escaped, closed, and with the one token that the engine must write behind them.
        candidates = service.checkpoint.tokenizer.choice_ids(options.choices, by_letter=False)
        longest_choice = max(map(len, candidates), default=0) + 1
    reserved = (
        len(prompt_token_ids)
        + round(waveform.num_samples / SAMPLE_RATE_HZ * manifest.audio.tokens_per_s)
        + (budget.max_pauses * service.gate.span_tokens if service.gate and budget else 0)
        + CLOSING_TOKENS
        + max(ANSWER_TOKENS, longest_choice)
    )
    room = manifest.max_model_len - reserved
    if room < 1:
        message = "The question, the choices and the clip together leave the model no room to answer."
        raise RequestError(
            "invalid_prompt", message, param="question", limit=manifest.max_model_len, actual=reserved + 1
        )
    if options.max_tokens is not None and options.max_tokens > room:
        message = f"With this clip and question `max_tokens` may be at most {room}."
        raise RequestError("invalid_parameter", message, param="max_tokens", limit=room, actual=options.max_tokens)
    return Question(
        choices=tuple(options.choices),
        prompt_token_ids=tuple(prompt_token_ids),
        max_tokens=options.max_tokens or min(room, settings.default_max_tokens),
        max_pauses=budget.max_pauses if budget else None,
        lowered_by=budget.lowered_by if budget else None,
        temperature=options.temperature,
        seed=options.seed,
        shows_reasoning=options.reasoning == "full",
    )


def cut_short(fault: RequestError, service: Service, run: QaRun) -> RequestError:
    """Adds what had been written to the error of a deadline, and lets the pauses of other answers heed it."""
    if fault.code == "deadline_exceeded":
        fault.partial = run.partial()
        service.pause_budgeter.record_late(time.monotonic() - run.stats.started_s, run.stats.pause_s)
    return fault


async def drop(name: str, data: Mapping[str, Any]) -> None:
    """Tells nobody: the emit of a reply that is not streamed."""


class EventStream(Response):
    """Sends a run's events as they happen, a ping in every silence, and an `error` event where the run fails."""

    media_type = "text/event-stream"

    def __init__(
        self, service: Service, context: RequestContext, run: QaRun, deadline_s: float, stack: contextlib.ExitStack
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.service = service
        self.context = context
        self.run = run
        self.deadline_s = deadline_s
        self.stack = stack
        self.last_sent_s = time.monotonic()
        self.lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.stack:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                await self.service.run_until_disconnect(self.pump(send), self.context, receive, self.deadline_s)
            except ClientDisconnect as error:
                self.context.outcome = to_request_error(error).code
                return
            except Exception as error:
                fault = cut_short(to_request_error(error), self.service, self.run)
                self.context.outcome = fault.code
                self.service.metrics.stream_errors.labels(fault.code).inc()
                if fault.code == "internal_error":
                    logger.error("stream failed", exc_info=error, extra={"request_id": self.context.request_id})
                await self.end(send, sse("error", fault.body(self.context.request_id)))
                return
            await self.end(send)

    async def end(self, send: Send, last_words: bytes = b"") -> None:
        """Closes the stream, in bounded time: a client that does not read must not keep its place for ever."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_TIMEOUT_S):
                if last_words:
                    await self.write(send, last_words)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def pump(self, send: Send) -> None:
        """Runs the question and writes its events."""

        serialize_s = 0.0

        async def emit(name: str, data: Mapping[str, Any]) -> None:
            nonlocal serialize_s
            started_s = time.perf_counter()
            event = sse(name, data)
            serialize_s += time.perf_counter() - started_s
            await self.write(send, event)

        pings = asyncio.create_task(self.ping(send))
        try:
            record_metrics(self.service, self.run, await self.run.run(emit))
        finally:
            self.context.stages.append(StageTime("serialize", serialize_s))
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)

    async def ping(self, send: Send) -> None:
        """Writes a comment whenever nothing was written for an interval, so that proxies keep the connection."""
        interval_s = self.service.settings.ping_interval_s
        while True:
            await asyncio.sleep(max(0.0, self.last_sent_s + interval_s - time.monotonic()))
            if time.monotonic() - self.last_sent_s >= interval_s:
                await self.write(send, b": ping\n\n")

    async def write(self, send: Send, body: bytes) -> None:
        """Sends bytes, one writer at a time."""
        async with self.lock:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self.last_sent_s = time.monotonic()


def sse(name: str, data: Mapping[str, Any]) -> bytes:
    """Writes one server-sent event; JSON has no raw line break, so one `data` line is enough."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode()


@router.get("/v1/info", summary="Checkpoint, limits and formats")
async def info(request: Request) -> InfoReply:
    """Describes the checkpoint, the limits, the formats and the pause settings."""
    service: Service = request.app.state.service
    settings, manifest, pause = service.settings, service.checkpoint.manifest, service.checkpoint.manifest.pause
    return InfoReply(
        version=version(),
        engine=settings.engine,
        checkpoint=CheckpointInfo(
            name=manifest.name,
            manifest_sha256=service.checkpoint.manifest_sha256,
            base_model=manifest.base_model,
            max_model_len=manifest.max_model_len,
        ),
        formats=list(FORMATS),
        decoding=DecodingInfo(sandbox=list(service.decoder_pool.layers), memory_mib=settings.decode_memory_mib),
        sections=[section.value for section in Section],
        environment_labels=list(manifest.environment_labels),
        pause=PauseInfo(
            mode=pause.mode if service.gate else "off",
            latent_tokens=pause.latent_tokens,
            has_position_tokens=pause.position_ids is not None,
            max_pauses=service.max_pauses,
            tau_pause=pause.tau_pause,
            tau_abort=pause.tau_abort,
            window_tokens=pause.window_tokens,
            sections=list(pause.sections),
            is_calibrated=pause.calibration is not None,
        ),
        long_audio=["error"],
        limits=LimitsInfo(
            window_s=manifest.audio.window_s,
            min_audio_s=manifest.audio.min_duration_s,
            max_audio_s=settings.max_audio_s,
            max_audio_bytes=settings.max_audio_bytes,
            max_body_bytes=settings.max_body_bytes,
            max_question_chars=MAX_QUESTION_CHARS,
            max_choices=MAX_CHOICES,
            max_choice_chars=MAX_CHOICE_CHARS,
            max_tokens=settings.max_tokens,
            max_timeout_ms=settings.max_timeout_ms,
            max_in_flight=settings.max_in_flight,
            max_queue_wait_s=settings.max_queue_wait_s,
        ),
    )


# Probes may ask with HEAD. The lower route answers both methods and names both in `Allow`; the upper is for the page.
@router.get("/livez", summary="Liveness")
@router.api_route("/livez", methods=["GET", "HEAD"], include_in_schema=False)
async def livez() -> dict[str, str]:
    """Answers as long as the event loop turns, whatever the engine does."""
    return {"status": "alive"}


@router.get("/readyz", summary="Readiness, with reasons", responses={503: {"model": Readiness}})
@router.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
async def readyz(request: Request) -> JSONResponse:
    """Answers 200 when a question would be taken now, else 503 with the reasons."""
    service: Service = request.app.state.service
    reasons = service.reasons_not_ready()
    status = 503 if reasons else 200
    return JSONResponse(Readiness(ready=not reasons, reasons=reasons).model_dump(), status_code=status)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=METRICS_RESPONSES)
async def metrics(request: Request) -> Response:
    """Writes our `hyper_*` figures and the engine's `vllm:*`."""
    service: Service = request.app.state.service
    body = await asyncio.to_thread(service.metrics.render)
    return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")
