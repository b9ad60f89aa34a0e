"""Completions and detections, by an adapter or (only when asked for by name) by the base model."""

import time

from fastapi import APIRouter, Request

from service.api.answers import build_alias_use, build_receipt, to_milliseconds
from service.api.auth import GuardedRoute, Principal, PrincipalDep, Scope, needs
from service.api.bodies import InferBody, document_infer_body
from service.api.dependencies import ResourcesDep
from service.api.detection_answer import detect_objects
from service.api.disconnects import run_until_disconnect
from service.api.error_handlers import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
)
from service.api.openapi import document_problems
from service.api.requests import InferRequest
from service.api.resources import Resources
from service.api.schemas import DetectionResponse, InferResponse, Usage
from service.api.sources import Selector, resolve_adapter
from service.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    AliasNotFoundError,
    DeadlineExceededError,
    InvalidAdapterError,
    InvalidImageError,
    InvalidInputError,
    NoFreeSlotError,
    NotReadyError,
    OutOfDistributionError,
    QueueFullError,
    QuotaExceededError,
    WrongModalityError,
)
from service.inference.completion import CompletionRequest

router = APIRouter(tags=["inference"], route_class=GuardedRoute)


@router.post(
    "/infer",
    responses=document_problems(
        MalformedRequestError,
        AdapterNotFoundError,
        AliasNotFoundError,
        BodyTooLargeError,
        InvalidRequestError,
        InvalidInputError,
        InvalidImageError,
        WrongModalityError,
        InvalidAdapterError,
        OutOfDistributionError,
        QueueFullError,
        QuotaExceededError,
        NoFreeSlotError,
        NotReadyError,
        DeadlineExceededError,
        AdapterMismatchError,
    ),
    openapi_extra=document_infer_body(),
)
@needs(Scope.INFER)
async def infer(
    resources: ResourcesDep, principal: PrincipalDep, body: InferBody, request: Request
) -> InferResponse | DetectionResponse:
    """Completes a prompt, or finds objects in an image; a task's adapter is generated first.

    An unknown adapter is an error: the base model never answers in its place.
    """
    return await run_until_disconnect(request, _answer(body, resources, principal))


async def _answer(
    body: InferRequest, resources: Resources, principal: Principal
) -> InferResponse | DetectionResponse:
    if body.image is None:
        return await _complete_prompt(body, resources, principal)
    return await detect_objects(body, resources, principal)


async def _complete_prompt(
    body: InferRequest, resources: Resources, principal: Principal
) -> InferResponse:
    started = time.perf_counter()
    service = resources.need_text()
    source = await resolve_adapter(Selector.from_request(body), resources, service, principal)
    record = source.record
    assert body.prompt is not None, "the schema asks for a prompt where there is no image"
    completion = await service.answer(
        CompletionRequest(
            prompt=body.prompt,
            adapter_id=None if record is None else record.adapter_id,
            vector=None if record is None else record.vector,
            vector_sha256=None if record is None else record.vector_sha256,
            tenant=principal.tenant,
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop=tuple(body.stop),
        )
    )
    return InferResponse(
        text=completion.text,
        finish_reason=completion.finish_reason,
        usage=Usage(
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            total_tokens=completion.prompt_tokens + completion.completion_tokens,
        ),
        receipt=build_receipt(
            record, service.bundle, completion.slot, completion.generation, source.decision
        ),
        alias=build_alias_use(source.alias),
        cache=source.cache,
        degraded=resources.list_degraded(source.provided),
        milliseconds=to_milliseconds(
            {**source.seconds, **completion.seconds}, time.perf_counter() - started
        ),
    )
