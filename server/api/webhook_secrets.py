"""`/v1/webhooks/secrets`: the secrets that sign a key's webhooks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from server.api.job_types import SecretList, SecretReply
from server.api.jobs import STORED, jobs_of, tenant_of
from server.api.openapi import ANYWHERE
from server.jobs.records import WebhookSecret

router = APIRouter(responses=ANYWHERE)


@router.post("/v1/webhooks/secrets", summary="Create or rotate the webhook secret", status_code=201, responses=STORED)
async def create_secret(request: Request) -> SecretReply:
    """Create a secret and show it once. The one before signs too for a day; older ones end at once."""
    created = await jobs_of(request).rotate_secret(tenant_of(request))
    return reply_of(created).model_copy(update={"secret": created.secret})


@router.get("/v1/webhooks/secrets", summary="Webhook secrets", responses=STORED)
async def list_secrets(request: Request) -> SecretList:
    """List the valid secrets, newest first, without their values."""
    return SecretList(data=[reply_of(each) for each in await jobs_of(request).secrets_of(tenant_of(request))])


@router.delete("/v1/webhooks/secrets/{id}", summary="Delete a webhook secret", status_code=204, responses=STORED)
async def delete_secret(request: Request, id: Annotated[str, Path(description="Id of the secret.")]) -> Response:
    """End a secret at once, such as one that has leaked."""
    await jobs_of(request).delete_secret(tenant_of(request), id)
    return Response(status_code=204)


def reply_of(secret: WebhookSecret) -> SecretReply:
    """Describe a secret without its value."""
    return SecretReply(
        id=secret.id,
        created_at=int(secret.created_s),
        expires_at=None if secret.expires_s is None else int(secret.expires_s),
    )
