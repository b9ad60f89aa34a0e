"""Frozen bases that all adapters of a kind share, and expansion to plain LoRA factors."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from service.errors import InvalidAdapterError
from service.synthesis.layout import AdapterKind, AdapterLayout

BASES_DTYPE = torch.float16
"""Bases are rounded to this dtype when made, so training and serving use the same numbers."""


class AdapterBases:
    """Frozen factors per module: `A [r, in]` (shared-A, core) and `B [out, r]` (core).

    Args:
        layout: the layout that the bases belong to.
        tensors: keyed by (module path, "A" | "B"); empty for kind `lora`.

    Raises:
        InvalidAdapterError: a base is missing, unknown, of another shape, or not finite.
    """

    def __init__(self, layout: AdapterLayout, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        expected = _expected_shapes(layout)
        if set(tensors) != set(expected):
            raise InvalidAdapterError(
                f"bases do not match the layout: {sorted(set(tensors) ^ set(expected))[:4]}"
            )
        for key, shape in expected.items():
            if tuple(tensors[key].shape) != shape:
                raise InvalidAdapterError(f"base {key} has shape {tuple(tensors[key].shape)}")
        self.layout = layout
        self.tensors = {key: tensors[key].to(BASES_DTYPE) for key in expected}
        for key, base in self.tensors.items():
            if not torch.isfinite(base).all():
                raise InvalidAdapterError(f"base {key} is not finite in {BASES_DTYPE}")

    @classmethod
    def from_model(cls, layout: AdapterLayout, model: nn.Module, seed: int = 0) -> "AdapterBases":
        """Makes the bases for a frozen model.

        `core`: with the thin SVD `W = U S V^T`, `A = V_r^T` and `B = U_r * S_r / mean(S_r)`:
        the singular directions of LoRA-XS, scaled so that one learning rate fits every module.
        `lora_shared_a`: one Gaussian `A ~ N(0, 1/in)` per module, drawn from `seed`.
        """
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[tuple[str, str], Tensor] = {}
        for module in layout.modules:
            if layout.kind is AdapterKind.LORA_SHARED_A:
                noise = torch.randn(layout.rank, module.in_features, generator=generator)
                tensors[module.path, "A"] = noise / module.in_features**0.5
            elif layout.kind is AdapterKind.CORE:
                weight = model.get_parameter(f"{module.path}.weight").detach()
                left, sigma, right = torch.linalg.svd(weight.float().cpu(), full_matrices=False)
                gain = sigma[: layout.rank] / sigma[: layout.rank].mean()
                tensors[module.path, "A"] = right[: layout.rank].contiguous()
                tensors[module.path, "B"] = left[:, : layout.rank] * gain
        return cls(layout, {key: base.to(BASES_DTYPE) for key, base in tensors.items()})

    def expand(
        self, vector: Float[Tensor, " num_params"]
    ) -> dict[str, tuple[Float[Tensor, "r in_features"], Float[Tensor, "out_features r"]]]:
        """Plain LoRA factors `(A, B)` per module, float32, with `delta W = alpha/r * B A`."""
        tensors = self.layout.unflatten(vector.float())
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for module in self.layout.modules:
            path = module.path
            match self.layout.kind:
                case AdapterKind.LORA:
                    factors[path] = (tensors[path, "lora_A"], tensors[path, "lora_B"])
                case AdapterKind.LORA_SHARED_A:
                    factors[path] = (self.tensors[path, "A"].float(), tensors[path, "lora_B"])
                case AdapterKind.CORE:
                    down = tensors[path, "core"] @ self.tensors[path, "A"].float()
                    factors[path] = (down, self.tensors[path, "B"].float())
        return factors

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for safetensors, named `<module path>.<A|B>`."""
        return {f"{path}.{name}": tensor for (path, name), tensor in self.tensors.items()}

    @classmethod
    def from_state_dict(cls, layout: AdapterLayout, state: Mapping[str, Tensor]) -> "AdapterBases":
        """Reads `state_dict`."""
        return cls(layout, {_split_name(name): tensor for name, tensor in state.items()})


def take_triangle(tall: Float[Tensor, "*batch n r"]) -> Float[Tensor, "*batch k r"]:
    """R of the thin QR: `tall = Q R`, so products keep their singular values with R instead."""
    triangle: Tensor = torch.linalg.qr(tall, mode="r").R
    return triangle


def _split_name(name: str) -> tuple[str, str]:
    path, _, base = name.rpartition(".")
    return path, base


def _expected_shapes(layout: AdapterLayout) -> dict[tuple[str, str], tuple[int, int]]:
    shapes: dict[tuple[str, str], tuple[int, int]] = {}
    for module in layout.modules:
        if layout.kind is not AdapterKind.LORA:
            shapes[module.path, "A"] = (layout.rank, module.in_features)
        if layout.kind is AdapterKind.CORE:
            shapes[module.path, "B"] = (module.out_features, layout.rank)
    return shapes
