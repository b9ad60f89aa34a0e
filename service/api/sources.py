"""The adapter that answers a request: generated for a task, found by its id, or the base."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from service.adapters.provider import Provided
from service.adapters.record import AdapterRecord
from service.api.bundle_service import AnyService
from service.api.dependencies import parse_adapter_id
from service.api.requests import BASE_ADAPTER_ID, InferRequest
from service.api.resources import Resources
from service.errors import WrongModalityError
from service.synthesis.synthesizer import AdapterRecipe

_WHAT_TO_CHANGE = {
    "text": "leave the `image` out, or use an adapter for detection",
    "detection": "send an `image`, or use an adapter for text",
}


@dataclass(frozen=True)
class Source:
    """What answers.

    Attributes:
        record: the adapter; None for the base.
        provided: how it was come by, where a task was given.
        seconds: stages of that.
    """

    record: AdapterRecord | None = None
    provided: Provided | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def cache(self) -> Literal["hit", "miss", "coalesced", "degraded"] | None:
        """How the cache took part; None for an adapter id."""
        if self.provided is None:
            return None
        return cast(Literal["hit", "miss", "coalesced", "degraded"], self.provided.cache)


async def find_source(body: InferRequest, resources: Resources, service: AnyService) -> Source:
    """The adapter that a request asks for.

    Args:
        body: the request.
        resources: of the service.
        service: of the bundle whose modality the request has.

    Raises:
        AdapterNotFoundError: no such adapter.
        WrongModalityError: the adapter is another modality's.
        QueueFullError: too many adapters are waiting to be generated.
    """
    if body.task is not None:
        recipe = AdapterRecipe.build(task=body.task, bundle_digest=service.bundle.digest)
        provided, seconds = await service.provide(recipe)
        return Source(provided.record, provided, seconds)
    assert body.adapter_id is not None, "the schema asks for a task or an adapter"
    if body.adapter_id == BASE_ADAPTER_ID:
        return Source()
    record, maker = await resources.find(parse_adapter_id(body.adapter_id))
    if maker is not service:
        raise WrongModalityError(
            f"adapter {record.adapter_id} is for {maker.modality}: "
            f"{_WHAT_TO_CHANGE[maker.modality]}"
        )
    return Source(record)
