"""Aliases with generations: in this process, and in Redis where replicas share them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from secrets import token_hex

from service.adapters.alias import Alias, check_alias_name, is_alias_name
from service.adapters.alias_memory import AliasMemory
from service.adapters.alias_store import RedisAliasStore, Stored
from service.adapters.pins import Pins
from service.adapters.record import AdapterRecord
from service.adapters.redis_cache import RedisUnavailableError
from service.errors import (
    AliasNotFoundError,
    GenerationConflictError,
    InvalidInputError,
    RegistryUnavailableError,
)
from service.synthesis.adapter_recipe import AdapterRecipe

MAX_NAMES = 10_000
"""Names of a tenant, with those that ended within `MEMORY_SECONDS`."""

MEMORY_SECONDS = 30 * 86_400.0
"""Time that the generation of a name that ended is remembered."""

_MAX_ATTEMPTS = 32
_MAX_PINNED_BYTES = 67_108_864


@dataclass(frozen=True)
class AliasAnswer:
    """Aliases, and whether Redis could be asked.

    Attributes:
        aliases: live ones.
        degraded: Redis is configured and could not be asked: another replica may know better.
    """

    aliases: tuple[Alias, ...]
    degraded: bool


class AliasRegistry:
    """A tenant's names for adapters; lives on one event loop.

    With Redis it is Redis that decides: every read asks it and every change is an atomic
    compare-and-set there, so that all replicas agree. What was read last is remembered: it
    serves while Redis is down, and goes back to a Redis that has lost it. Changes are refused
    while Redis is down, because generations could fork. Without Redis the memory decides.

    Args:
        store: aliases in Redis; None: this process only.
        pins: keeps the adapters of pinned aliases.
        clock: seconds since 1970.

    Attributes:
        pins: the same.
        restore_failed: whether Redis could not be asked for the aliases that it holds, so that
            this process learns of each only when it is named.
    """

    def __init__(
        self,
        store: RedisAliasStore | None = None,
        pins: Pins | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self.pins = pins or Pins(_MAX_PINNED_BYTES)
        self.restore_failed = False
        self._clock = clock
        self._known = AliasMemory()

    @property
    def durable(self) -> bool:
        """Whether aliases outlive this process."""
        return self._store is not None

    async def find(self, tenant: str, name: str) -> AliasAnswer:
        """The alias of this name.

        Raises:
            AliasNotFoundError: the tenant has none.
        """
        if not is_alias_name(name):
            raise AliasNotFoundError(_describe_absence(name, degraded=False))
        try:
            alias = (await self._read(tenant, name))[1]
            degraded = False
        except RedisUnavailableError:
            alias, degraded = self._known.get(tenant, name), True
        if alias is None or not alias.is_live(self._clock()):
            self.pins.drop(tenant, name)
            raise AliasNotFoundError(_describe_absence(name, degraded))
        return AliasAnswer((alias,), degraded)

    async def list(self, tenant: str) -> AliasAnswer:
        """All aliases of a tenant, by name."""
        degraded = False
        if self._store is not None:
            try:
                await self._read_all(tenant, self._store)
            except RedisUnavailableError:
                degraded = True
        live = self._known.list_live(self._clock(), tenant)
        return AliasAnswer(tuple(sorted(live, key=lambda alias: alias.name)), degraded)

    async def put(
        self,
        tenant: str,
        name: str,
        adapter_id: str,
        *,
        recipe: AdapterRecipe | None,
        pinned: bool = False,
        ttl_seconds: float | None = None,
        expected_generation: int | None = None,
    ) -> Alias:
        """Gives a name to an adapter; requests that run keep the adapter that they have.

        Args:
            tenant: owner.
            name: what to call it.
            adapter_id: the adapter.
            recipe: regenerates it, where something can.
            pinned: keep the adapter in memory.
            ttl_seconds: lifetime of the alias; None: no end.
            expected_generation: refuse where the name has another; 0: where it has any.

        Raises:
            InvalidInputError: a name that cannot be an alias, or one too many.
            GenerationConflictError: the name has another generation.
            RegistryUnavailableError: Redis cannot be asked.
        """
        check_alias_name(name)

        def bind(current: Alias | None) -> Alias:
            now = self._clock()
            return Alias(
                tenant,
                name,
                adapter_id,
                generation=1 if current is None else current.generation + 1,
                created_at=now,
                expires_at=None if ttl_seconds is None else now + ttl_seconds,
                pinned=pinned,
                recipe=recipe,
                token=token_hex(8),
            )

        return await self._change(tenant, name, bind, expected_generation)

    async def delete(self, tenant: str, name: str, expected_generation: int | None = None) -> Alias:
        """Frees a name; its generation is remembered. The alias as it was.

        Raises:
            AliasNotFoundError: the tenant has no such alias.
            GenerationConflictError: it has another generation.
            RegistryUnavailableError: Redis cannot be asked.
        """
        if not is_alias_name(name):
            raise AliasNotFoundError(_describe_absence(name, degraded=False))

        def end(current: Alias | None) -> Alias:
            now = self._clock()
            if current is None or not current.is_live(now):
                raise AliasNotFoundError(_describe_absence(name, degraded=False))
            return replace(current, deleted=True, expires_at=now, recipe=None, token=token_hex(8))

        return await self._change(tenant, name, end, expected_generation)

    async def restore(self) -> tuple[Alias, ...]:
        """Reads all tenants' aliases, at the start; the live ones.

        Raises:
            RedisUnavailableError: Redis cannot be asked.
        """
        if self._store is None:
            return ()
        try:
            for tenant in await self._store.list_tenants():
                await self._read_all(tenant, self._store)
        except RedisUnavailableError:
            self.restore_failed = True
            raise
        self.restore_failed = False
        return self._known.list_live(self._clock())

    def index_names(self) -> dict[str, tuple[str, ...]]:
        """Names by adapter id, all tenants', as this process knows them; for metrics."""
        index: dict[str, tuple[str, ...]] = {}
        for alias in self._known.list_live(self._clock()):
            index[alias.adapter_id] = (*index.get(alias.adapter_id, ()), alias.name)
        return index

    def pin(self, alias: Alias, record: AdapterRecord) -> None:
        """Keeps the adapter of a pinned alias in memory until the alias changes or ends.

        One for which there is no room (pinned on another replica) is served from the cache.
        """
        current = self._known.get(alias.tenant, alias.name)
        if not alias.pinned or current is None or current.version != alias.version:
            return
        if self.pins.find(alias.tenant, alias.name) is not record:
            self.pins.keep(alias.tenant, alias.name, record)

    def find_pinned(self, alias: Alias) -> AdapterRecord | None:
        """The adapter of a pinned alias, where this process holds it."""
        record = self.pins.find(alias.tenant, alias.name)
        return record if record is not None and record.adapter_id == alias.adapter_id else None

    async def _change(
        self,
        tenant: str,
        name: str,
        make: Callable[[Alias | None], Alias],
        expected_generation: int | None,
    ) -> Alias:
        for _ in range(_MAX_ATTEMPTS):
            try:
                stored, current = await self._read(tenant, name)
                self._check_generation(current, expected_generation)
                new = make(current)
                if current is None:
                    await self._check_names(tenant)
                if self._store is None or await self._write(self._store, stored, new):
                    self._remember(new)
                    return new
            except RedisUnavailableError:
                raise RegistryUnavailableError(
                    "Redis cannot be asked, and without it an alias could mean different "
                    "adapters on different replicas: try again later, and read the alias first, "
                    "because this change may have been made"
                ) from None
        raise GenerationConflictError("the alias is being changed by others all the time")

    async def _check_names(self, tenant: str) -> None:
        """Refuses one name too many, whichever this process knows of."""
        if await self._count_names(tenant) < MAX_NAMES:
            return
        if self._store is None:
            self._known.forget_ended(tenant, self._clock() - MEMORY_SECONDS)
        else:
            await self._read_all(tenant, self._store)  # forgets ended ones there, too
        if await self._count_names(tenant) >= MAX_NAMES:
            raise InvalidInputError(
                f"there are {MAX_NAMES} aliases already (ended ones count for a while): "
                "use fewer names"
            )

    async def _count_names(self, tenant: str) -> int:
        num_known = len(self._known.list_names(tenant))
        if self._store is None:
            return num_known
        return max(num_known, await self._store.count_names(tenant))

    def _check_generation(self, current: Alias | None, expected: int | None) -> None:
        live = current is not None and current.is_live(self._clock())
        generation = current.generation if current is not None and live else 0
        if expected is not None and expected != generation:
            state = f"has generation {generation}" if live else "does not exist (generation 0)"
            raise GenerationConflictError(
                f"the alias {state}, not {expected}: read it again, then decide"
            )

    async def _read(self, tenant: str, name: str) -> tuple[Stored, Alias | None]:
        """What Redis holds, and what counts: that, or a newer state that Redis has lost."""
        if self._store is None:
            return Stored(), self._known.get(tenant, name)
        stored = await self._store.read(tenant, name)
        return await self._settle(self._store, tenant, name, stored)

    async def _read_all(self, tenant: str, store: RedisAliasStore) -> None:
        held = await store.read_all(tenant)
        oldest = self._clock() - MEMORY_SECONDS
        for name in held.keys() | self._known.list_names(tenant):
            stored, alias = await self._settle(store, tenant, name, held.get(name, Stored()))
            if alias is not None and alias.has_expired_before(oldest):
                await store.forget(tenant, name, stored)
                self._known.forget(tenant, name)

    async def _settle(
        self, store: RedisAliasStore, tenant: str, name: str, stored: Stored
    ) -> tuple[Stored, Alias | None]:
        known = self._known.get(tenant, name)
        if known is not None and _is_older(stored.alias, known):
            stored = await store.compare_and_set(stored, known)
            if _is_older(stored.alias, known):  # somebody else's hand is in it: next time
                return stored, known
        elif stored.alias is None and stored.value:
            await store.forget(tenant, name, stored)
            stored = Stored()
        if stored.alias is not None:
            self._remember(stored.alias)
        return stored, stored.alias

    async def _write(self, store: RedisAliasStore, old: Stored, new: Alias) -> bool:
        return (await store.compare_and_set(old, new)).alias == new

    def _remember(self, alias: Alias) -> None:
        if self._known.put(alias):
            self.pins.drop(alias.tenant, alias.name)


def _is_older(alias: Alias | None, known: Alias) -> bool:
    return alias is None or alias.version < known.version


def _describe_absence(name: str, degraded: bool) -> str:
    if degraded:
        return (
            f"this process knows no alias {name[:64]!r} and Redis could not be asked: "
            "try again later"
        )
    return f"there is no alias {name[:64]!r}: create it with PUT /v1/aliases/{{name}}"
