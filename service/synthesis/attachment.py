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
from torch.nn import functional

from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdaptedModule, AdapterKind, AdapterLayout

FEW_TOKENS = 64
"""Up to this many tokens, a decode step, the update is computed in `choose_few_dtype`."""

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Roles of transformers' models that one parent feeds with the same input."""


class AdapterRows:
    """Holder of the adapter vectors that the next forwards use, or None for the base alone.

    Assigning `vectors` cuts them into the trained tensors, once per batch and not once per
    decode step; assign them again after changing their values.

    Attributes:
        tensors: `[rows, *shape]` per (module path, tensor name), each contiguous: rows that lie
            a multiple of 4 KiB apart would push each other out of the processor's cache.
    """

    def __init__(self, layout: AdapterLayout) -> None:
        self._layout = layout
        self._vectors: Float[Tensor, "rows num_params"] | None = None
        self.tensors: dict[tuple[str, str], Tensor] = {}

    @property
    def vectors(self) -> Float[Tensor, "rows num_params"] | None:
        """One adapter vector per batch row, or a single one for all rows."""
        return self._vectors

    @vectors.setter
    def vectors(self, vectors: Float[Tensor, "rows num_params"] | None) -> None:
        self._vectors = vectors
        self.tensors = {}
        if vectors is not None:
            for key, entry in self._layout.spans.items():
                self.tensors[key] = vectors[:, entry.span].contiguous().view(-1, *entry.shape)


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
        y = functional.linear(x, self.base.weight, self.base.bias)
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
        own = _cast(self.rows.tensors[self.module.path, tensor], hidden.dtype)
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


class DecodeGroup:
    """Modules with the same input, whose updates a decode step computes together (kind `core`).

    A decode step's products are so small that their number is what costs. So the first module's
    weight is extended by the `A` of all, one product gives its output and everybody's `A x`, and
    one each applies `R` and `B` (block-diagonal) for all. The other modules take their part if
    they are given the very same tensor; else they compute their own.
    """

    def __init__(self, rows: AdapterRows, modules: Sequence[AdaptedLinear]) -> None:
        self._rows = rows
        self._keys = [(module.module.path, "core") for module in modules]
        self._few_dtype = modules[0].few_dtype
        base = modules[0].base
        down = torch.cat([module.frozen_a for module in modules], dim=1).T  # [n * r, in]
        self._extended = torch.cat([base.weight, down.to(base.weight.dtype)])  # [out + n * r, in]
        base.weight = nn.Parameter(self._extended[: base.out_features], requires_grad=False)
        up = [module.frozen_b for module in modules]
        self._up: Tensor = torch.block_diag(*up)  # type: ignore[no-untyped-call]  # [n * r, outs]
        self._weights = [module.base.weight for module in modules]
        self._spans: list[tuple[int, int]] = []  # (start, length) of each module's update
        for position, module in enumerate(modules):
            start = sum(self._spans[-1]) if self._spans else 0
            self._spans.append((start, module.module.out_features))
            module.group, module.position = self, position
        self._tensors: dict[tuple[str, str], Tensor] = {}  # of the rows that `_cores` are of
        self._cores: Float[Tensor, "rows_n r r"] | None = None  # R^T; None: not for these rows
        self._input: Tensor | None = None
        self._updates: Float[Tensor, "rows 1 outs"] | None = None

    def compute(self, module: AdaptedLinear, x: Tensor) -> Tensor | None:
        """A module's output `[rows, 1, out]`, its update included.

        None where this is no decode step without gradients with an adapter for every row, or
        where the group's first module was given another input.
        """
        if self._rows.tensors is not self._tensors:
            self._stack_cores()
        if module.position > 0:
            if x is not self._input or self._updates is None:
                return None
            part = self._updates.narrow(2, *self._spans[module.position])
            if module.position == len(self._spans) - 1:
                self._input = None
            return functional.linear(x, self._weights[module.position]).add_(part)
        cores, size = self._cores, x.shape
        if cores is None or len(size) != 3 or size[1] != 1:
            return None
        if size[0] * len(self._keys) != cores.shape[0]:
            return None
        if torch.is_grad_enabled():
            return None
        y = functional.linear(x, self._extended)  # [rows, 1, out + n * r]
        out = self._spans[0][1]
        hidden = y.narrow(2, out, self._up.shape[0]).to(self._few_dtype).contiguous()
        hidden = torch.bmm(hidden.view(-1, 1, cores.shape[-1]), cores).view(size[0], -1)
        self._updates = torch.mm(hidden, self._up).to(x.dtype).unsqueeze(1)  # [rows, 1, outs]
        self._input = x if len(self._spans) > 1 else None
        return y.narrow(2, 0, out) + self._updates.narrow(2, 0, out)

    def _stack_cores(self) -> None:
        """`R^T` of every row and module, once per assignment of `rows.vectors`."""
        self._tensors, self._cores, self._input = self._rows.tensors, None, None
        cores = [self._tensors[key].mT for key in self._keys]
        if 1 < cores[0].shape[0] <= FEW_TOKENS and cores[0].dtype == self._few_dtype:
            self._cores = torch.stack(cores, dim=1).flatten(0, 1)


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
        if self.layout.kind is AdapterKind.CORE:
            self._group_modules()

    def _group_modules(self) -> None:
        """Groups modules that their parent feeds alike; the others are groups of one."""
        left = dict(self._adapted)
        for path in self._adapted:
            parent, _, role = path.rpartition(".")
            alike = next((roles for roles in SHARED_INPUTS if role in roles), (role,))
            names = [f"{parent}.{each}" if parent else each for each in alike]
            modules = [left.pop(name) for name in names if name in left]
            if modules and all(module.base.bias is None for module in modules):
                DecodeGroup(self.rows, modules)

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
