"""`GET /v1/models`: the checkpoint under the names that requests may use."""

from __future__ import annotations

from fastapi import APIRouter, Request

from server.api.openai_types import Model, ModelList
from server.api.openapi import ANYWHERE, responses_of
from server.errors import RequestError
from server.service import Service

ALIAS = "hyper"
"""A name that every service accepts, whatever checkpoint it runs."""

router = APIRouter(responses=ANYWHERE)


@router.get("/v1/models", summary="Names of the served model")
async def list_models(request: Request) -> ModelList:
    """List the checkpoint and its alias."""
    service: Service = request.app.state.service
    return ModelList(data=[model_of(service, name) for name in names_of(service)])


@router.get("/v1/models/{name:path}", summary="One model", responses=responses_of(["model_not_found"]))
async def get_model(request: Request, name: str) -> Model:
    """Describe a model by its name."""
    service: Service = request.app.state.service
    require_model(service, name)
    return model_of(service, name)


def names_of(service: Service) -> tuple[str, ...]:
    """Return the names of the served model."""
    return (service.checkpoint.manifest.name, ALIAS)


def model_of(service: Service, name: str) -> Model:
    """Describe the served model under one of its names."""
    return Model(id=name, created=service.created_at_s, owned_by="hyper")


def require_model(service: Service, name: str) -> None:
    """Refuse the name of a model that is not served.

    Raises:
        RequestError: 404, with the names that are.
    """
    names = names_of(service)
    if name not in names:
        served = " or ".join(f"`{each}`" for each in names)
        raise RequestError("model_not_found", f"This model is not served here: use {served}.", param="model")
