"""Standardisation of adapter vectors, fitted on the training set as a whole."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidAdapterError, InvalidInputError
from service.synthesis.layout import AdapterLayout


@dataclass(frozen=True)
class AdapterNormalizer:
    """`n = (l - mean) / scale`: mean adapter elementwise, one scale per tensor.

    The mean is the uniform Model Soup over tasks, so the zero vector stands for the soup.
    Scales are powers of two (the standard deviation rounded up): dividing and multiplying
    by them loses no bit, and the sums stay within one rounding of float32.

    Attributes:
        mean: mean adapter of the training set.
        scale: scale of each value, equal within a tensor.
    """

    mean: Float[Tensor, " num_params"]
    scale: Float[Tensor, " num_params"]

    @classmethod
    def fit(
        cls, layout: AdapterLayout, tasks: Mapping[str, Float[Tensor, "checkpoints num_params"]]
    ) -> "AdapterNormalizer":
        """Fits on all checkpoints of all tasks, each task with equal weight.

        Raises:
            InvalidInputError: no task, or values that are not finite.
        """
        if not tasks:
            raise InvalidInputError("cannot fit a normaliser on no tasks")
        stacked = torch.stack([vectors.double().mean(0) for vectors in tasks.values()])
        if not torch.isfinite(stacked).all():
            raise InvalidInputError("training adapters hold values that are not finite")
        mean = stacked.mean(0)
        variance = torch.stack(
            [(vectors.double() - mean).square().mean(0) for vectors in tasks.values()]
        ).mean(0)
        scale = torch.empty_like(mean)
        for entry in layout.entries:
            deviation = variance[entry.span].mean().sqrt().clamp_min(2.0**-20)
            scale[entry.span] = torch.exp2(torch.ceil(torch.log2(deviation)))
        return cls(mean.float(), scale.float())

    def normalize(
        self, vectors: Float[Tensor, "*batch num_params"]
    ) -> Float[Tensor, "*batch num_params"]:
        """Adapter vectors to normalised ones."""
        return (vectors - self.mean) / self.scale

    def denormalize(
        self, normalized: Float[Tensor, "*batch num_params"]
    ) -> Float[Tensor, "*batch num_params"]:
        """Normalised vectors back to adapter vectors."""
        return normalized * self.scale + self.mean

    def state_dict(self, layout: AdapterLayout) -> dict[str, Tensor]:
        """Tensors for safetensors: `mean [num_params]` and `scale [num_tensors]`."""
        return {"mean": self.mean, "scale": self.scale[[e.offset for e in layout.entries]]}

    @classmethod
    def from_state_dict(
        cls, layout: AdapterLayout, state: Mapping[str, Tensor]
    ) -> "AdapterNormalizer":
        """Reads `state_dict`.

        Raises:
            InvalidAdapterError: missing, of another shape, not finite, or a scale <= 0.
        """
        shapes = {"mean": (layout.num_params,), "scale": (len(layout.entries),)}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != shapes:
            raise InvalidAdapterError("statistics do not match the adapter layout")
        mean, per_tensor = state["mean"].float(), state["scale"].float()
        if not (torch.isfinite(mean).all() and torch.isfinite(per_tensor).all()):
            raise InvalidAdapterError("statistics are not finite")
        if not (per_tensor > 0).all():
            raise InvalidAdapterError("statistics hold a scale that is not positive")
        counts = torch.tensor([entry.numel for entry in layout.entries])
        return cls(mean, per_tensor.repeat_interleave(counts))
