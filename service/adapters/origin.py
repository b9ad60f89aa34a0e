"""Where an adapter comes from: a recipe, which makes it again, or somebody who uploaded it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from service.synthesis.adapter_recipe import AdapterRecipe


@dataclass(frozen=True)
class AdapterUpload:
    """An adapter that was trained elsewhere: nothing but its vector says what it is.

    Attributes:
        tenant: owner.
        bundle_digest: bundle whose bases give the vector its meaning.
        layout_digest: layout of the vector.
        vector_sha256: sha256 of the vector's bytes.
    """

    tenant: str
    bundle_digest: str
    layout_digest: str
    vector_sha256: str

    @cached_property
    def adapter_id(self) -> str:
        """sha256 of all of it, 64 hexadecimal digits."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return asdict(self)


Origin = AdapterRecipe | AdapterUpload
