"""Adapter layout: the only place that knows how a flat adapter vector maps to tensors."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from service.errors import InvalidAdapterError, InvalidInputError


class AdapterKind(StrEnum):
    """How an adapter parameterises the update of a frozen weight `W [out, in]`.

    Attributes:
        LORA: `delta W = alpha/r * B A`, both trained (Hu et al. 2021; the paper's kind).
        LORA_SHARED_A: `A` is one frozen random projection for all tasks, only `B` is trained.
        CORE: `delta W = alpha/r * B R A` with `A`, `B` the top-r singular bases of `W`, only
            `R [r, r]` trained (LoRA-XS, Balazy et al. 2024).
    """

    LORA = "lora"
    LORA_SHARED_A = "lora_shared_a"
    CORE = "core"


@dataclass(frozen=True, slots=True)
class AdaptedModule:
    """One `nn.Linear` of the base model that adapters update.

    Attributes:
        path: dotted module path in the base model.
        in_features: columns of its weight.
        out_features: rows of its weight.
    """

    path: str
    in_features: int
    out_features: int

    @property
    def role(self) -> str:
        """Last component of the path, the same in every layer (`q_proj`)."""
        return self.path.rsplit(".", 1)[-1]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one trained tensor of one module lies in the adapter vector."""

    module: str
    tensor: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of values of the tensor."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def span(self) -> slice:
        """Its half-open range in the adapter vector."""
        return slice(self.offset, self.offset + self.numel)


@dataclass(frozen=True)
class AdapterLayout:
    """Frozen, ordered list of the trained tensors of an adapter.

    Args:
        kind: parameterisation of the update.
        rank: r, shared by all modules.
        alpha: LoRA numerator; updates are scaled by `alpha / rank`.
        modules: adapted modules in the base model's order.

    Raises:
        InvalidInputError: no modules, a module twice, a rank that does not fit a module, or an
            alpha that is not positive.
    """

    kind: AdapterKind
    rank: int
    alpha: float
    modules: tuple[AdaptedModule, ...]

    def __post_init__(self) -> None:
        if not self.modules:
            raise InvalidInputError("an adapter layout needs at least one module")
        if len({module.path for module in self.modules}) != len(self.modules):
            raise InvalidInputError("an adapter layout names a module twice")
        largest = min(min(m.in_features, m.out_features) for m in self.modules)
        if not 1 <= self.rank <= largest:
            raise InvalidInputError(
                f"rank {self.rank} does not fit: choose 1..{largest} (the smallest module side)"
            )
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InvalidInputError(f"alpha {self.alpha} does not fit: choose a positive number")

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        *,
        kind: AdapterKind | str,
        rank: int,
        alpha: float,
        target_modules: Sequence[str],
    ) -> "AdapterLayout":
        """Selects every `nn.Linear` whose last path component is in `target_modules`.

        Raises:
            InvalidInputError: a name of `target_modules` that matches no linear module.
        """
        wanted = set(target_modules)
        modules = tuple(
            AdaptedModule(path, linear.in_features, linear.out_features)
            for path, linear in model.named_modules()
            if isinstance(linear, nn.Linear) and path.rsplit(".", 1)[-1] in wanted
        )
        if missing := wanted - {module.role for module in modules}:
            raise InvalidInputError(f"no linear module of the base is named {sorted(missing)}")
        return cls(AdapterKind(kind), rank, float(alpha), modules)

    @property
    def scaling(self) -> float:
        """`alpha / rank`, the factor on every update."""
        return self.alpha / self.rank

    @cached_property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Trained tensors in vector order."""
        entries: list[TensorEntry] = []
        offset = 0
        for module in self.modules:
            for tensor, shape in self._tensor_shapes(module):
                entry = TensorEntry(module.path, tensor, shape, offset)
                entries.append(entry)
                offset += entry.numel
        return tuple(entries)

    @cached_property
    def spans(self) -> dict[tuple[str, str], TensorEntry]:
        """Entries by (module path, tensor name)."""
        return {(entry.module, entry.tensor): entry for entry in self.entries}

    @property
    def num_params(self) -> int:
        """Length of an adapter vector."""
        last = self.entries[-1]
        return last.offset + last.numel

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """Distinct module roles, in order of first appearance."""
        return tuple(dict.fromkeys(module.role for module in self.modules))

    @cached_property
    def digest(self) -> str:
        """sha256 over kind, rank, alpha, modules and entries: equal digest, equal meaning."""
        body = {
            "kind": self.kind.value,
            "rank": self.rank,
            "alpha": self.alpha,
            "modules": [[m.path, m.in_features, m.out_features] for m in self.modules],
            "entries": [[e.module, e.tensor, list(e.shape), e.offset] for e in self.entries],
        }
        canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _tensor_shapes(self, module: AdaptedModule) -> tuple[tuple[str, tuple[int, ...]], ...]:
        lora_a = ("lora_A", (self.rank, module.in_features))
        lora_b = ("lora_B", (module.out_features, self.rank))
        match self.kind:
            case AdapterKind.LORA:
                return (lora_a, lora_b)
            case AdapterKind.LORA_SHARED_A:
                return (lora_b,)
            case AdapterKind.CORE:
                return (("core", (self.rank, self.rank)),)

    def flatten(self, tensors: Mapping[tuple[str, str], Tensor]) -> Float[Tensor, " num_params"]:
        """Concatenates one adapter's tensors, keyed by (module path, tensor name).

        Raises:
            InvalidAdapterError: a tensor is missing, unknown or has another shape.
        """
        if unknown := set(tensors) - set(self.spans):
            raise InvalidAdapterError(f"tensors that the layout does not know: {sorted(unknown)}")
        flat: list[Tensor] = []
        for key, entry in self.spans.items():
            if key not in tensors:
                raise InvalidAdapterError(f"tensor {key} is missing")
            if tuple(tensors[key].shape) != entry.shape:
                raise InvalidAdapterError(
                    f"tensor {key} has shape {tuple(tensors[key].shape)}, expected {entry.shape}"
                )
            flat.append(tensors[key].reshape(-1))
        return torch.cat(flat)

    def unflatten(self, vector: Float[Tensor, " num_params"]) -> dict[tuple[str, str], Tensor]:
        """Views of an adapter vector, keyed by (module path, tensor name).

        Raises:
            InvalidAdapterError: the vector has another length.
        """
        if vector.ndim != 1 or vector.shape[0] != self.num_params:
            raise InvalidAdapterError(
                f"adapter vector has shape {tuple(vector.shape)}, expected ({self.num_params},)"
            )
        return {key: vector[e.span].view(e.shape) for key, e in self.spans.items()}

    def to_json(self) -> dict[str, Any]:
        """JSON form, with the digest that `from_json` checks."""
        return {
            "kind": self.kind.value,
            "rank": self.rank,
            "alpha": self.alpha,
            "modules": [[m.path, m.in_features, m.out_features] for m in self.modules],
            "num_params": self.num_params,
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "AdapterLayout":
        """Reads `to_json`.

        Raises:
            InvalidAdapterError: malformed, or its digest does not match its content.
        """
        try:
            modules = tuple(AdaptedModule(str(p), int(i), int(o)) for p, i, o in body["modules"])
            layout = cls(
                AdapterKind(body["kind"]), int(body["rank"]), float(body["alpha"]), modules
            )
            digest = body["digest"]
        except (KeyError, TypeError, ValueError, OverflowError, InvalidInputError) as error:
            raise InvalidAdapterError(f"malformed adapter layout: {error}") from error
        if layout.digest != digest:
            raise InvalidAdapterError("the adapter layout does not match its digest")
        return layout
