"""The routes of OpenAI's API that text adapters can serve."""

import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from service.api.auth import GuardedRoute, Principal, PrincipalDep, Scope, needs
from service.api.dependencies import ResourcesDep, StateDep
from service.api.disconnects import run_until_disconnect
from service.api.error_handlers import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
)
from service.api.openai.call import Call, draw_name, draw_seed
from service.api.openai.chat_requests import ChatBody
from service.api.openai.chats import build_chat_answer, build_chat_rows, make_chat_chunks
from service.api.openai.chunks import stream_chunks
from service.api.openai.completions import (
    build_completion_answer,
    build_completion_rows,
    make_completion_chunks,
)
from service.api.openai.errors import (
    ModelNotFoundError,
    ParameterError,
    UnknownParameterError,
    UnsupportedParameterError,
    document_errors,
)
from service.api.openai.generation import complete_rows, stream_rows
from service.api.openai.models import list_models, read_model, resolve_model
from service.api.openai.requests import CompletionBody
from service.api.openai.responses import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    ModelCard,
    ModelList,
)
from service.api.openai.streaming import EVENT_MEDIA_TYPE, EventStream
from service.api.resources import Resources
from service.errors import (
    AdapterMismatchError,
    DeadlineExceededError,
    IcmLoraError,
    InvalidAdapterError,
    InvalidInputError,
    NoFreeSlotError,
    NotReadyError,
    OutOfDistributionError,
    QueueFullError,
    QuotaExceededError,
    WrongModalityError,
)

_ALWAYS = (NotReadyError, WrongModalityError, IcmLoraError)
_GENERATING = (
    MalformedRequestError,
    InvalidRequestError,
    ParameterError,
    UnknownParameterError,
    UnsupportedParameterError,
    InvalidInputError,
    InvalidAdapterError,
    OutOfDistributionError,
    ModelNotFoundError,
    BodyTooLargeError,
    QueueFullError,
    QuotaExceededError,
    AdapterMismatchError,
    NoFreeSlotError,
    DeadlineExceededError,
    *_ALWAYS,
)

router = APIRouter(tags=["openai"], route_class=GuardedRoute)


def document_stream(chunk: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's entry of an answer that is JSON, or with `stream` server-sent events."""
    description = f"Events `data: {chunk.__name__}`, ended by `data: [DONE]`, or by an error."
    event = {  # of one event, as OpenAPI's readers check each
        "type": "object",
        "description": description,
        "properties": {"data": {"type": "string"}},
        "required": ["data"],
    }
    return {
        "description": "The answer; events where `stream` asks for them.",
        "content": {EVENT_MEDIA_TYPE: {"schema": event}},
    }


@router.get("/v1/models", responses=document_errors(_ALWAYS))
@needs(Scope.INFER)
async def list_all_models(
    resources: ResourcesDep, state: StateDep, principal: PrincipalDep
) -> ModelList:
    """What a request may name as its `model`: the base, aliases, adapters of this process."""
    return await list_models(resources, resources.need_text(), principal, state.started)


@router.get("/v1/models/{model:path}", responses=document_errors((ModelNotFoundError, *_ALWAYS)))
@needs(Scope.INFER)
async def read_one_model(
    model: str, resources: ResourcesDep, state: StateDep, principal: PrincipalDep
) -> ModelCard:
    """The card of one model."""
    return await read_model(model, resources, resources.need_text(), principal, state.started)


@router.post(
    "/v1/completions",
    response_model=CompletionAnswer,
    responses={**document_errors(_GENERATING), 200: document_stream(CompletionAnswer)},
)
@needs(Scope.INFER)
async def create_completion(
    body: CompletionBody, resources: ResourcesDep, principal: PrincipalDep, request: Request
) -> CompletionAnswer | Response:
    """Continues prompts, with the adapter that `model` names.

    The base model answers only where it is named.
    """

    async def answer() -> CompletionAnswer | Response:
        call = await open_call(body, resources, principal, "cmpl")
        rows = build_completion_rows(call, body)
        if body.stream:
            running = stream_rows(call.service, rows)
            first = await anext(running)
            build_chunk = make_completion_chunks(call, rows)
            return EventStream(stream_chunks(call, rows, first, running, build_chunk), running)
        return build_completion_answer(call, rows, await complete_rows(call.service, rows))

    return await run_until_disconnect(request, answer())


@router.post(
    "/v1/chat/completions",
    response_model=ChatAnswer,
    responses={**document_errors(_GENERATING), 200: document_stream(ChatChunk)},
)
@needs(Scope.INFER)
async def create_chat_completion(
    body: ChatBody, resources: ResourcesDep, principal: PrincipalDep, request: Request
) -> ChatAnswer | Response:
    """Answers a chat in the base model's own template, with the adapter that `model` names."""

    async def answer() -> ChatAnswer | Response:
        call = await open_call(body, resources, principal, "chatcmpl")
        rows = build_chat_rows(call, body)
        if body.stream:
            running = stream_rows(call.service, rows)
            first = await anext(running)
            build_chunk = make_chat_chunks(call)
            return EventStream(stream_chunks(call, rows, first, running, build_chunk), running)
        return build_chat_answer(call, rows, await complete_rows(call.service, rows))

    return await run_until_disconnect(request, answer())


async def open_call(
    body: CompletionBody | ChatBody, resources: Resources, principal: Principal, prefix: str
) -> Call:
    """Makes the adapter ready that a request names.

    Raises:
        ModelNotFoundError: it names nothing.
        WrongModalityError: no text bundle is served.
    """
    started = time.perf_counter()
    service = resources.need_text()
    source = await resolve_model(
        body.model, resources, service, principal, body.out_of_distribution
    )
    return Call(
        resources=resources,
        service=service,
        body=body,
        source=source,
        tenant=principal.tenant,
        seed=draw_seed(body),
        started=started,
        name=draw_name(prefix),
    )
