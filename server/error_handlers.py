"""Error replies for the middleware and all routes."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from hyper_model.errors import HyperError
from server.errors import RequestError, to_request_error
from server.request_context import RequestContext

logger = logging.getLogger("hyper.server")


def error_response(fault: RequestError, context: RequestContext) -> JSONResponse:
    """Build the reply to an error, and record its code in the context for the log and the metrics."""
    context.outcome = fault.code
    headers: dict[str, str] = {}
    if fault.retry_after_s is not None:
        headers["retry-after"] = str(fault.retry_after_s)
    if fault.kind.is_costly or (fault.status == 429 and not fault.kind.retryable):
        # The openai client repeats each 429 and 5xx twice unless this header forbids it.
        headers["x-should-retry"] = "false"
    if fault.status == 401:
        headers["www-authenticate"] = "Bearer"
    if not context.is_body_complete:
        # The rest of the body is still arriving, so the connection cannot carry another request.
        headers["connection"] = "close"
    return JSONResponse(fault.body(context.request_id), status_code=fault.status, headers=headers)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Return the reply to a request with an exception."""
    fault = to_request_error(error)
    context = RequestContext.of(request.scope)
    if fault.code == "internal_error":
        logger.error("request failed", exc_info=error, extra={"request_id": context.request_id})
    response = error_response(fault, context)
    if fault.status == 405:
        response.headers["allow"] = ", ".join(sorted(methods_of(request)))
    return response


def methods_of(request: Request) -> set[str]:
    """Return the methods of an address, over all its routes; Starlette names those of the first alone."""
    routes = (route for route in request.app.routes if isinstance(route, Route))
    found = (route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return {method for methods in found for method in methods}


def install(app: FastAPI) -> None:
    """Install the handler for all exceptions of the application."""
    for kind in (HyperError, HTTPException, ClientDisconnect, ValidationError, RequestValidationError):
        app.add_exception_handler(kind, handle)
