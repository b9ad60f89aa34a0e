"""One served bundle: generator, base model and scheduler of one modality."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from PIL.Image import Image

from service.adapters.provider import AdapterProvider, CachePolicy, Provided
from service.adapters.record import AdapterRecord
from service.adapters.slot_bank import SlotLease
from service.errors import NoFreeSlotError, QueueFullError
from service.inference.completion import Completion, CompletionRequest
from service.inference.detection import DetectionEngine, DetectionRequest, Detections
from service.inference.engine import AnswerT, RequestT
from service.inference.scheduler import Scheduler
from service.inference.text import TextEngine
from service.metrics import ServiceMetrics
from service.settings import Settings
from service.synthesis.bundle import Bundle
from service.synthesis.synthesizer import AdapterRecipe, Synthesizer

_STAGES = {
    "lookup": "cache_read",
    "store": "cache_write",
    "queue": "synthesis_queue",
    "wait": "synthesis_wait",
}
"""The provider's stages as the API and the metrics call them; the others keep their names."""

EngineT = TypeVar("EngineT", TextEngine, DetectionEngine)


@dataclass(frozen=True)
class BundleService(Generic[EngineT, RequestT, AnswerT]):
    """A bundle in service.

    Attributes:
        modality: what it answers with.
        settings: of the service.
        metrics: of the service.
        synthesizer: generates the bundle's adapters.
        provider: the same, behind the caches that all bundles share.
        engine: base model and slots.
        scheduler: the queue in front of the engine.
    """

    modality: Literal["text", "detection"]
    settings: Settings
    metrics: ServiceMetrics
    synthesizer: Synthesizer
    provider: AdapterProvider
    engine: EngineT
    scheduler: Scheduler[RequestT, AnswerT]

    @property
    def bundle(self) -> Bundle:
        """The generator's files."""
        return self.synthesizer.bundle

    async def provide(
        self,
        recipe: AdapterRecipe,
        policy: CachePolicy = "use",
        ttl_seconds: int | None = None,
        images: Sequence[Image] | None = None,
    ) -> tuple[Provided, dict[str, float]]:
        """The adapter of a recipe, counted in the metrics, and its stages in seconds.

        Raises:
            NotCachedError: policy `only`, and not cached.
            QueueFullError: too many adapters are waiting to be generated.
        """
        ttl_seconds = ttl_seconds or self.settings.adapter_ttl_seconds
        try:
            provided = await self.provider.provide(
                recipe, policy=policy, ttl_seconds=ttl_seconds, images=images
            )
        except QueueFullError:
            self.metrics.on_rejection("synthesis_queue_full")
            raise
        seconds = {_STAGES.get(stage, stage): value for stage, value in provided.seconds.items()}
        self.metrics.observe_stages(seconds)
        self.metrics.count_adapter(provided.cache)
        return provided, seconds

    async def load(self, record: AdapterRecord) -> SlotLease:
        """Makes an adapter resident; the lease, already released, tells where and how fast.

        Raises:
            NoFreeSlotError: every slot is in use by a running batch.
        """
        try:
            lease = await asyncio.to_thread(self.engine.load, record.adapter_id, record.vector)
        except NoFreeSlotError:
            self.metrics.on_rejection("no_free_slot")
            raise
        lease.release()
        if lease.write_seconds:  # 0 where it was resident already
            self.metrics.observe_stages({"write_slot": lease.write_seconds})
        return lease

    async def answer(self, request: RequestT) -> AnswerT:
        """Queues a request and waits for its answer, as `Scheduler.submit`."""
        return await self.scheduler.submit(request, self.settings.request_deadline_seconds)

    async def close(self) -> None:
        """Finishes what runs, then lets go of the threads."""
        await self.scheduler.drain(self.settings.drain_grace_seconds)
        await self.provider.close()


TextService = BundleService[TextEngine, CompletionRequest, Completion]
DetectionService = BundleService[DetectionEngine, DetectionRequest, Detections]
AnyService = TextService | DetectionService
