"""What determines the networks of a generator."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from service.errors import InvalidBundleError


@dataclass(frozen=True)
class GeneratorConfig:
    """What determines the networks, besides the adapter layout.

    Attributes:
        preset: `paper` (flat vector, strided convolutions), `token` (a token per module), or
            `in_context` (as `token`, over the nearest training tasks' adapters).
        condition_dim: length of a task vector.
        latent_dim: length of z.
        depth: convolutional layers each way; the paper's 12.
        width: channels; for `paper` the widest layer.
        chunk_size: not `paper`: a module with more values is cut into several tokens.
        num_prototypes: not `paper`: training tasks that the decoder attends over.
        attention_temperature: not `paper`: of that attention, in units of cosine; training of
            `in_context` replaces it by a better one.
        num_neighbours: `in_context` only: nearest training tasks that are looked at.
    """

    preset: str
    condition_dim: int
    latent_dim: int
    depth: int = 12
    width: int = 256
    chunk_size: int = 256
    num_prototypes: int = 1
    attention_temperature: float = 0.03
    num_neighbours: int = 8

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "GeneratorConfig":
        """Reads `to_json`.

        Raises:
            InvalidBundleError: unknown keys, or a value of the wrong type.
        """
        try:
            return cls(**body)
        except TypeError as error:
            raise InvalidBundleError(f"generator config: {error}") from error
