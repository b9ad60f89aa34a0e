"""Adapters inside the forward pass: one implementation for training and for serving.

The target linears of a frozen model are wrapped once. Before a forward, `Attachment.rows`
is set to a matrix of adapter vectors, one per batch row (or a single one for all rows);
every wrapped linear then adds its own update. Training puts a parameter there and gets
its gradient; serving puts rows gathered from the slot bank.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout
from service.synthesis.packed_weight import (
    SHARED_INPUTS,
    JointOutputs,
    PackedWeight,
    is_small,
    join_linears,
    pack_linears,
)

FEW_TOKENS = 64
"""Up to this many tokens, a decode step, the update is computed in `choose_few_dtype`."""


class AdapterRows:
    """Holder of the adapter vectors that the next forwards use, or None for the base alone.

    They are cut into the trained tensors once per assignment of `vectors`, and not once per
    decode step; assign them again after changing their values.

    Attributes:
        version: grows with every assignment.
    """

    def __init__(self, layout: AdapterLayout) -> None:
        self._layout = layout
        self._vectors: Float[Tensor, "rows num_params"] | None = None
        self._tensors: dict[tuple[str, str], Tensor] = {}
        self.version = 0

    @property
    def vectors(self) -> Float[Tensor, "rows num_params"] | None:
        """One adapter vector per batch row, or a single one for all rows."""
        return self._vectors

    @vectors.setter
    def vectors(self, vectors: Float[Tensor, "rows num_params"] | None) -> None:
        self._vectors = vectors
        self._tensors = {}
        self.version += 1

    def get_tensor(self, module: str, tensor: str) -> Float[Tensor, "rows ..."]:
        """A trained tensor of every row, contiguous.

        Rows that lie a multiple of 4 KiB apart would push each other out of the processor's cache.
        """
        key = (module, tensor)
        if key not in self._tensors:
            assert self._vectors is not None, "the base alone has no adapter"
            entry = self._layout.spans[key]
            part = self._vectors[:, entry.span].contiguous()
            self._tensors[key] = part.view(-1, *entry.shape)
        return self._tensors[key]


class AdaptedLinear(nn.Module):
    """`y = W x + b + alpha/r * (B [R] A) x`, the update taken per batch row.

    Rows may be fewer than the leading dimension of the input (beams, image windows): each
    adapter row then serves `leading // rows` consecutive inputs.
    """

    frozen_a: Tensor
    frozen_b: Tensor

    def __init__(
        self, base: nn.Linear, module: AdaptedModule, bases: AdapterBases, rows: AdapterRows
    ) -> None:
        super().__init__()
        self.base = base
        self.module = module
        self.layout = bases.layout
        self.rows = rows
        like = base.weight
        self.few_dtype = choose_few_dtype(like)
        self.group: DecodeGroup | None = None
        self.position = 0  # in the group
        for name, scale in (("A", 1.0), ("B", self.layout.scaling)):
            frozen = bases.tensors.get((module.path, name))
            if frozen is not None:  # the scaling is folded into B where B is frozen
                frozen = (frozen.float().T * scale).to(like.device, self.few_dtype)
                frozen = frozen.contiguous()  # [in, r], [r, out]: multiplied from the right
            self.register_buffer(f"frozen_{name.lower()}", frozen, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that inspects linears."""
        return self.base.weight

    def forward(self, x: Float[Tensor, "leading *tokens in_features"]) -> Tensor:
        """Base output plus the update of each row's adapter."""
        vectors = self.rows.vectors
        if vectors is not None and self.group is not None:
            together = self.group.compute(self, x)
            if together is not None:
                return together
        y: Tensor = self.base(x)
        if vectors is None:
            return y
        if x.ndim == 3:
            return y.add_(self._update(x))  # y is fresh: in place, and no cast of the update
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        return y.add_(self._update(flat).view(y.shape))

    def _update(
        self, x: Float[Tensor, "leading tokens in_features"]
    ) -> Float[Tensor, "leading tokens out_features"]:
        leading, tokens, _ = x.shape
        dtype = self.few_dtype if leading * tokens <= FEW_TOKENS else x.dtype
        hidden = x.to(dtype)
        if self.layout.kind is AdapterKind.LORA:
            hidden = self._project(hidden, "lora_A")
        else:
            hidden = hidden @ _cast(self.frozen_a, dtype)
        if self.layout.kind is AdapterKind.CORE:  # [leading, tokens, r]
            return self._project(hidden, "core") @ _cast(self.frozen_b, dtype)
        return self._project(hidden, "lora_B") * self.layout.scaling

    def _project(self, hidden: Float[Tensor, "leading tokens i"], tensor: str) -> Tensor:
        """`hidden @ T^T` with each input row's own tensor `T [o, i]`, or one for all."""
        own = _cast(self.rows.get_tensor(self.module.path, tensor), hidden.dtype)
        rows, leading = own.shape[0], hidden.shape[0]
        if rows == 1:
            return hidden @ own[0].mT
        if rows != leading:
            repeat, remainder = divmod(leading, rows)
            assert remainder == 0, f"{leading} inputs for {rows} adapter rows"
            own = own.repeat_interleave(repeat, dim=0)
        return torch.bmm(hidden, own.mT)


