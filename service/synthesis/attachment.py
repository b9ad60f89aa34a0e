"""Adapters inside the forward pass: one implementation for training and for serving.

The target linears of a frozen model are wrapped once. Before a forward, `Attachment.rows`
is set to a matrix of adapter vectors, one per batch row (or a single one for all rows);
every wrapped linear then adds its own update. Training puts a parameter there and gets
its gradient; serving puts rows gathered from the slot bank.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout


class AdapterRows:
    """Holder of the adapter vectors that the next forward uses, or None for the base alone."""

    def __init__(self) -> None:
        self.vectors: Float[Tensor, "rows num_params"] | None = None


class AdaptedLinear(nn.Module):
    """`y = W x + b + alpha/r * (B [R] A) x`, the update taken per batch row.

    Rows may be fewer than the leading dimension of the input (beams, image windows): each
    adapter row then serves `leading // rows` consecutive inputs.
    """

    def __init__(
        self, base: nn.Linear, module: AdaptedModule, bases: AdapterBases, rows: AdapterRows
    ) -> None:
        super().__init__()
        self.base = base
        self.module = module
        self.layout = bases.layout
        self.rows = rows
        like = base.weight
        for name, scale in (("A", 1.0), ("B", self.layout.scaling)):
            frozen = bases.tensors.get((module.path, name))
            if frozen is not None:  # the scaling is folded into B where B is frozen
                frozen = (frozen.float() * scale).to(like.device, like.dtype)
            self.register_buffer(f"frozen_{name}", frozen, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that inspects linears."""
        return self.base.weight

    def forward(self, x: Float[Tensor, "leading *tokens in_features"]) -> Tensor:
        """Base output plus the update of each row's adapter."""
        y: Tensor = self.base(x)
        vectors = self.rows.vectors
        if vectors is None:
            return y
        shape = y.shape
        update = self._update(x.reshape(x.shape[0], -1, x.shape[-1]), vectors)
        return y + update.view(shape)

    def _update(self, x: Tensor, vectors: Tensor) -> Tensor:
        if self.layout.kind is AdapterKind.CORE:
            core = self._gather(vectors, "core", x.shape[0])  # [leading, r, r]
            hidden = x @ self.frozen_A.T  # [leading, tokens, r]
            return torch.matmul(hidden, core.mT) @ self.frozen_B.T
        if self.layout.kind is AdapterKind.LORA_SHARED_A:
            hidden = x @ self.frozen_A.T
        else:
            hidden = torch.matmul(x, self._gather(vectors, "lora_A", x.shape[0]).mT)
        lora_b = self._gather(vectors, "lora_B", x.shape[0])
        return torch.matmul(hidden, lora_b.mT) * self.layout.scaling

    def _gather(self, vectors: Tensor, tensor: str, leading: int) -> Tensor:
        """This module's tensor for every input row: [rows or leading, *shape]."""
        entry = self.layout.spans[self.module.path, tensor]
        gathered = vectors[:, entry.span].unflatten(1, entry.shape)
        if gathered.shape[0] not in (1, leading):
            repeat, remainder = divmod(leading, gathered.shape[0])
            assert remainder == 0, f"{leading} inputs for {gathered.shape[0]} adapter rows"
            gathered = gathered.repeat_interleave(repeat, dim=0)
        return gathered


class Attachment:
    """A frozen model whose target linears are wrapped; `rows.vectors` selects the adapters."""

    def __init__(self, model: nn.Module, bases: AdapterBases) -> None:
        self.layout = bases.layout
        self.rows = AdapterRows()
        model.requires_grad_(False)
        for module in self.layout.modules:
            base = model.get_submodule(module.path)
            assert isinstance(base, nn.Linear), f"{module.path} is {type(base).__name__}"
            model.set_submodule(
                module.path, AdaptedLinear(base, module, bases, self.rows), strict=True
            )


    def detach(self, model: nn.Module) -> None:
        """Puts the original linears back."""
        for module in self.layout.modules:
            wrapped = model.get_submodule(module.path)
            assert isinstance(wrapped, AdaptedLinear)
            model.set_submodule(module.path, wrapped.base, strict=True)


def initial_vector(layout: AdapterLayout, seed: int) -> Float[Tensor, " num_params"]:
    """Adapter vector that training starts from: an update of exactly zero.

    Everything is zero but `lora_A`, which PEFT's default (Kaiming uniform with a = sqrt(5),
    the bound 1/sqrt(in)) fills from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = torch.zeros(layout.num_params)
    for entry in layout.entries:
        if entry.tensor == "lora_A":
            bound = 1.0 / math.sqrt(entry.shape[1])
            noise = torch.rand(entry.numel, generator=generator)
            vector[entry.span] = (noise * 2 - 1) * bound
    return vector
