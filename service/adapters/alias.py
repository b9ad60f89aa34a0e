"""An alias: a tenant's name for an adapter, numbered anew whenever it is given away again."""

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from service.errors import InvalidInputError
from service.synthesis.adapter_recipe import AdapterRecipe

RESERVED_NAME = "base"
NAME_PATTERN = r"[A-Za-z0-9._-]{1,64}"
_ID_PATTERN = "[0-9a-f]{64}"


@dataclass(frozen=True)
class Alias:
    """One state of a name; a later state has a larger `version`.

    Attributes:
        tenant: owner.
        name: unique for the tenant.
        adapter_id: what it stands for.
        generation: 1 at first, and 1 more with every replacement; goes on after a deletion.
        created_at: when this generation was made, seconds since 1970.
        expires_at: when it ends, seconds since 1970; None: never.
        pinned: whether its adapter stays in the process's memory.
        recipe: regenerates the adapter; None where nothing could.
        deleted: the name is free (since `expires_at`), and only its generation is remembered.
        token: random, so that no two writers write equal bytes.
    """

    tenant: str
    name: str
    adapter_id: str
    generation: int
    created_at: float
    expires_at: float | None = None
    pinned: bool = False
    recipe: AdapterRecipe | None = None
    deleted: bool = False
    token: str = ""

    @property
    def version(self) -> tuple[int, bool]:
        """Orders the states of a name."""
        return self.generation, self.deleted

    def is_live(self, now: float) -> bool:
        """Whether the name stands for its adapter at this time."""
        return not self.deleted and (self.expires_at is None or now < self.expires_at)

    def has_expired_before(self, time: float) -> bool:
        """Whether it had an end, and that came before this time."""
        return self.expires_at is not None and self.expires_at < time

    def to_bytes(self) -> bytes:
        """As JSON."""
        body = asdict(self) | {"recipe": self.recipe.to_json() if self.recipe else None}
        return json.dumps(body, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Alias":
        """Reads `to_bytes`.

        Raises:
            InvalidInputError: malformed.
        """
        try:
            body: dict[str, Any] = json.loads(content)
            recipe = body.pop("recipe")
            return cls(**body, recipe=None if recipe is None else AdapterRecipe.from_json(recipe))
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise InvalidInputError(f"malformed alias: {error}") from error


def is_alias_name(name: str) -> bool:
    """Whether it may be an alias; a model name always means one thing only."""
    return bool(re.fullmatch(NAME_PATTERN, name)) and not _is_reserved(name)


def check_alias_name(name: str) -> None:
    """Refuses what may not be an alias.

    Raises:
        InvalidInputError: it may not.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidInputError(
            "an alias has 1 to 64 characters of A-Z, a-z, 0-9, dot, underscore and hyphen"
        )
    if _is_reserved(name):
        raise InvalidInputError(
            f"{name!r} cannot be an alias: it names the base model or is an adapter's id"
        )


def _is_reserved(name: str) -> bool:
    return name == RESERVED_NAME or bool(re.fullmatch(_ID_PATTERN, name))
