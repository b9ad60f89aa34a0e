"""One served bundle: generator, base model and scheduler of one modality."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from service.adapters.distribution import Decision, OutOfDistribution, decide
from service.adapters.provider import (
    AdapterProvider,
    CachePolicy,
    KeepPolicy,
    Provided,
    SentExamples,
)
from service.adapters.record import AdapterRecord
from service.adapters.slot_bank import SlotLease
from service.api.quotas import Quotas, TokenReservation
from service.errors import NoFreeSlotError, OutOfDistributionError, QueueFullError
from service.inference.completion import Completion, CompletionRequest, TextDelta
from service.inference.detection import DetectionEngine, DetectionRequest, Detections
from service.inference.engine import AnswerT, RequestT
from service.inference.scheduler import Scheduler
from service.inference.text import TextEngine
from service.metrics import ServiceMetrics
from service.settings import Settings
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.bundle import Bundle
from service.synthesis.synthesizer import Synthesizer
from service.threads import releasing
from service.tracing import trace

_STAGES = {
    "lookup": "cache_read",
    "store": "cache_write",
    "queue": "synthesis_queue",
    "wait": "synthesis_wait",
}
"""The provider's stages as the API and the metrics call them; the others keep their names."""

EngineT = TypeVar("EngineT", TextEngine, DetectionEngine)


