"""Completions and detections, by an adapter or (only when asked for by name) by the base model."""

import asyncio
import time

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect

from service.api.answers import build_receipt, to_milliseconds
from service.api.bodies import InferBody, document_infer_body
from service.api.dependencies import ResourcesDep
from service.api.detection_answer import detect_objects
from service.api.error_handlers import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
)
from service.api.openapi import document_problems
from service.api.requests import InferRequest
from service.api.resources import Resources
from service.api.schemas import DetectionResponse, InferResponse, Usage
from service.api.sources import find_source
from service.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    InvalidAdapterError,
    InvalidImageError,
    InvalidInputError,
    NoFreeSlotError,
    NotReadyError,
    QueueFullError,
    WrongModalityError,
)
from service.inference.completion import CompletionRequest

router = APIRouter(tags=["inference"])


@router.post(
    "/infer",
    responses=document_problems(
        MalformedRequestError,
        AdapterNotFoundError,
        BodyTooLargeError,
        InvalidRequestError,
        InvalidInputError,
        InvalidImageError,
        WrongModalityError,
        InvalidAdapterError,
        QueueFullError,
        NoFreeSlotError,
        NotReadyError,
        DeadlineExceededError,
    ),
    openapi_extra=document_infer_body(),
)
async def infer(
    resources: ResourcesDep, body: InferBody, request: Request
) -> InferResponse | DetectionResponse:
    """Completes a prompt, or finds objects in an image; a task's adapter is generated first.

    An unknown adapter is an error: the base model never answers in its place.
    """
    answer = asyncio.create_task(_answer(body, resources))
    gone = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _answer(body: InferRequest, resources: Resources) -> InferResponse | DetectionResponse:
    if body.image is None:
        return await _complete_prompt(body, resources)
    return await detect_objects(body, resources)


async def _complete_prompt(body: InferRequest, resources: Resources) -> InferResponse:
    started = time.perf_counter()
    service = resources.need_text()
    source = await find_source(body, resources, service)
    record = source.record
    assert body.prompt is not None, "the schema asks for a prompt where there is no image"
    completion = await service.answer(
        CompletionRequest(
            prompt=body.prompt,
            adapter_id=None if record is None else record.adapter_id,
            vector=None if record is None else record.vector,
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
        receipt=build_receipt(record, service.bundle, completion.slot, completion.generation),
        cache=source.cache,
        degraded=resources.list_degraded(source.provided),
        milliseconds=to_milliseconds(
            {**source.seconds, **completion.seconds}, time.perf_counter() - started
        ),
    )


async def _wait_for_disconnect(request: Request) -> None:
    """Returns once the client has gone; its place in the queue is then free for others."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
