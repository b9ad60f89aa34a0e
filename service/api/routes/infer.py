"""Completions, by an adapter or (only when asked for by name) by the base model."""

import asyncio
import time

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect

from service.adapters.provider import Provided
from service.adapters.record import AdapterRecord
from service.api.answers import build_bundle_info, to_milliseconds
from service.api.dependencies import ResourcesDep, parse_adapter_id
from service.api.error_handlers import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
)
from service.api.openapi import document_problems
from service.api.resources import Resources
from service.api.schemas import BASE_ADAPTER_ID, InferRequest, InferResponse, Receipt, Usage
from service.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    InvalidAdapterError,
    InvalidInputError,
    NoFreeSlotError,
    NotReadyError,
    QueueFullError,
)
from service.inference.completion import CompletionRequest
from service.synthesis.synthesizer import AdapterRecipe

router = APIRouter(tags=["inference"])


@router.post(
    "/infer",
    responses=document_problems(
        MalformedRequestError,
        AdapterNotFoundError,
        BodyTooLargeError,
        InvalidRequestError,
        InvalidInputError,
        InvalidAdapterError,
        QueueFullError,
        NoFreeSlotError,
        NotReadyError,
        DeadlineExceededError,
    ),
)
async def complete_prompt(
    body: InferRequest, request: Request, resources: ResourcesDep
) -> InferResponse:
    """Completes a prompt with an adapter, generating it first where a task is given.

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


async def _answer(body: InferRequest, resources: Resources) -> InferResponse:
    started = time.perf_counter()
    record: AdapterRecord | None = None
    provided: Provided | None = None
    seconds: dict[str, float] = {}
    if body.task is not None:
        recipe = AdapterRecipe.build(task=body.task, bundle_digest=resources.bundle.digest)
        provided, seconds = await resources.provide(recipe, "use", None)
        record = provided.record
    elif body.adapter_id is not None and body.adapter_id != BASE_ADAPTER_ID:
        record = await resources.find(parse_adapter_id(body.adapter_id))
    completion = await resources.scheduler.submit(
        CompletionRequest(
            prompt=body.prompt,
            adapter_id=None if record is None else record.adapter_id,
            vector=None if record is None else record.vector,
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.seed,
            stop=tuple(body.stop),
        ),
        resources.settings.request_deadline_seconds,
    )
    return InferResponse(
        text=completion.text,
        finish_reason=completion.finish_reason,
        usage=Usage(
            prompt_tokens=completion.prompt_tokens,
            completion_tokens=completion.completion_tokens,
            total_tokens=completion.prompt_tokens + completion.completion_tokens,
        ),
        receipt=Receipt(
            adapter_id=BASE_ADAPTER_ID if record is None else record.adapter_id,
            vector_sha256=None if record is None else record.vector_sha256,
            slot=completion.slot,
            generation=completion.generation,
            bundle=build_bundle_info(resources.bundle),
        ),
        cache=None if provided is None else provided.cache,
        degraded=resources.list_degraded(provided),
        milliseconds=to_milliseconds(
            {**seconds, **completion.seconds}, time.perf_counter() - started
        ),
    )


async def _wait_for_disconnect(request: Request) -> None:
    """Returns once the client has gone; its place in the queue is then free for others."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
