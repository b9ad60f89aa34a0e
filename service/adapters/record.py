"""An adapter as it is cached: its vector, and the facts that a receipt states."""

import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float16
from safetensors import SafetensorError
from torch import Tensor

from service.adapters.origin import AdapterUpload, Origin
from service.errors import InvalidAdapterError, InvalidInputError
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.layout import AdapterLayout
from service.synthesis.synthesizer import (
    VECTOR_DTYPE,
    NearestTask,
    SynthesizedAdapter,
    digest_vector,
)

_METADATA_KEY = "record"
_HEADER_LENGTH_BYTES = 8
_MALFORMED = (
    SafetensorError,
    InvalidInputError,
    KeyError,
    TypeError,
    ValueError,
    RecursionError,  # JSON nested thousands deep
)


@dataclass(frozen=True, eq=False)
class AdapterRecord:
    """One adapter. Records are shared between requests: never write to `vector`.

    Attributes:
        origin: what the adapter was generated from, or who uploaded it; determines its id.
        layout_digest: digest of the layout that gives `vector` its meaning.
        vector: the canonical adapter values, on the CPU.
        vector_sha256: sha256 of the bytes of `vector`.
        nearest: training tasks most similar to the description, nearest first; none for an upload.
        in_distribution: how much the description resembles the training tasks, 0..1; None for an
            upload.
    """

    origin: Origin
    layout_digest: str
    vector: Float16[Tensor, " num_params"]
    vector_sha256: str
    nearest: tuple[NearestTask, ...]
    in_distribution: float | None

    @classmethod
    def from_synthesized(
        cls, adapter: SynthesizedAdapter, layout: AdapterLayout
    ) -> "AdapterRecord":
        """Takes over what the synthesizer made, without copying the vector."""
        return cls(
            adapter.recipe,
            layout.digest,
            adapter.vector,
            adapter.vector_sha256,
            adapter.nearest,
            adapter.in_distribution,
        )

    @property
    def adapter_id(self) -> str:
        """sha256 of the origin, in hex."""
        return self.origin.adapter_id

    @property
    def recipe(self) -> AdapterRecipe | None:
        """What it was generated from; None for an upload."""
        return self.origin if isinstance(self.origin, AdapterRecipe) else None

    @property
    def task(self) -> str:
        """The words that it was generated from; empty where there were none."""
        return self.origin.task if isinstance(self.origin, AdapterRecipe) else ""

    @property
    def strength(self) -> float:
        """Factor on the whole update; 1 for an upload."""
        return self.origin.strength if isinstance(self.origin, AdapterRecipe) else 1.0

    @property
    def tenant(self) -> str:
        """Its owner; nobody else may see it."""
        return self.origin.tenant

    @property
    def regenerable(self) -> bool:
        """Whether the recipe alone makes it again; examples are not kept."""
        return self.recipe is not None and not self.recipe.examples

    @property
    def bundle_digest(self) -> str:
        """Bundle whose layout and bases give the vector its meaning."""
        return self.origin.bundle_digest

    @property
    def size_bytes(self) -> int:
        """Size of the vector in bytes."""
        return self.vector.nbytes

    def to_bytes(self) -> bytes:
        """The record as safetensors: the tensor `vector`, the rest as JSON in the header."""
        body = {
            "recipe" if self.recipe is not None else "upload": self.origin.to_json(),
            "layout_digest": self.layout_digest,
            "vector_sha256": self.vector_sha256,
            "nearest": [[task.name, task.similarity] for task in self.nearest],
            "in_distribution": self.in_distribution,
        }
        metadata = {_METADATA_KEY: json.dumps(body, sort_keys=True, allow_nan=False)}
        return safetensors.torch.save({"vector": self.vector}, metadata=metadata)

    @classmethod
    def from_upload(
        cls,
        vector: Float16[Tensor, " num_params"],
        layout: AdapterLayout,
        *,
        tenant: str,
        bundle_digest: str,
    ) -> "AdapterRecord":
        """The record of an adapter that was trained elsewhere."""
        vector_sha256 = digest_vector(vector)
        upload = AdapterUpload(tenant, bundle_digest, layout.digest, vector_sha256)
        return cls(upload, layout.digest, vector, vector_sha256, (), None)

    @classmethod
    def from_bytes(cls, content: bytes, layout: AdapterLayout) -> "AdapterRecord":
        """Reads `to_bytes`, trusting nothing.

        Raises:
            InvalidAdapterError: the bytes are malformed, of another layout, altered (the
                vector does not have its sha256), or not finite.
        """
        try:
            vector = safetensors.torch.load(content)["vector"]
            body = json.loads(_read_header(content)["__metadata__"][_METADATA_KEY])
            layout_digest, vector_sha256 = body["layout_digest"], body["vector_sha256"]
            origin = _read_origin(body)
            nearest = tuple(NearestTask(str(n), float(s)) for n, s in body["nearest"])
            score = body["in_distribution"]
            in_distribution = None if score is None else float(score)
        except _MALFORMED as error:
            raise InvalidAdapterError(f"malformed adapter record: {error}") from error
        if layout_digest != layout.digest:
            raise InvalidAdapterError("the adapter record belongs to another adapter layout")
        if vector.shape != (layout.num_params,) or vector.dtype != VECTOR_DTYPE:
            raise InvalidAdapterError(
                f"the adapter record holds {vector.dtype} of shape {tuple(vector.shape)}, "
                f"expected {VECTOR_DTYPE} of shape ({layout.num_params},)"
            )
        if digest_vector(vector) != vector_sha256:
            raise InvalidAdapterError("the adapter record does not match its sha256")
        if not torch.isfinite(vector).all():
            raise InvalidAdapterError("the adapter record holds values that are not finite")
        if isinstance(origin, AdapterUpload) and (origin.layout_digest, origin.vector_sha256) != (
            layout_digest,
            vector_sha256,
        ):
            raise InvalidAdapterError("the adapter record belongs to another upload")
        return cls(origin, layout_digest, vector, vector_sha256, nearest, in_distribution)


def _read_origin(body: dict[str, Any]) -> Origin:
    if "upload" in body:
        return AdapterUpload(**body["upload"])
    return AdapterRecipe.from_json(body["recipe"])


def _read_header(content: bytes) -> dict[str, Any]:
    """Header of a safetensors file: 8 bytes of little-endian length, then JSON.

    `safetensors.torch.load` checks it but does not return its metadata.
    """
    length = int.from_bytes(content[:_HEADER_LENGTH_BYTES], "little")
    end = _HEADER_LENGTH_BYTES + length
    header: dict[str, Any] = json.loads(content[_HEADER_LENGTH_BYTES:end])
    return header
