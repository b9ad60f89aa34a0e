"""The adapter that answers a request: generated for a task, found by id or alias, or the base."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from service.adapters.alias import Alias
from service.adapters.distribution import Decision, OutOfDistribution
from service.adapters.provider import Provided
from service.adapters.record import AdapterRecord
from service.api.auth import Principal, Scope
from service.api.bundle_service import AnyService
from service.api.dependencies import ADAPTER_ID_PATTERN, parse_adapter_id
from service.api.requests import BASE_ADAPTER_ID, InferRequest
from service.api.resources import Resources
from service.errors import ForbiddenError, NotCachedError, WrongModalityError
from service.synthesis.adapter_recipe import AdapterRecipe

TASK_PREFIX = "task:"
"""Begins a model name of the OpenAI routes that is a description."""

_WHAT_TO_CHANGE = {
    "text": "leave the `image` out, or use an adapter for detection",
    "detection": "send an `image`, or use an adapter for text",
}


@dataclass(frozen=True, kw_only=True)
class Selector:
    """What a request names to be answered by: exactly one of these.

    Attributes:
        task: a description, for which an adapter is generated where none is cached.
        adapter_id: an adapter's id.
        alias: a name of the tenant's.
        base: the base model itself.
        out_of_distribution: for a task, what to do where it is unlike all training tasks; None:
            as the service's settings say.
    """

    task: str | None = None
    adapter_id: str | None = None
    alias: str | None = None
    base: bool = False
    out_of_distribution: OutOfDistribution | None = None

    def __post_init__(self) -> None:
        named = (self.task, self.adapter_id, self.alias, self.base or None)
        assert sum(each is not None for each in named) == 1, "a selector names exactly one"

    @classmethod
    def from_request(cls, body: InferRequest) -> "Selector":
        """What the body of `/infer` names."""
        if body.adapter_id == BASE_ADAPTER_ID:
            return cls(base=True)
        return cls(
            out_of_distribution=body.out_of_distribution,
            task=body.task,
            adapter_id=body.adapter_id,
            alias=body.alias,
        )


@dataclass(frozen=True)
class Source:
    """What answers.

    Attributes:
        record: the adapter; None for the base.
        provided: how it was come by; None where it was named by its id, or pinned.
        seconds: stages of that.
        alias: the name that stood for it, as it was when the request came.
        decision: why this one, where a task was given.
    """

    record: AdapterRecord | None = None
    provided: Provided | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    alias: Alias | None = None
    decision: Decision | None = None

    @property
    def cache(self) -> Literal["hit", "miss", "coalesced", "degraded"] | None:
        """How the cache took part; None for an adapter id."""
        if self.provided is None:
            return None
        return cast(Literal["hit", "miss", "coalesced", "degraded"], self.provided.cache)


def parse_model(
    name: str, base_reference: str, out_of_distribution: OutOfDistribution | None = None
) -> Selector:
    """What the `model` of an OpenAI request names.

    `base` and the base's own reference are the base, `task:<words>` is a description, 64
    hexadecimal digits are an id, and everything else is an alias.
    """
    if name in (BASE_ADAPTER_ID, base_reference):
        return Selector(base=True)
    if name.startswith(TASK_PREFIX):
        words = name.removeprefix(TASK_PREFIX)
        return Selector(task=words, out_of_distribution=out_of_distribution)
    if re.fullmatch(ADAPTER_ID_PATTERN, name):
        return Selector(adapter_id=name)
    return Selector(alias=name)


async def resolve_adapter(
    selector: Selector, resources: Resources, service: AnyService, principal: Principal
) -> Source:
    """The adapter that a request names; the request keeps it, whatever becomes of the name.

    Args:
        selector: what the request names.
        resources: of the service.
        service: of the bundle whose modality the request has.
        principal: the caller, who sees its own tenant's adapters only.

    Raises:
        AdapterNotFoundError: the tenant has no such adapter.
        AliasNotFoundError: the tenant has no such alias.
        WrongModalityError: the adapter is another modality's.
        ForbiddenError: a task's adapter is not cached, and the caller may not generate one.
        OutOfDistributionError: a task unlike all training tasks, which the policy rejects.
        InvalidInputError: a description that is empty, too long or not plain text.
        QueueFullError: too many adapters are waiting to be generated.
    """
    if selector.base:
        return Source()
    if selector.task is not None:
        return await _resolve_task(selector.task, selector, service, principal)
    if selector.alias is not None:
        (alias,) = (await resources.aliases.find(principal.tenant, selector.alias)).aliases
        record, maker, regenerated, seconds = await resources.open_alias(alias)
        _check_modality(record, maker, service)
        return Source(record, regenerated, seconds, alias)
    assert selector.adapter_id is not None, "a selector names something"
    record, maker = await resources.find(parse_adapter_id(selector.adapter_id), principal)
    _check_modality(record, maker, service)
    return Source(record)


async def _resolve_task(
    task: str, selector: Selector, service: AnyService, principal: Principal
) -> Source:
    recipe = AdapterRecipe.build(
        task=task, bundle_digest=service.bundle.digest, tenant=principal.tenant
    )
    may_generate = principal.may(Scope.GENERATE)
    try:
        answer = await service.provide_for_task(
            recipe, selector.out_of_distribution, "use" if may_generate else "only"
        )
    except NotCachedError:
        raise ForbiddenError(
            "no adapter of this task is cached, and making one needs a key with the scope "
            f"`{Scope.GENERATE}`"
        ) from None
    provided = answer.provided
    record = None if provided is None else provided.record
    return Source(record, provided, answer.seconds, decision=answer.decision)


def _check_modality(record: AdapterRecord, maker: AnyService, wanted: AnyService) -> None:
    if maker is not wanted:
        raise WrongModalityError(
            f"adapter {record.adapter_id} is for {maker.modality}: "
            f"{_WHAT_TO_CHANGE[maker.modality]}"
        )
