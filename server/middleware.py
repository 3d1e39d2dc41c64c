"""Outermost ASGI layer: request id, authentication, head and body limits, last-resort 500, log line, metrics.

It is plain ASGI, because Starlette's BaseHTTPMiddleware would hide client disconnects from the handlers.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.error_handlers import error_response
from server.errors import RequestError, to_request_error
from server.page import PAGE_PATHS
from server.request_context import SCOPE_KEY, RequestContext
from server.service import Service
from server.settings import Settings
from server.telemetry.tracing import trace_id_of

access_logger = logging.getLogger("hyper.access")
logger = logging.getLogger("hyper.server")

HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]*)(:[0-9]{1,5})?")
WHOLE_ADDRESS = re.compile(r"https?://[^/?#@]*", re.IGNORECASE)
SLASHES = re.compile(r"/{2,}")
CLIENT_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# If a server closes during an upload, the kernel discards the unread reply. So after a reply to a refused upload,
# incoming data is read and dropped for this long before the connection closes.
LINGER_S = 1.0

MAX_HEADERS = 100

PROBE_PATHS = frozenset({"/livez", "/readyz"})
PUBLIC_PATHS = PROBE_PATHS | PAGE_PATHS
"""Paths without authentication. Every other path, also a new one, needs a key with the scope `ask`."""

FILES_PATH = "/v1/files"
METRICS_PATH = "/metrics"
OPERATOR_PATHS = PROBE_PATHS | {METRICS_PATH}
"""Paths of the metrics port, without authentication."""

UNTRACED_PATHS = PUBLIC_PATHS | OPERATOR_PATHS

PRIORITY_HEADER = "x-hyper-priority"


class RequestMiddleware:
    """ASGI middleware around the application; see the module docstring."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self.app = app
        self.service = service
        self.settings = service.settings
        self.metrics = service.metrics
        self.tracer = service.tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope["path"] = plain_path(scope["path"])
        context = RequestContext(
            request_id=request_id_from(headers),
            is_body_complete=headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers,
        )
        scope[SCOPE_KEY] = context
        if self.tracer is None:
            context.trace_id = trace_id_of(headers.get("traceparent", ""))
        elif scope["path"] not in UNTRACED_PATHS:
            self.tracer.begin(context, headers)
        reply = Reply(context, receive, send)
        body = Body(context, receive, self.settings, max_bytes=max_body_bytes(self.settings, scope["path"]))
        try:
            self.check_head(scope, headers, context)
            announced = int(headers.get("content-length", "0"))
            if announced > body.max_bytes:
                raise body.too_large(announced)
            await self.app(scope, body.receive, reply.send)
        except RequestError as fault:
            if reply.status is None:
                await error_response(fault, context)(scope, receive, reply.send)
        except Exception as error:
            fault = to_request_error(error)
            logger.error("request failed", exc_info=error, extra={"request_id": context.request_id})
            if reply.status is None:
                await error_response(fault, context)(scope, receive, reply.send)
            # After the reply has begun, an error can only be signalled by dropping the connection. The server does so
            # when the application returns before the last byte.
        finally:
            self.record_metrics(scope, context, reply.status)

    def check_head(self, scope: Scope, headers: Headers, context: RequestContext) -> None:
        """Check the request by path and headers alone, and find its tenant and priority.

        The routed path is used, never a URL built from the client's headers.

        Raises:
            RequestError: 400, 401, 403, 404 or 431.
        """
        if len(scope["headers"]) > MAX_HEADERS:
            message = f"The request has too many headers; the limit is {MAX_HEADERS}."
            raise RequestError("headers_too_large", message, limit=MAX_HEADERS, actual=len(scope["headers"]))
        if "transfer-encoding" in headers and "content-length" in headers:
            # RFC 9112, section 6.3: two lengths may be an attempt to smuggle a second request past a proxy.
            context.is_body_complete = False
            message = "The request has both Content-Length and Transfer-Encoding."
            raise RequestError("invalid_http", message, hint="Send one of the two headers.")
        if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            message = "The body is compressed (Content-Encoding); the service reads bodies as they are."
            raise RequestError("unsupported_media_type", message, hint="Turn off the compression of request bodies.")
        path = scope["path"]
        _, port = scope.get("server") or (None, None)
        if port is not None and port == self.settings.metrics_port:
            if path not in OPERATOR_PATHS:
                raise RequestError("not_found", "This port serves only /metrics, /livez and /readyz.")
            return
        keys = self.service.keys
        if keys is None and not self.settings.open_to_all and is_domain(headers.get("host", "")):
            hint = "Use 127.0.0.1 or localhost, or configure API keys (HYPER_KEY_FILE)."
            message = "Without API keys, the service refuses requests with a domain name as Host."
            raise RequestError("forbidden", message, hint=hint)
        if keys is not None and path not in PUBLIC_PATHS:
            key = keys.find(bearer_of(headers))
            if key is None:
                reason = "wrong_key" if "authorization" in headers else "no_key"
                self.metrics.auth_failures.labels(reason).inc()
                message = "The API key is missing, unknown or expired."
                hint = "Send a valid key as `Authorization: Bearer hyp_...`."
                raise RequestError("invalid_api_key", message, hint=hint)
            scope_of_path = "metrics" if path == METRICS_PATH else "ask"
            if scope_of_path not in key.scopes:
                self.metrics.auth_failures.labels("wrong_scope").inc()
                message = f"This key lacks the scope `{scope_of_path}`."
                hint = f"Use a key with the scope `{scope_of_path}` (hyper keys add --scope {scope_of_path})."
                raise RequestError("forbidden", message, hint=hint)
            context.tenant = self.service.quotas.of(key)
            context.facts["key"] = key.name
            context.priority = key.priority
        match headers.get(PRIORITY_HEADER, "").strip().lower():
            case "batch":
                context.priority = "batch"
            case "" | "interactive":
                # A key of the class batch never becomes interactive.
                pass
            case _:
                message = f"`{PRIORITY_HEADER}` must be interactive or batch."
                raise RequestError("invalid_parameter", message, param=PRIORITY_HEADER)

    def record_metrics(self, scope: Scope, context: RequestContext, status: int | None) -> None:
        """Write the access log line and record the request's metrics."""
        endpoint = getattr(scope.get("route"), "path", "other")
        seconds = context.elapsed_ms() / 1000
        if context.outcome == "client_closed_request":
            status = 499
        self.metrics.request_seconds.labels(endpoint, context.outcome).observe(seconds)
        self.metrics.requests.labels(endpoint, str(status or "none")).inc()
        stages_ms: dict[str, float] = {}
        for stage, stage_s, _ in context.stages:
            self.metrics.stage_seconds.labels(stage).observe(stage_s)
            stages_ms[stage] = round(stages_ms.get(stage, 0.0) + stage_s * 1000, 1)
        # A probe answered with 503 has outcome "ok" and is not a refusal.
        if status is not None and status >= 400 and status != 499 and context.outcome != "ok":
            self.metrics.rejected.labels(str(status), context.outcome).inc()
        if self.tracer is not None:
            self.tracer.end(context, method=scope["method"], endpoint=endpoint, status=status)
        facts = {
            "request_id": context.request_id,
            **({} if context.trace_id is None else {"trace_id": context.trace_id}),
            "method": scope["method"],
            "endpoint": endpoint,
            "status": status,
            "outcome": context.outcome,
            "duration_ms": round(seconds * 1000, 1),
            "body_bytes": context.num_body_bytes,
            **({"stages_ms": stages_ms} if stages_ms else {}),
            **context.facts,
        }
        access_logger.info("request", extra=facts)


