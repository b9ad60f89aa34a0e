"""Adapters: list, look up, download, upload, delete."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from service.adapters.peft_format import zip_peft_adapter
from service.api.answers import build_adapter_info
from service.api.auth import GuardedRoute, PrincipalDep, Scope, needs
from service.api.bodies import UploadBody, document_upload_body
from service.api.dependencies import AdapterIdDep, ResourcesDep
from service.api.error_handlers import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
)
from service.api.openapi import document_problems
from service.api.schemas import AdapterDeletion, AdapterInfo, AdapterList, UploadResponse
from service.api.uploads import admit_upload
from service.errors import (
    AdapterNotFoundError,
    InvalidAdapterError,
    InvalidInputError,
    NotReadyError,
    QuotaExceededError,
    WrongModalityError,
)
from service.threads import releasing

MAX_PAGE = 1000
_MISSING = document_problems(AdapterNotFoundError, NotReadyError)

router = APIRouter(tags=["adapters"], route_class=GuardedRoute)


@router.get("/v1/adapters", responses=document_problems(InvalidRequestError, NotReadyError))
@needs(Scope.INFER)
async def list_adapters(
    resources: ResourcesDep,
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most adapters to list.")] = 100,
    offset: Annotated[int, Query(ge=0, description="Adapters to skip.")] = 0,
) -> AdapterList:
    """The caller's adapters in this process, most recently used first; Redis may hold more."""
    found = resources.list_adapters(principal)
    page = found[offset : offset + limit]
    return AdapterList(
        adapters=[build_adapter_info(record, service) for record, service in page],
        total=len(found),
    )


@router.post(
    "/v1/adapters",
    responses=document_problems(
        MalformedRequestError,
        BodyTooLargeError,
        InvalidRequestError,
        InvalidInputError,
        InvalidAdapterError,
        WrongModalityError,
        QuotaExceededError,
        NotReadyError,
    ),
    openapi_extra=document_upload_body(),
)
@needs(Scope.GENERATE)
async def upload_adapter(
    body: UploadBody, resources: ResourcesDep, principal: PrincipalDep
) -> UploadResponse:
    """Takes in a PEFT LoRA that was trained elsewhere, where the bank can hold it.

    Kind `lora`: the same modules, and a rank that is not larger. The other kinds have frozen
    factors: the update must lie in their span, as that of every `peft.zip` of this bundle does.
    Nothing can generate it again: it is there until it expires, or as long as an alias names it.
    """
    record, service, degraded = await admit_upload(body, resources, principal)
    return UploadResponse(
        **build_adapter_info(record, service).model_dump(), degraded=["redis"] if degraded else []
    )


@router.get("/v1/adapters/{adapter_id}", responses=_MISSING)
@needs(Scope.INFER)
async def read_adapter(
    adapter_id: AdapterIdDep, resources: ResourcesDep, principal: PrincipalDep
) -> AdapterInfo:
    """What is known about an adapter."""
    record, service = await resources.find(adapter_id, principal)
    return build_adapter_info(record, service)


@router.delete("/v1/adapters/{adapter_id}", responses=_MISSING)
@needs(Scope.GENERATE)
async def delete_adapter(
    adapter_id: AdapterIdDep, resources: ResourcesDep, principal: PrincipalDep
) -> AdapterDeletion:
    """Deletes an adapter from this process, from its slot and from Redis.

    Its aliases stay, and a pinned one goes on serving it: delete them, too. Other replicas keep
    what they hold in memory until it expires. Where `degraded` names
    Redis, Redis could not be asked and may keep the adapter until it expires.
    """
    degraded = await resources.delete(adapter_id, principal)
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
@needs(Scope.INFER)
async def download_adapter(
    adapter_id: AdapterIdDep, resources: ResourcesDep, principal: PrincipalDep
) -> Response:
    """The adapter as a PEFT LoRA directory, which `peft.PeftModel.from_pretrained` loads."""
    record, service = await resources.find(adapter_id, principal)
    bundle = service.bundle
    content = await asyncio.to_thread(
        releasing(zip_peft_adapter),
        bundle.layout,
        bundle.bases,
        record.vector,
        bundle.base_reference,
    )
    disposition = f'attachment; filename="{adapter_id}.zip"'
    return Response(
        content, media_type="application/zip", headers={"Content-Disposition": disposition}
    )
