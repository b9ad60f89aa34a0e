"""vLLM's routes that load and unload adapters by name; here they make and delete aliases.

Served where `ICM_LORA_RUNTIME_LORA_UPDATING` says so. Answers and errors are vLLM's, with one
difference on purpose: the server reads no path that a request names.
"""

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, model_validator
from starlette.responses import PlainTextResponse

from service.api.auth import GuardedRoute, Principal, PrincipalDep, Scope, needs
from service.api.dependencies import ResourcesDep
from service.api.error_handlers import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
)
from service.api.openai.errors import ParameterError, document_errors
from service.api.requests import AliasRequest, RequestModel, TaskDescription, UploadRequest
from service.api.resources import Resources
from service.api.routes.aliases import bind_alias
from service.api.uploads import admit_upload
from service.errors import (
    AdapterNotFoundError,
    AliasNotFoundError,
    GenerationConflictError,
    IcmLoraError,
    InvalidAdapterError,
    InvalidInputError,
    NotReadyError,
    OutOfDistributionError,
    QueueFullError,
    QuotaExceededError,
    RegistryUnavailableError,
    WrongModalityError,
)

_SHARED = (
    MalformedRequestError,
    InvalidRequestError,
    ParameterError,
    InvalidInputError,
    BodyTooLargeError,
    NotReadyError,
    RegistryUnavailableError,
    IcmLoraError,
)
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}

router = APIRouter(tags=["vllm"], route_class=GuardedRoute)

LoraName = Annotated[str, Field(min_length=1, max_length=64, description="The alias.")]
LoraIntId = Annotated[int | None, Field(description="vLLM's number of it; means nothing here.")]


class LoadLoraRequest(RequestModel):
    """A name, and what it shall stand for: an adapter, a task, or the files of a PEFT LoRA."""

    lora_name: LoraName
    lora_path: Annotated[
        str | None, Field(description="Always refused: the server reads no path of a request.")
    ] = None
    adapter_id: Annotated[
        str | None, Field(min_length=1, max_length=64, description="An adapter's id.")
    ] = None
    task: Annotated[TaskDescription | None, Field(description="Generate its adapter.")] = None
    config: Annotated[
        str | None, Field(description="`adapter_config.json` in base64, with `weights`.")
    ] = None
    weights: Annotated[
        str | None, Field(description="`adapter_model.safetensors` in base64, with `config`.")
    ] = None
    load_inplace: Annotated[
        bool, Field(description="Replace what has this name already; else that is an error.")
    ] = False
    lora_int_id: LoraIntId = None

    @model_validator(mode="after")
    def _check_one_source(self) -> "LoadLoraRequest":
        if (self.config is None) != (self.weights is None):
            raise ValueError("give `config` and `weights` together")
        sources = (self.adapter_id, self.task, self.config)
        if self.lora_path is None and sum(each is not None for each in sources) != 1:
            raise ValueError(
                "give exactly one of `adapter_id`, `task`, and `config` with `weights`"
            )
        return self


class UnloadLoraRequest(RequestModel):
    """A name to free."""

    lora_name: LoraName
    lora_int_id: LoraIntId = None


@router.post(
    "/v1/load_lora_adapter",
    response_class=PlainTextResponse,
    responses={
        **document_errors(
            (
                AdapterNotFoundError,
                InvalidAdapterError,
                OutOfDistributionError,
                WrongModalityError,
                QueueFullError,
                QuotaExceededError,
                *_SHARED,
            )
        ),
        **_TEXT,
    },
)
@needs(Scope.GENERATE)
async def load_lora_adapter(
    body: LoadLoraRequest, resources: ResourcesDep, principal: PrincipalDep
) -> PlainTextResponse:
    """Makes a pinned alias of an adapter that is known, of a task's, or of uploaded files."""
    if body.lora_path is not None:
        raise ParameterError(
            "this server reads no paths: send `adapter_id`, `task`, or the files' bytes in "
            "base64 as `config` and `weights` instead of `lora_path`",
            "lora_path",
        )
    adapter_id = await _upload(body, resources, principal) or body.adapter_id
    request = AliasRequest(
        adapter_id=adapter_id,
        task=body.task,
        pinned=True,
        expected_generation=None if body.load_inplace else 0,
    )
    try:
        await bind_alias(body.lora_name, request, resources, principal)
    except GenerationConflictError:
        raise ParameterError(
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load "
            "the adapter in place, set 'load_inplace' to True.",
            "lora_name",
        ) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter",
    response_class=PlainTextResponse,
    responses={**document_errors((AliasNotFoundError, *_SHARED)), **_TEXT},
)
@needs(Scope.GENERATE)
async def unload_lora_adapter(
    body: UnloadLoraRequest, resources: ResourcesDep, principal: PrincipalDep
) -> PlainTextResponse:
    """Deletes the alias; requests that run keep the adapter that they have."""
    try:
        await resources.aliases.delete(principal.tenant, body.lora_name)
    except AliasNotFoundError:
        raise AliasNotFoundError(f"The lora adapter '{body.lora_name}' cannot be found.") from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _upload(body: LoadLoraRequest, resources: Resources, principal: Principal) -> str | None:
    if body.config is None or body.weights is None:
        return None
    upload = UploadRequest(config=body.config, weights=body.weights)
    record, _, _ = await admit_upload(upload, resources, principal)
    return record.adapter_id