class Body:
    """Request body with limits on size and time."""

    def __init__(self, context: RequestContext, receive: Receive, settings: Settings, *, max_bytes: int) -> None:
        self.context = context
        self.inner = receive
        self.settings = settings
        self.max_bytes = max_bytes

    async def receive(self) -> Message:
        """Return the next message.

        Raises:
            RequestError: If the body is too large or too slow.
        """
        context = self.context
        if context.is_body_complete:
            return await self.inner()
        left_s = context.started_s + self.settings.upload_timeout_s - time.monotonic()
        try:
            async with asyncio.timeout(min(left_s, self.settings.upload_idle_timeout_s)):
                message = await self.inner()
        except TimeoutError:
            limit = self.settings.upload_timeout_s
            idle_s = self.settings.upload_idle_timeout_s
            message = f"The upload took longer than {limit:g} s, or sent nothing for {idle_s:g} s."
            hint = "Send a smaller clip, or use a faster connection."
            raise RequestError("upload_timeout", message, limit=limit, hint=hint) from None
        if message["type"] == "http.request":
            context.num_body_bytes += len(message.get("body", b""))
            if context.num_body_bytes > self.max_bytes:
                raise self.too_large(context.num_body_bytes)
            if not message.get("more_body", False):
                context.is_body_complete = True
                context.received_s = time.monotonic()
        return message

    def too_large(self, num_bytes: int) -> RequestError:
        """Return the error for a body above the limit, with its received or announced size."""
        limit = self.max_bytes
        message = f"The request body exceeds {limit} bytes."
        hint = "Send a shorter or compressed clip."
        return RequestError("body_too_large", message, limit=limit, actual=num_bytes, hint=hint)


class Reply:
    """Reply with the request id in its headers; it delays closing after an incomplete upload."""

    def __init__(self, context: RequestContext, receive: Receive, send: Send) -> None:
        self.context = context
        self.receive = receive
        self.inner = send
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """Send one ASGI message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.context.request_id
            if self.context.traceparent is not None:
                headers["traceparent"] = self.context.traceparent
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if is_last and not self.context.is_body_complete:
            await self.inner({**message, "more_body": True})
            await self.linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self.inner(message)

    async def linger(self) -> None:
        """Read and drop incoming data for a moment."""
        try:
            async with asyncio.timeout(LINGER_S):
                while True:
                    message = await self.receive()
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return


def plain_path(target: str) -> str:
    """Return the path of a request's target: one address per endpoint.

    A slash at the end, or two slashes where a base address and a path were joined, change nothing: a redirect would
    lead to plain http behind a TLS proxy, and many clients send no body to its address. A client with a proxy sends
    the whole address (RFC 9112, section 3.2.2).
    """
    if (whole := WHOLE_ADDRESS.match(target)) is not None:
        target = target[whole.end() :]
    path = SLASHES.sub("/", target)
    return path.rstrip("/") or "/"


def max_body_bytes(settings: Settings, path: str) -> int:
    """Return the maximum size of a request body; stored files may be larger than clips."""
    return settings.max_upload_bytes if path == FILES_PATH else settings.max_body_bytes


def bearer_of(headers: Headers) -> str:
    """Return the presented key, or an empty string."""
    scheme, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if scheme.lower() == "bearer" else ""


def is_domain(host: str) -> bool:
    """Return whether a Host header is a DNS name, possibly pointed at this machine by an attacker."""
    host_match = HOST.fullmatch(host)
    name = host_match[1] if host_match else host
    if "." not in name.rstrip("."):
        return False
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        return not name.endswith(".localhost")
    return False


def request_id_from(headers: Headers) -> str:
    """Return the client's request id if it is a short plain token, else a new one."""
    offered = headers.get("x-request-id", "")
    return offered if CLIENT_REQUEST_ID.fullmatch(offered) else f"req_{uuid.uuid4().hex}"
