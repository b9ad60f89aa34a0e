"""From a description to an adapter that is resident and ready to answer."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from PIL.Image import Image

from service.api.answers import build_adapter_info, to_milliseconds
from service.api.bundle_service import AnyService
from service.api.dependencies import ResourcesDep
from service.api.error_handlers import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
)
from service.api.openapi import document_problems
from service.api.requests import GenerateRequest
from service.api.resources import Resources
from service.api.schemas import GenerateResponse, Modality
from service.errors import (
    InvalidAdapterError,
    InvalidImageError,
    InvalidInputError,
    NoFreeSlotError,
    NotCachedError,
    NotReadyError,
    QueueFullError,
    WrongModalityError,
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
        InvalidImageError,
        WrongModalityError,
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
    service = resources.need(body.modality or await _choose_modality(body, resources))
    recipe, images = await _build_recipe(body, resources, service)
    provided, seconds = await service.provide(recipe, body.cache, body.ttl_seconds, images)
    record = provided.record
    lease = await service.load(record)
    if lease.write_seconds:
        seconds["write_slot"] = lease.write_seconds
    return GenerateResponse(
        **build_adapter_info(record, service).model_dump(),
        cache=provided.cache,
        degraded=resources.list_degraded(provided),
        slot=lease.slot,
        generation=lease.generation,
        milliseconds=to_milliseconds(seconds, time.perf_counter() - started),
    )


async def _choose_modality(body: GenerateRequest, resources: Resources) -> Modality:
    if body.task is None:
        return resources.choice.choose_by_example()
    return await resources.choice.choose(body.task)


async def _build_recipe(
    body: GenerateRequest, resources: Resources, service: AnyService
) -> tuple[AdapterRecipe, Sequence[Image] | None]:
    """The recipe, and the pixels of its example images where it has some."""
    how: dict[str, Any] = {
        "bundle_digest": service.bundle.digest,
        "mode": body.mode,
        "seed": body.seed,
        "temperature": body.temperature,
        "strength": body.strength,
    }
    if body.images is None:
        assert body.task is not None, "the schema asks for a task or images"
        return AdapterRecipe.build(task=body.task, **how), None
    if service.synthesizer.image_encoder is None:
        raise InvalidInputError(
            f"bundle {service.bundle.name} has no image encoder: describe the task in words"
        )
    files, images = await resources.pictures.read_examples(body.images)
    return AdapterRecipe.build_from_images(files, **how), images
