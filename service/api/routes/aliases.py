"""Aliases: names for adapters, replaced by generation, shared by replicas through Redis."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query

from service.adapters.alias import Alias, check_alias_name
from service.api.auth import GuardedRoute, Principal, PrincipalDep, Scope, needs
from service.api.dependencies import ResourcesDep, parse_adapter_id
from service.api.error_handlers import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedRequestError,
)
from service.api.openapi import document_problems
from service.api.requests import MAX_SEED, MAX_TTL_SECONDS, AliasRequest
from service.api.resources import Resources
from service.api.schemas import AliasDeletion, AliasInfo, AliasList, AliasState
from service.errors import (
    AdapterNotFoundError,
    AliasNotFoundError,
    GenerationConflictError,
    InvalidAdapterError,
    InvalidInputError,
    NotReadyError,
    OutOfDistributionError,
    QueueFullError,
    QuotaExceededError,
    RegistryUnavailableError,
    WrongModalityError,
)
from service.synthesis.adapter_recipe import AdapterRecipe

MAX_PAGE = 1000

router = APIRouter(tags=["aliases"], route_class=GuardedRoute)


@router.put(
    "/v1/aliases/{name}",
    responses=document_problems(
        MalformedRequestError,
        AdapterNotFoundError,
        GenerationConflictError,
        BodyTooLargeError,
        InvalidRequestError,
        InvalidInputError,
        InvalidAdapterError,
        OutOfDistributionError,
        WrongModalityError,
        QueueFullError,
        QuotaExceededError,
        NotReadyError,
        RegistryUnavailableError,
    ),
)
@needs(Scope.GENERATE)
async def put_alias(
    name: str, body: AliasRequest, resources: ResourcesDep, principal: PrincipalDep
) -> AliasState:
    """Gives a name to an adapter, or to another one; a task's adapter is generated first.

    With `expected_generation` the change is made only where nobody else was faster. Requests
    that run keep the adapter that they have.
    """
    alias = await bind_alias(name, body, resources, principal)
    return _build_state(alias, resources)


@router.get("/v1/aliases", responses=document_problems(InvalidRequestError, NotReadyError))
@needs(Scope.INFER)
async def list_aliases(
    resources: ResourcesDep,
    principal: PrincipalDep,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most aliases to list.")] = 100,
    offset: Annotated[int, Query(ge=0, description="Aliases to skip.")] = 0,
) -> AliasList:
    """The caller's aliases by name; where `degraded` names Redis, as this process knew them."""
    answer = await resources.aliases.list(principal.tenant)
    page = answer.aliases[offset : offset + limit]
    return AliasList(
        aliases=[AliasInfo(**_describe(alias)) for alias in page],
        total=len(answer.aliases),
        durable=resources.aliases.durable,
        degraded=["redis"] if answer.degraded else [],
    )


@router.get("/v1/aliases/{name}", responses=document_problems(AliasNotFoundError, NotReadyError))
@needs(Scope.INFER)
async def read_alias(name: str, resources: ResourcesDep, principal: PrincipalDep) -> AliasState:
    """What a name stands for; where `degraded` names Redis, as this process knew it."""
    (alias,) = (await resources.aliases.find(principal.tenant, name)).aliases
    return _build_state(alias, resources)


@router.delete(
    "/v1/aliases/{name}",
    responses=document_problems(
        AliasNotFoundError,
        GenerationConflictError,
        InvalidRequestError,
        NotReadyError,
        RegistryUnavailableError,
    ),
)
@needs(Scope.GENERATE)
async def delete_alias(
    name: str,
    resources: ResourcesDep,
    principal: PrincipalDep,
    expected_generation: Annotated[
        int | None,
        Query(ge=0, le=MAX_SEED, description="Refuse with 409 where the alias has another."),
    ] = None,
) -> AliasDeletion:
    """Frees a name; the adapter stays."""
    alias = await resources.aliases.delete(principal.tenant, name, expected_generation)
    return AliasDeletion(name=alias.name, adapter_id=alias.adapter_id, generation=alias.generation)


async def bind_alias(
    name: str, body: AliasRequest, resources: Resources, principal: Principal
) -> Alias:
    """Finds or generates the adapter of a request, and gives it the name.

    Raises:
        IcmLoraError: as `PUT /v1/aliases/{name}` documents.
    """
    check_alias_name(name)
    if body.task is not None:
        service = resources.need(body.modality or await resources.choice.choose(body.task))
        recipe = AdapterRecipe.build(
            task=body.task, bundle_digest=service.bundle.digest, tenant=principal.tenant
        )
        answer = await service.provide_for_task(recipe, needs_adapter=True)
        assert answer.provided is not None, "the base needs no name"
        record = answer.provided.record
    else:
        assert body.adapter_id is not None, "the schema asks for a task or an adapter"
        record, service = await resources.find(parse_adapter_id(body.adapter_id), principal)
    if body.pinned:
        resources.aliases.pins.check_room(principal.tenant, name, record)
    if not record.regenerable:  # its vector is all there is of it
        await service.provider.keep(record, body.ttl_seconds or MAX_TTL_SECONDS)
    alias = await resources.aliases.put(
        principal.tenant,
        name,
        record.adapter_id,
        recipe=record.recipe if record.regenerable else None,
        pinned=body.pinned,
        ttl_seconds=body.ttl_seconds,
        expected_generation=body.expected_generation,
    )
    resources.aliases.pin(alias, record)
    return alias


def _describe(alias: Alias) -> dict[str, object]:
    ends = None if alias.expires_at is None else datetime.fromtimestamp(alias.expires_at, UTC)
    return {
        "name": alias.name,
        "adapter_id": alias.adapter_id,
        "generation": alias.generation,
        "created_at": datetime.fromtimestamp(alias.created_at, UTC),
        "expires_at": ends,
        "pinned": alias.pinned,
        "regenerable": alias.recipe is not None,
    }


def _build_state(alias: Alias, resources: Resources) -> AliasState:
    return AliasState(
        **_describe(alias),
        durable=resources.aliases.durable,
        degraded=resources.list_degraded(),
    )
