"""Distances of adapters as updates of the base, not as vectors.

An adapter is what it adds to the weights, `delta W = alpha/r B [R] A` of every module; its vector
is one of many with that update (kind `lora`), or has scales of its own (kind `core`). Updates
`[out, in]` are never built. With QR decompositions `B = Q_B T_B` and `A^T = Q_A T_A`, the product
`B M A` has the Frobenius norm of `T_B M T_A^T`, of a few rows and columns; and
`<B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T))`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from service.synthesis.bases import AdapterBases, take_triangle
from service.synthesis.layout import AdaptedModule, AdapterKind


@dataclass(frozen=True)
class UpdateError:
    """An update against another one, or the difference of two such measures.

    Attributes:
        relative_error: `|U - V|_F / |V|_F`; infinite where only V is zero.
        cosine: `<U, V> / (|U|_F |V|_F)`; 0 where one is zero.
    """

    relative_error: float
    cosine: float

    def __sub__(self, other: "UpdateError") -> "UpdateError":
        """Difference of both measures."""
        return UpdateError(self.relative_error - other.relative_error, self.cosine - other.cosine)


@dataclass(frozen=True)
class UpdateComparison:
    """All modules as one update, and each by itself.

    Attributes:
        whole: over all modules.
        modules: by module path.
    """

    whole: UpdateError
    modules: Mapping[str, UpdateError]


@dataclass(frozen=True, eq=False)
class UpdateProducts:
    """Products of pairs of updates, modules in the layout's order, float64.

    Attributes:
        inner: `<U, V>`.
        first: `|U|`.
        second: `|V|`.
        distance: `|U - V|`.
    """

    inner: Float[Tensor, "pairs modules"]
    first: Float[Tensor, "pairs modules"]
    second: Float[Tensor, "pairs modules"]
    distance: Float[Tensor, "pairs modules"]


def compare_updates(
    bases: AdapterBases,
    vector: Float[Tensor, " num_params"],
    own: Float[Tensor, " num_params"],
) -> UpdateComparison:
    """Relative error and cosine of an adapter's update to that of the task's own adapter."""
    products = multiply_updates(bases, vector[None], own[None])
    whole = _summarize(
        products.inner.sum(),
        products.first.norm(),
        products.second.norm(),
        products.distance.norm(),
    )
    columns = (products.inner, products.first, products.second, products.distance)
    modules = {
        module.path: _summarize(*(column[0, i] for column in columns))
        for i, module in enumerate(bases.layout.modules)
    }
    return UpdateComparison(whole, modules)


def compare_beyond_mean(
    bases: AdapterBases,
    vector: Float[Tensor, " num_params"],
    own: Float[Tensor, " num_params"],
    mean: Float[Tensor, " num_params"],
) -> UpdateComparison:
    """`compare_updates` of an adapter minus that of the mean adapter.

    A negative error and a positive cosine are what the adapter knows of its task beyond what all
    tasks have in common, which alone makes cosines high.

    Args:
        bases: with the layout.
        vector: adapter to judge.
        own: the task's own adapter.
        mean: the mean of the training tasks' adapters (`AdapterNormalizer.mean`).
    """
    ours, theirs = compare_updates(bases, vector, own), compare_updates(bases, mean, own)
    modules = {path: error - theirs.modules[path] for path, error in ours.modules.items()}
    return UpdateComparison(ours.whole - theirs.whole, modules)


def multiply_updates(
    bases: AdapterBases,
    first: Float[Tensor, "pairs num_params"],
    second: Float[Tensor, "pairs num_params"],
) -> UpdateProducts:
    """Norms, inner product and distance of every pair of updates in every module.

    The distance is that of the factors' difference and not `|U|^2 + |V|^2 - 2 <U, V>`, whose
    rounding error would hide distances below 1e-8 of the norm.
    """
    rows = [
        _multiply_module(bases, module, first.double(), second.double())
        for module in bases.layout.modules
    ]
    return UpdateProducts(*(torch.stack(column, dim=1) for column in zip(*rows, strict=True)))


def _multiply_module(
    bases: AdapterBases, module: AdaptedModule, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inner product, both norms and the distance, `[pairs]` each."""
    layout = bases.layout
    if layout.kind is not AdapterKind.LORA:
        ours, theirs = _place(bases, module, first), _place(bases, module, second)
        inner = (ours * theirs).sum((1, 2))
        return inner, _norm(ours), _norm(theirs), _norm(ours - theirs)
    down, up = ([_read(bases, module, name, each) for each in (first, second)] for name in _LORA)
    inner = ((up[0].mT @ up[1]) * (down[0] @ down[1].mT)).sum((1, 2)) * layout.scaling**2
    norms = [_norm(_shrink(b, a)) * layout.scaling for a, b in zip(down, up, strict=True)]
    difference = _shrink(torch.cat([up[0], -up[1]], dim=2), torch.cat(down, dim=1))
    return inner, norms[0], norms[1], _norm(difference) * layout.scaling


_LORA = ("lora_A", "lora_B")


def _place(bases: AdapterBases, module: AdaptedModule, vectors: Tensor) -> Tensor:
    """Coordinates of updates with frozen factors: linear in the vector, and of the same norms."""
    right = take_triangle(bases.tensors[module.path, "A"].double().mT)  # [r, r]
    if bases.layout.kind is AdapterKind.LORA_SHARED_A:
        trained = _read(bases, module, "lora_B", vectors)  # [pairs, out, r]
    else:
        left = take_triangle(bases.tensors[module.path, "B"].double())  # [r, r]
        trained = left @ _read(bases, module, "core", vectors)  # [pairs, r, r]
    return trained @ right.mT * bases.layout.scaling


def _read(bases: AdapterBases, module: AdaptedModule, tensor: str, vectors: Tensor) -> Tensor:
    entry = bases.layout.spans[module.path, tensor]
    return vectors[:, entry.span].reshape(-1, *entry.shape)


def _shrink(left: Tensor, right: Tensor) -> Tensor:
    """A small matrix of the norm of `left @ right`."""
    return take_triangle(left) @ take_triangle(right.mT).mT


def _norm(matrices: Tensor) -> Tensor:
    """Frobenius norm of each matrix."""
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2))
    return norms


def _summarize(inner: Tensor, first: Tensor, second: Tensor, distance: Tensor) -> UpdateError:
    size = float(second)
    error = float(distance) / size if size else (math.inf if float(distance) else 0.0)
    both = float(first) * size
    return UpdateError(error, float(inner) / both if both else 0.0)
