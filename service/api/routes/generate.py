"""From a description to an adapter that is resident and ready to answer."""

import time

from fastapi import APIRouter

from service.api.answers import build_adapter_info, to_milliseconds
from service.api.dependencies import ResourcesDep
from service.api.error_handlers import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
)
from service.api.openapi import document_problems
from service.api.schemas import GenerateRequest, GenerateResponse
from service.errors import (
    InvalidAdapterError,
    InvalidInputError,
    NoFreeSlotError,
    NotCachedError,
    NotReadyError,
    QueueFullError,
)
from service.synthesis.synthesizer import AdapterRecipe

router = APIRouter(tags=["adapters"])


@router.post(
    "/generate-lora",
    responses=document_problems(
        MalformedRequestError,
        NotCachedError,
        BodyTooLargeError,
        InvalidRequestError,
        InvalidInputError,
        InvalidAdapterError,
        QueueFullError,
        NoFreeSlotError,
        NotReadyError,
    ),
)
async def generate_adapter(body: GenerateRequest, resources: ResourcesDep) -> GenerateResponse:
    """Generates the adapter of a task, or takes it from the cache, and loads it into a slot.

    The same request gives the same adapter, byte for byte, as long as the bundle is the same.
    """
    started = time.perf_counter()
    recipe = AdapterRecipe.build(
        task=body.task,
        bundle_digest=resources.bundle.digest,
        mode=body.mode,
        seed=body.seed,
        temperature=body.temperature,
        strength=body.strength,
    )
    provided, seconds = await resources.provide(recipe, body.cache, body.ttl_seconds)
    record = provided.record
    lease = await resources.load(record)
    if lease.write_seconds:
        seconds["write_slot"] = lease.write_seconds
    return GenerateResponse(
        **build_adapter_info(record, resources.bundle).model_dump(),
        cache=provided.cache,
        degraded=resources.list_degraded(provided),
        slot=lease.slot,
        generation=lease.generation,
        milliseconds=to_milliseconds(seconds, time.perf_counter() - started),
    )
