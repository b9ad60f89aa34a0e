"""What a process knows of aliases: all tenants' names, with those that ended and count on."""

from collections import defaultdict

from service.adapters.alias import Alias


class AliasMemory:
    """The last state that was seen of each name; used from the event loop's thread only."""

    def __init__(self) -> None:
        self._known: defaultdict[str, dict[str, Alias]] = defaultdict(dict)

    def get(self, tenant: str, name: str) -> Alias | None:
        """What is known of a name."""
        return self._known[tenant].get(name)

    def put(self, alias: Alias) -> bool:
        """Remembers a state; whether it is another one than before."""
        names = self._known[alias.tenant]
        is_new = names.get(alias.name) != alias
        names[alias.name] = alias
        return is_new

    def list_names(self, tenant: str) -> set[str]:
        """All names of a tenant."""
        return set(self._known[tenant])

    def list_live(self, now: float, tenant: str | None = None) -> tuple[Alias, ...]:
        """Aliases that stand for an adapter, of a tenant or of all."""
        tenants = self._known.values() if tenant is None else [self._known[tenant]]
        every = (alias for names in tenants for alias in names.values())
        return tuple(alias for alias in every if alias.is_live(now))

    def forget(self, tenant: str, name: str) -> None:
        """Drops a name."""
        self._known[tenant].pop(name, None)

    def forget_ended(self, tenant: str, oldest: float) -> None:
        """Drops a tenant's names that ended before this time."""
        names = self._known[tenant]
        for name in [n for n, alias in names.items() if alias.has_expired_before(oldest)]:
            del names[name]
