"""Writes errors as HTTP replies, for the middleware and for every route."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hyper_model.errors import HyperError
from server.errors import RequestError, as_fault
from server.request_context import Exchange

logger = logging.getLogger("hyper.server")


def fault_response(fault: RequestError, exchange: Exchange) -> JSONResponse:
    """Writes the fault as a reply and notes it on the exchange for the log and the metrics."""
    exchange.outcome = fault.code
    headers: dict[str, str] = {}
    if fault.retry_after_s is not None:
        headers["retry-after"] = str(fault.retry_after_s)
    if fault.status == 401:
        headers["www-authenticate"] = "Bearer"
    if not exchange.is_body_complete:
        # The rest of the body is still on its way: the connection cannot carry another request.
        headers["connection"] = "close"
    return JSONResponse(fault.body(exchange.request_id), status_code=fault.status, headers=headers)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Answers a request that ended in an exception."""
    fault = as_fault(error)
    exchange = Exchange.of(request.scope)
    if fault.code == "internal_error":
        logger.error("request failed", exc_info=error, extra={"request_id": exchange.request_id})
    response = fault_response(fault, exchange)
    if isinstance(error, HTTPException) and error.status_code == 405 and error.headers:
        response.headers["allow"] = error.headers["Allow"]
    return response


def install(app: FastAPI) -> None:
    """Makes every exception of the application end as an error object."""
    for kind in (HyperError, HTTPException, ClientDisconnect, ValidationError, RequestValidationError):
        app.add_exception_handler(kind, handle)