@dataclass(frozen=True)
class TaskAnswer:
    """What answers for a task.

    Attributes:
        provided: the adapter; None for the base.
        seconds: stages of its generation.
        decision: why this one.
    """

    provided: Provided | None
    seconds: Mapping[str, float]
    decision: Decision


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
        quotas: limits of the tenants.
    """

    modality: Literal["text", "detection"]
    settings: Settings
    metrics: ServiceMetrics
    synthesizer: Synthesizer
    provider: AdapterProvider
    engine: EngineT
    scheduler: Scheduler[RequestT, AnswerT]
    quotas: Quotas

    @property
    def bundle(self) -> Bundle:
        """The generator's files."""
        return self.synthesizer.bundle

    async def provide(
        self,
        recipe: AdapterRecipe,
        policy: CachePolicy = "use",
        ttl_seconds: int | None = None,
        examples: SentExamples | None = None,
        keep: KeepPolicy = "all",
    ) -> tuple[Provided, dict[str, float]]:
        """The adapter of a recipe, counted in the metrics, and its stages in seconds.

        Raises:
            NotCachedError: policy `only`, and not cached.
            QueueFullError: too many adapters are waiting to be generated.
            QuotaExceededError: the tenant's adapters fill its quota.
        """
        ttl_seconds = ttl_seconds or self.settings.adapter_ttl_seconds
        with trace("provide") as span:
            try:
                provided = await self.provider.provide(
                    recipe, policy=policy, keep=keep, ttl_seconds=ttl_seconds, examples=examples
                )
            except QueueFullError:
                self.metrics.on_rejection("synthesis_queue_full")
                raise
            named = (
                (_STAGES.get(stage, stage), value) for stage, value in provided.seconds.items()
            )
            span.seconds = seconds = dict(named)
            span.attributes["icm_lora.cache"] = provided.cache
        self.metrics.observe_stages(seconds)
        self.metrics.count_adapter(provided.cache)
        return provided, seconds

    async def provide_for_task(
        self,
        recipe: AdapterRecipe,
        out_of_distribution: OutOfDistribution | None = None,
        policy: CachePolicy = "use",
        ttl_seconds: int | None = None,
        examples: SentExamples | None = None,
        *,
        needs_adapter: bool = False,
    ) -> TaskAnswer:
        """As `provide`, and then what the policy says where the task is unlike all others.

        Args:
            recipe: of the task.
            out_of_distribution: the policy; None: the service's.
            policy: what caches are for.
            ttl_seconds: as `provide`.
            examples: as `provide`.
            needs_adapter: the base cannot answer, so that `base` is to reject.

        Raises:
            OutOfDistributionError: it is, and the policy is to reject it; nothing is stored.
        """
        chosen = out_of_distribution or OutOfDistribution(self.settings.out_of_distribution)
        if needs_adapter and chosen is OutOfDistribution.BASE:
            chosen = OutOfDistribution.REJECT
        keep: KeepPolicy = "in_distribution" if chosen is OutOfDistribution.REJECT else "all"
        provided, seconds = await self.provide(recipe, policy, ttl_seconds, examples, keep)
        try:
            decision = decide(provided.record, chosen)
        except OutOfDistributionError:
            self.metrics.count_decision("reject")
            raise
        self.metrics.count_decision(decision.kind)
        if decision.kind == "base":
            return TaskAnswer(None, seconds, decision)
        if decision.kind == "nearest":
            words = self.synthesizer.describe_task(decision.nearest.name)
            recipe = replace(recipe, task=words, examples="", refine_steps=0)
            provided, again = await self.provide(recipe, policy, ttl_seconds)
            stages = {**seconds, **again}
            seconds = {each: seconds.get(each, 0.0) + again.get(each, 0.0) for each in stages}
        return TaskAnswer(provided, seconds, decision)

    async def load(self, record: AdapterRecord) -> SlotLease | None:
        """Makes an adapter resident; the lease, already released, tells where and how fast.

        None where running requests hold every slot: a request to the adapter waits for one.
        """
        with trace("load") as span:
            try:
                lease = await asyncio.to_thread(
                    releasing(self.engine.load), record.adapter_id, record.vector
                )
            except NoFreeSlotError:
                return None
            if lease.write_seconds:
                span.seconds = {"write_slot": lease.write_seconds}
        lease.release()
        if lease.write_seconds:  # 0 where it was resident already
            self.metrics.observe_stages({"write_slot": lease.write_seconds})
        return lease

    async def answer(self, request: RequestT) -> AnswerT:
        """Queues a request and waits for its answer, as `Scheduler.submit`.

        Raises:
            RateLimitedError: the tenant's tokens are used up for now.
        """
        with self.reserve_tokens([request]) as (reservation,):
            return await self.answer_reserved(request, reservation)

    async def answer_reserved(self, request: RequestT, reservation: TokenReservation) -> AnswerT:
        """As `answer`, with tokens that were taken already, see `reserve_tokens`."""
        with trace("answer") as span:
            answer = await self.scheduler.submit(request, self.settings.request_deadline_seconds)
            reservation.settle(answer.completion_tokens)
            span.seconds = answer.seconds
            return answer

    def reserve_tokens(
        self, requests: Sequence[RequestT]
    ) -> contextlib.AbstractContextManager[list[TokenReservation]]:
        """Takes the tokens of requests that are answered together, in their order.

        Raises:
            RateLimitedError: the tenant's tokens are used up for now.
        """
        texts = [each for each in requests if isinstance(each, CompletionRequest)]
        if not texts:  # boxes are not counted in tokens
            return contextlib.nullcontext([TokenReservation(0) for _ in requests])
        return self.quotas.reserve_tokens(texts[0].tenant, *(each.max_tokens for each in texts))

    async def stream_reserved(
        self, request: RequestT, reservation: TokenReservation
    ) -> AsyncGenerator[TextDelta | AnswerT, None]:
        """As `answer_reserved`, telling what has come; the last item is the answer."""
        with trace("answer", nests=False) as span:
            items = self.scheduler.stream(request, self.settings.request_deadline_seconds)
            async with aclosing(items):
                async for item in items:
                    if isinstance(item, TextDelta):
                        reservation.used = item.num_tokens
                    else:
                        reservation.settle(item.completion_tokens)
                        span.seconds = item.seconds
                    yield item

    async def close(self) -> None:
        """Finishes what runs, then lets go of the threads."""
        await self.scheduler.drain(self.settings.drain_grace_seconds)
        await self.provider.close()


TextService = BundleService[TextEngine, CompletionRequest, Completion]
DetectionService = BundleService[DetectionEngine, DetectionRequest, Detections]
AnyService = TextService | DetectionService
