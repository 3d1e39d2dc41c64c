"""`GET /livez`, `/readyz` and `/metrics`: liveness, readiness and metrics for operators."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from server.api.openapi import ANYWHERE, Responses
from server.api.types import Readiness
from server.service import Service

METRICS_RESPONSES: Responses = {
    200: {"description": "Prometheus text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}

router = APIRouter(responses=ANYWHERE)


# Probes may ask with HEAD. The lower route answers both methods and names both in `Allow`; the upper is for the page.
@router.get("/livez", summary="Liveness")
@router.api_route("/livez", methods=["GET", "HEAD"], include_in_schema=False)
async def livez() -> dict[str, str]:
    """Reply while the event loop runs, whatever the engine's state."""
    return {"status": "alive"}


@router.get("/readyz", summary="Readiness, with reasons", responses={503: {"model": Readiness}})
@router.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
async def readyz(request: Request) -> JSONResponse:
    """Reply 200 if questions are accepted now, else 503 with the reasons."""
    service: Service = request.app.state.service
    reasons = service.reasons_not_ready()
    status = 503 if reasons else 200
    return JSONResponse(Readiness(ready=not reasons, reasons=reasons).model_dump(), status_code=status)


@router.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=METRICS_RESPONSES)
async def metrics(request: Request) -> Response:
    """Return our `hyper_*` metrics and the engine's `vllm:*`."""
    service: Service = request.app.state.service
    body = await asyncio.to_thread(service.metrics.render)
    return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")
