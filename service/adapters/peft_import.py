"""LoRAs trained elsewhere, brought into the layout that the bank holds.

With `delta W = s_u B_u A_u` uploaded and `delta W = s B M A` in the layout: kind `lora` takes
`A = A_u`, `B = B_u s_u / s`, a smaller rank padded with zeros. The other kinds have frozen factors,
so the update must lie in their span: the least-squares solution is `M = B^+ (s_u B_u A_u) A^+ / s`
(`lora_shared_a` has no `B` of its own and solves for it), and what it leaves over must be small.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float16
from torch import Tensor

from service.adapters.peft_format import parse_peft_config, parse_peft_weights
from service.errors import InvalidAdapterError
from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout
from service.synthesis.synthesizer import VECTOR_DTYPE

MAX_RESIDUAL = 1e-3
"""Largest part of a module's update, in the Frobenius norm, that frozen factors may lose."""

_SHOWN = 4


def read_peft_upload(
    config: bytes, weights: bytes, layout: AdapterLayout, bases: AdapterBases
) -> Float16[Tensor, " num_params"]:
    """The adapter vector of a PEFT LoRA; blocking.

    Args:
        config: bytes of `adapter_config.json`.
        weights: bytes of `adapter_model.safetensors`.
        layout: what the bank holds.
        bases: frozen factors of the layout.

    Raises:
        InvalidAdapterError: malformed, more than a plain LoRA, for other modules, of a rank that
            does not fit, outside of what frozen factors can express, or not finite.
    """
    settings = parse_peft_config(config)
    rank = settings["r"]
    pairs = _pair_factors(parse_peft_weights(weights), layout, rank)
    if layout.kind is AdapterKind.LORA and rank > layout.rank:
        raise InvalidAdapterError(
            f"the adapter has rank {rank}, and this bank holds up to {layout.rank}: train it with "
            "a smaller one"
        )
    scaling = settings["lora_alpha"] / rank / layout.scaling
    tensors: dict[tuple[str, str], Tensor] = {}
    residuals: dict[str, float] = {}
    for module in layout.modules:
        path, (down, up) = module.path, pairs[module.path]
        up = up * scaling
        match layout.kind:
            case AdapterKind.LORA:
                tensors[path, "lora_A"] = _pad(down, (layout.rank, module.in_features))
                tensors[path, "lora_B"] = _pad(up, (module.out_features, layout.rank))
            case AdapterKind.LORA_SHARED_A:
                frozen = bases.tensors[path, "A"].double()
                solved = up @ (down @ torch.linalg.pinv(frozen))
                tensors[path, "lora_B"] = solved
                residuals[path] = _measure_residual(down, up, frozen, solved)
            case AdapterKind.CORE:
                frozen, left = bases.tensors[path, "A"].double(), bases.tensors[path, "B"].double()
                core = torch.linalg.pinv(left) @ up @ (down @ torch.linalg.pinv(frozen))
                tensors[path, "core"] = core
                residuals[path] = _measure_residual(down, up, frozen, left @ core)
    _check_residuals(residuals, layout)
    vector = layout.flatten(tensors).to(VECTOR_DTYPE)
    if not torch.isfinite(vector).all():
        raise InvalidAdapterError(f"the adapter holds values that are not finite in {VECTOR_DTYPE}")
    return vector


def _pair_factors(
    factors: Mapping[tuple[str, str], Tensor], layout: AdapterLayout, rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """`lora_A` and `lora_B` of each module of the layout in float64, and of no other."""
    expected = {(m.path, name) for m in layout.modules for name in ("lora_A", "lora_B")}
    for problem, names in (
        ("lacks", expected - factors.keys()),
        ("has", factors.keys() - expected),
    ):
        if names:
            shown = ", ".join(".".join(name)[:100] for name in sorted(names)[:_SHOWN])
            raise InvalidAdapterError(
                f"the adapter {problem} {len(names)} tensor(s), such as {shown}: this bank adapts "
                f"{', '.join(layout.roles)} in {len(layout.modules)} modules, all of them"
            )
    return {module.path: _check_pair(factors, module, rank) for module in layout.modules}


def _check_pair(
    factors: Mapping[tuple[str, str], Tensor], module: AdaptedModule, rank: int
) -> tuple[Tensor, Tensor]:
    down, up = factors[module.path, "lora_A"], factors[module.path, "lora_B"]
    shapes = (tuple(down.shape), tuple(up.shape))
    expected = ((rank, module.in_features), (module.out_features, rank))
    if shapes != expected:
        raise InvalidAdapterError(
            f"{module.path}: lora_A and lora_B have shapes {shapes}, expected {expected}"
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise InvalidAdapterError(f"{module.path}: the adapter holds values that are not finite")
    return down.double(), up.double()


def _pad(factor: Tensor, shape: tuple[int, int]) -> Tensor:
    padded = factor.new_zeros(shape)
    padded[: factor.shape[0], : factor.shape[1]] = factor
    return padded


def _measure_residual(
    down: Float[Tensor, "r_u in_features"],
    up: Float[Tensor, "out_features r_u"],
    frozen: Float[Tensor, "r in_features"],
    solved: Float[Tensor, "out_features r"],
) -> float:
    """`|up down - solved frozen| / |up down|` in the Frobenius norm, from small factors only."""
    whole = _product_norm(up, down)
    left = _product_norm(torch.cat([up, -solved], dim=1), torch.cat([down, frozen]))
    return float(left / whole) if whole > 0 else 0.0


def _product_norm(left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> Tensor:
    """Frobenius norm of a product: that of `R_left R_right^T`, from two thin QRs."""
    triangles = [torch.linalg.qr(tall, mode="r").R for tall in (left, right.T)]
    norm: Tensor = torch.linalg.matrix_norm(triangles[0] @ triangles[1].T)
    return norm


def _check_residuals(residuals: Mapping[str, float], layout: AdapterLayout) -> None:
    worst = max(residuals, key=lambda path: residuals[path], default=None)
    if worst is not None and not residuals[worst] <= MAX_RESIDUAL:
        raise InvalidAdapterError(
            f"{worst}: {residuals[worst]:.3g} of the update lies outside of what adapters of kind "
            f"{layout.kind.value!r} can express (at most {MAX_RESIDUAL:g} may): their factors are "
            "frozen, so only adapters made for this bundle fit"
        )
