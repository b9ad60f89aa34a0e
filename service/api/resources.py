"""What a running service holds: a service per bundle, and what they share."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from service.adapters.alias import Alias
from service.adapters.cache import RedisCache
from service.adapters.provider import Provided, describe_absence
from service.adapters.record import AdapterRecord
from service.adapters.redis_cache import RedisUnavailableError
from service.adapters.registry import AliasRegistry
from service.api.auth import Principal
from service.api.bundle_service import AnyService, DetectionService, TextService
from service.api.modality_choice import ModalityChoice
from service.api.pictures import PictureReader
from service.api.schemas import Modality
from service.errors import AdapterNotFoundError, IcmLoraError, WrongModalityError
from service.metrics import ServiceMetrics
from service.settings import ENV_PREFIX, Settings

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """Opened once by the lifespan, closed by it.

    Attributes:
        settings: of the service.
        metrics: of the service.
        text: the text bundle, where one is served.
        detection: the detection bundle, where one is served.
        choice: which of them a description is for.
        pictures: decodes images.
        aliases: names for adapters.
        redis: where configured; all bundles share it.
        redis_watch: asks Redis now and then.
    """

    settings: Settings
    metrics: ServiceMetrics
    text: TextService | None
    detection: DetectionService | None
    choice: ModalityChoice
    pictures: PictureReader
    aliases: AliasRegistry
    redis: RedisCache | None
    redis_watch: asyncio.Task[None] | None

    @property
    def services(self) -> tuple[AnyService, ...]:
        """Those of the served bundles; at least one."""
        return tuple(each for each in (self.text, self.detection) if each is not None)

    def need_text(self) -> TextService:
        """The text bundle's service.

        Raises:
            WrongModalityError: none is served.
        """
        if self.text is None:
            raise WrongModalityError(
                f"no text bundle is served: send an `image`, or set {ENV_PREFIX}BUNDLE"
            )
        return self.text

    def need_detection(self) -> DetectionService:
        """The detection bundle's service.

        Raises:
            WrongModalityError: none is served.
        """
        if self.detection is None:
            raise WrongModalityError(
                "no detection bundle is served: leave the `image` out, or set "
                f"{ENV_PREFIX}DETECTION_BUNDLE"
            )
        return self.detection

    def need(self, modality: Modality) -> AnyService:
        """The service of a modality.

        Raises:
            WrongModalityError: no such bundle is served.
        """
        return self.need_text() if modality == "text" else self.need_detection()

    async def find(self, adapter_id: str, principal: Principal) -> tuple[AdapterRecord, AnyService]:
        """The caller's cached adapter with this id, and the service of the bundle that made it.

        Raises:
            AdapterNotFoundError: not cached, or another tenant's (which looks the same), or made
                by another bundle (replicas that are being upgraded share one Redis): these
                bundles' bases could give it another meaning.
        """
        record = await self.services[0].provider.get(adapter_id)
        if record.tenant != principal.tenant:
            raise AdapterNotFoundError(describe_absence(adapter_id, degraded=False))
        return record, self._find_bundle(record.bundle_digest, adapter_id)

    async def open_alias(
        self, alias: Alias
    ) -> tuple[AdapterRecord, AnyService, Provided | None, dict[str, float]]:
        """An alias's adapter: as it is pinned or cached, else generated again from its recipe.

        Returns:
            The adapter, the service of the bundle that made it, and how it was come by with the
            seconds of that, unless it was pinned.

        Raises:
            AdapterNotFoundError: it is not cached any more, and its recipe is another bundle's,
                or it has none.
            QueueFullError: too many adapters are waiting to be generated.
        """
        record = self.aliases.find_pinned(alias)
        provided: Provided | None = None
        seconds: dict[str, float] = {}
        if record is None and alias.recipe is not None:
            service = self._find_bundle(alias.recipe.bundle_digest, alias.adapter_id)
            provided, seconds = await service.provide(alias.recipe)
            record = provided.record
        elif record is None:
            record = await self.services[0].provider.get(alias.adapter_id)
        self.aliases.pin(alias, record)
        return record, self._find_bundle(record.bundle_digest, record.adapter_id), provided, seconds

    async def restore_aliases(self, is_wanted: Callable[[], bool]) -> None:
        """Reads the aliases that Redis holds, and makes the adapters of the pinned ones.

        The others' adapters are made when they are first asked for. Where Redis cannot be asked
        this is declared, and tried again until it can; each name is read when it is asked for.

        Args:
            is_wanted: asked before each adapter: whether to go on.
        """
        while (aliases := await self._read_aliases()) is None:
            await asyncio.sleep(self.settings.redis_retry_seconds)
        for alias in aliases:
            if alias.pinned and is_wanted():
                try:
                    await self.open_alias(alias)
                except IcmLoraError as error:
                    _logger.warning("a pinned alias was not restored: %s", error.detail)

    async def _read_aliases(self) -> tuple[Alias, ...] | None:
        failed_before = self.aliases.restore_failed
        try:
            aliases = await self.aliases.restore()
        except RedisUnavailableError:
            if not failed_before:
                _logger.warning("aliases were not restored from Redis: trying again until they are")
            self.metrics.on_aliases_restored(False)
            return None
        if failed_before:
            _logger.info("aliases were restored from Redis")
            self.metrics.on_aliases_restored(True)
        return aliases

    def list_adapters(self, principal: Principal) -> list[tuple[AdapterRecord, AnyService]]:
        """The caller's adapters in this process, the most recently used first, and their makers."""
        found = (
            (record, self._find_maker(record))
            for record in self.services[0].provider.list()
            if record.tenant == principal.tenant
        )
        return [(record, service) for record, service in found if service is not None]

    async def delete(self, adapter_id: str, principal: Principal) -> bool:
        """Deletes the caller's adapter everywhere; True (degraded) where Redis may still have it.

        Raises:
            AdapterNotFoundError: neither this process nor Redis had it, or it is another
                tenant's. Where Redis cannot be asked, nobody knows, and nothing is deleted.
        """
        provider = self.services[0].provider
        try:
            record = await provider.get(adapter_id)
        except AdapterNotFoundError:
            if not self.list_degraded():
                raise
            return True
        if record.tenant != principal.tenant:
            raise AdapterNotFoundError(describe_absence(adapter_id, degraded=False))
        degraded = await provider.delete(adapter_id)
        for service in self.services:
            service.engine.slots.evict(adapter_id)
        return degraded

    def list_degraded(self, provided: Provided | None = None) -> list[str]:
        """Components that are lost now, or were for this adapter."""
        down = self.redis is not None and self.redis.is_down
        return ["redis"] if down or (provided is not None and provided.degraded) else []

    def list_lost(self) -> list[str]:
        """As `list_degraded`, with what no single request needs."""
        return [*self.list_degraded(), *(["aliases"] if self.aliases.restore_failed else [])]

    async def close(self) -> None:
        """Finishes what runs, then lets go of threads and connections."""
        if self.redis_watch is not None:
            self.redis_watch.cancel()
        await asyncio.gather(*(service.close() for service in self.services))
        await asyncio.to_thread(self.pictures.close)

    def _find_bundle(self, digest: str, adapter_id: str) -> AnyService:
        for service in self.services:
            if service.bundle.digest == digest:
                return service
        raise AdapterNotFoundError(
            f"adapter {adapter_id} was generated by another bundle: generate it again"
        )

    def _find_maker(self, record: AdapterRecord) -> AnyService | None:
        """Caches are shared, so that any provider finds the adapters of all bundles."""
        for service in self.services:
            if service.bundle.digest == record.bundle_digest:
                return service
        return None
