"""Adapters that were generated: list, look up, download, delete."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from service.adapters.peft_format import zip_peft_adapter
from service.api.answers import build_adapter_info
from service.api.dependencies import AdapterIdDep, ResourcesDep
from service.api.error_handlers import InvalidRequestError
from service.api.openapi import document_problems
from service.api.schemas import AdapterDeletion, AdapterInfo, AdapterList
from service.errors import AdapterNotFoundError, NotReadyError

MAX_PAGE = 1000
_MISSING = document_problems(AdapterNotFoundError, NotReadyError)

router = APIRouter(tags=["adapters"])


@router.get("/v1/adapters", responses=document_problems(InvalidRequestError, NotReadyError))
async def list_adapters(
    resources: ResourcesDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most adapters to list.")] = 100,
    offset: Annotated[int, Query(ge=0, description="Adapters to skip.")] = 0,
) -> AdapterList:
    """Adapters that this process holds, the most recently used first; Redis may hold more."""
    found = resources.list_adapters()
    page = found[offset : offset + limit]
    return AdapterList(
        adapters=[build_adapter_info(record, service) for record, service in page],
        total=len(found),
    )


@router.get("/v1/adapters/{adapter_id}", responses=_MISSING)
async def read_adapter(adapter_id: AdapterIdDep, resources: ResourcesDep) -> AdapterInfo:
    """What is known about an adapter."""
    record, service = await resources.find(adapter_id)
    return build_adapter_info(record, service)


@router.delete("/v1/adapters/{adapter_id}", responses=_MISSING)
async def delete_adapter(adapter_id: AdapterIdDep, resources: ResourcesDep) -> AdapterDeletion:
    """Deletes an adapter from this process, from its slot and from Redis.

    Other replicas keep what they hold in memory until it expires. Where `degraded` names
    Redis, Redis could not be asked and may keep the adapter until it expires.
    """
    degraded = await resources.delete(adapter_id)
    return AdapterDeletion(adapter_id=adapter_id, degraded=["redis"] if degraded else [])


@router.get(
    "/v1/adapters/{adapter_id}/peft.zip",
    response_class=Response,
    responses={
        **_MISSING,
        200: {
            "description": "A PEFT LoRA directory, zipped; equal adapters give equal bytes.",
            "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
        },
    },
)
async def download_adapter(adapter_id: AdapterIdDep, resources: ResourcesDep) -> Response:
    """The adapter as a PEFT LoRA directory, which `peft.PeftModel.from_pretrained` loads."""
    record, service = await resources.find(adapter_id)
    bundle = service.bundle
    content = await asyncio.to_thread(
        zip_peft_adapter, bundle.layout, bundle.bases, record.vector, bundle.base_reference
    )
    disposition = f'attachment; filename="{adapter_id}.zip"'
    return Response(
        content, media_type="application/zip", headers={"Content-Disposition": disposition}
    )