def choose_few_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the updates of a few tokens: float32 on a CPU, else the weight's.

    The fixed cost of a small bfloat16 product on a CPU (12 us, oneDNN) is three times what the
    whole product takes in float32; from about `FEW_TOKENS` on bfloat16 is the faster one.
    """
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, ten times as fast where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


class StackedCores:
    """`R^T` of every row, block-diagonal over the modules of a group, for groups of one size.

    Made for all groups at once, once per assignment of rows: a hundred small copies would take
    longer than the products of a decode step.

    Args:
        rows: which adapters.
        layout: of kind `core`.
        groups: paths of the modules of each group.
        dtype: that the rows must have.
    """

    def __init__(
        self,
        rows: AdapterRows,
        layout: AdapterLayout,
        groups: Sequence[Sequence[str]],
        dtype: torch.dtype,
    ) -> None:
        self._rows = rows
        self._rank = layout.rank
        self._dtype = dtype
        first = [[layout.spans[path, "core"].offset for path in paths] for paths in groups]
        self._places = torch.tensor(first)[..., None] + torch.arange(layout.rank**2)
        self._version = 0  # of the rows that `_blocks` are of
        self._blocks: Float[Tensor, "groups rows n_r n_r"] | None = None

    def get(self, group: int) -> Float[Tensor, "rows n_r n_r"] | None:
        """Of one group; None where there are no rows, or rows of another dtype."""
        if self._rows.version != self._version:
            self._version = self._rows.version
            self._blocks = self._stack(self._rows.vectors)
        return None if self._blocks is None else self._blocks[group]

    def _stack(self, vectors: Tensor | None) -> Tensor | None:
        if vectors is None or vectors.dtype != self._dtype:
            return None
        self._places = self._places.to(vectors.device)
        (groups, modules, _), rows, rank = self._places.shape, len(vectors), self._rank
        cores = vectors[:, self._places].view(rows, groups, modules, rank, rank)
        blocks = vectors.new_zeros(groups, rows, modules, rank, modules, rank)
        for module in range(modules):
            blocks[:, :, module, :, module] = cores[:, :, module].mT.transpose(0, 1)
        return blocks.view(groups, rows, modules * rank, modules * rank)


class DecodeGroup:
    """Modules with the same input, whose outputs serving computes together (kind `core`).

    A decode step's products are so small that their number is what costs. With `h = R A x` of all
    modules, one product `[x; h] [W; B]^T` gives the outputs of all (`B` block-diagonal), updates
    included: `JointOutputs`.

    Args:
        modules: that take the same input.
        cores: of the rows, and which of its groups this is.
        packs: whether their weights are copied into another layout, where that pays; else the
            modules share the memory of the group's.
    """

    def __init__(
        self, modules: Sequence[AdaptedLinear], cores: tuple[StackedCores, int], *, packs: bool
    ) -> None:
        self._cores, self._number = cores
        self._few_dtype = modules[0].few_dtype
        weights = [module.base.weight for module in modules]
        dtype = weights[0].dtype
        ups = [module.frozen_b.T for module in modules]
        up: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]  # [outs, n * r]
        together = torch.cat([torch.cat(weights), up.to(dtype)], dim=1)  # [outs, in + n * r]
        self._down = torch.cat([module.frozen_a for module in modules], dim=1)  # [in, n * r]
        self._together = PackedWeight(together, packs=packs)
        lengths = [module.module.out_features for module in modules]
        self._joint = JointOutputs(lengths)
        parts = together[:, : modules[0].module.in_features].split(lengths)  # type: ignore[no-untyped-call]
        for position, (module, part) in enumerate(zip(modules, parts, strict=True)):
            module.group, module.position = self, position
            if not self.is_packed:  # then the memory is shared
                module.base.weight = nn.Parameter(part, requires_grad=False)

    @property
    def is_packed(self) -> bool:
        """Whether the weights were copied into another layout."""
        return self._together.is_packed

    def compute(self, module: AdaptedLinear, x: Tensor) -> Tensor | None:
        """A module's output `[rows, tokens, out]`, its update included.

        None where gradients are wanted or there is not one adapter for every row, or where the
        group's first module was given another input.
        """
        version = module.rows.version
        if module.position > 0:
            return self._joint.take(module.position, x, version)
        self._joint.drop()
        if torch.is_grad_enabled():
            return None
        cores, size = self._cores.get(self._number), x.shape
        if cores is None or len(size) != 3 or size[0] != cores.shape[0]:
            return None
        flat = x.reshape(-1, size[2]).to(self._few_dtype)
        hidden = torch.mm(flat, self._down)  # [rows * tokens, n * r]
        hidden = torch.bmm(hidden.view(size[0], size[1], -1), cores).to(x.dtype)
        together = torch.cat([x, hidden], dim=2)  # [rows, tokens, in + n * r]
        return self._joint.keep(x, self._together.multiply(together), version)


class Attachment:
    """A frozen model whose target linears are wrapped; `rows.vectors` selects the adapters."""

    def __init__(self, model: nn.Module, bases: AdapterBases) -> None:
        self.layout = bases.layout
        self.rows = AdapterRows(self.layout)
        self._adapted: dict[str, AdaptedLinear] = {}
        model.requires_grad_(False)
        for module in self.layout.modules:
            base = model.get_submodule(module.path)
            assert isinstance(base, nn.Linear), f"{module.path} is {type(base).__name__}"
            self._adapted[module.path] = AdaptedLinear(base, module, bases, self.rows)
            model.set_submodule(module.path, self._adapted[module.path], strict=True)

    def _group_modules(self, *, packs: bool) -> None:
        """Groups modules that their parent feeds alike; the others are groups of one."""
        left = dict(self._adapted)
        by_size: dict[int, list[list[AdaptedLinear]]] = {}
        for path in self._adapted:
            parent, _, role = path.rpartition(".")
            alike = next((roles for roles in SHARED_INPUTS if role in roles), (role,))
            names = [f"{parent}.{each}" if parent else each for each in alike]
            modules = [left.pop(name) for name in names if name in left]
            if modules and all(module.base.bias is None for module in modules):
                by_size.setdefault(len(modules), []).append(modules)
        for groups in by_size.values():
            paths = [[module.module.path for module in modules] for modules in groups]
            cores = StackedCores(self.rows, self.layout, paths, groups[0][0].few_dtype)
            for number, modules in enumerate(groups):
                DecodeGroup(modules, (cores, number), packs=packs)

    def prepare_serving(self, model: nn.Module) -> None:
        """Makes decode steps fast: packs a small model's weights, computes alike modules together.

        Results stay the same up to rounding. The model can no longer be trained or detached.
        """
        if self.layout.kind is AdapterKind.CORE:
            dtype = next(iter(self._adapted.values())).weight.dtype
            self._group_modules(packs=is_small(model) and dtype == torch.bfloat16)
        join_linears(model)
        pack_linears(model)

    def detach(self, model: nn.Module) -> None:
        """Puts the original linears back."""
        for path, adapted in self._adapted.items():
            model.set_submodule(path, adapted.base, strict=True)


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
