"""Weights in the layout that the CPU's matrix library computes in.

torch hands a bfloat16 weight to oneDNN as it lies in memory, row after row, and oneDNN reorders
it anew in every product. Reordered once at the start, the products of a decode step (a few dozen
tokens) take two thirds of the time and give the same bits; torch's own compiler does the same
where it freezes weights, with the same two operators. Float32 goes to MKL, which takes half as
long again as oneDNN on a reordered weight for the few tokens of a description.

CPUs without products of bfloat16 (AVX2 only) leave them to a loop of torch that takes time per
row: there FBGEMM multiplies a float16 copy with float32 activations (16 rows: 5 times as fast).
Weights of at least 2^-14 keep their value, smaller ones theirs up to 2^-25. Casts before and
after every product would take a tenth of the step of one row, so a language model then computes
in float32 from its embeddings on (`widen_activations`).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

MAX_BYTES = 2 * 2**30
"""The plain weights stay in memory for code that reads them, so larger models are not packed."""

_ROWS = 16
"""Rows of the product that the layout is chosen for; any number works."""

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Roles of transformers' models that one parent feeds with the same input."""

_MAX_FLOAT16 = torch.finfo(torch.float16).max


class PackedWeight:
    """A weight `[out, in]`, multiplied as `functional.linear` does.

    Args:
        weight: frozen.
        packs: whether it is copied into another layout, where that pays.
    """

    def __init__(self, weight: Tensor, *, packs: bool = True) -> None:
        self._weight = weight.detach()
        self._packed: Tensor | None = None
        self._half: torch.ScriptObject | None = None
        if not packs or not can_pack(weight):
            return
        if weight.dtype == torch.float32 or has_bfloat16_products():
            plain = self._weight.contiguous()
            self._packed = torch.ops.mkldnn._reorder_linear_weight(plain, _ROWS)
        elif self._weight.abs().max() <= _MAX_FLOAT16:
            self._half = torch.ops.quantized.linear_prepack_fp16(self._weight.float(), None)

    @property
    def is_packed(self) -> bool:
        """Whether the weight was copied into another layout."""
        return self._packed is not None or self.is_half

    @property
    def is_half(self) -> bool:
        """Whether the copy is float16, which is multiplied with float32."""
        return self._half is not None

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x W^T + b`, for any leading dimensions; gradients flow to `x` where they are on."""
        if not self.is_packed or torch.is_grad_enabled():
            return functional.linear(x, self._weight.to(x.dtype), bias)
        y: Tensor
        if self._half is None:
            y = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
            return y
        y = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._half)
        if bias is not None:
            y += bias
        return y.to(x.dtype)


class JointOutputs:
    """Outputs that several modules have of the same input, computed together by the first.

    The others take their parts if they are given the very same tensor; else they compute their own.

    Args:
        lengths: of the modules' outputs.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._spans = [(sum(lengths[:i]), length) for i, length in enumerate(lengths)]
        self._input: Tensor | None = None
        self._version = 0
        self._outputs: Float[Tensor, "*leading outs"] | None = None

    def keep(
        self, x: Tensor, outputs: Float[Tensor, "*leading outs"], version: int = 0
    ) -> Float[Tensor, "*leading out"]:
        """Keeps what was computed for the others, and returns the first module's part.

        Args:
            x: the input.
            outputs: of all modules, side by side.
            version: of whatever else the outputs depend on.
        """
        if len(self._spans) == 1:
            return outputs
        self._input, self._outputs, self._version = x, outputs, version
        return outputs.narrow(-1, *self._spans[0])

    def take(self, position: int, x: Tensor, version: int = 0) -> Tensor | None:
        """The part of a module after the first; None where it was not computed."""
        if x is not self._input or self._outputs is None or version != self._version:
            return None
        part = self._outputs.narrow(-1, *self._spans[position])
        if position == len(self._spans) - 1:  # a prompt's would stay in every layer
            self.drop()
        return part

    def drop(self) -> None:
        """Forgets what was kept."""
        self._input = self._outputs = None


class PackedLinear(nn.Module):
    """A frozen linear layer on a packed weight."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self._packed = PackedWeight(base.weight)

    @property
    def is_half(self) -> bool:
        """As `PackedWeight.is_half`."""
        return self._packed.is_half

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        return self._packed.multiply(x, self.bias)


class JointLinear(nn.Module):
    """One of several frozen linear layers with the same input, on one packed weight of all.

    Args:
        base: without bias.
        packed: weights of all layers, one below the other.
        joint: what the layers share.
        position: of this layer among them.
    """

    def __init__(
        self, base: nn.Linear, packed: PackedWeight, joint: JointOutputs, position: int
    ) -> None:
        super().__init__()
        self.weight = base.weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self._packed, self._joint, self._position = packed, joint, position

    @property
    def is_half(self) -> bool:
        """As `PackedWeight.is_half`."""
        return self._packed.is_half

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if not torch.is_grad_enabled():
            if self._position == 0:
                return self._joint.keep(x, self._packed.multiply(x))
            part = self._joint.take(self._position, x)
            if part is not None:
                return part
        return functional.linear(x, self.weight.to(x.dtype))


def can_pack(weight: Tensor) -> bool:
    """Whether packing pays for its dtype on its device, and torch was built with the operators."""
    if weight.device.type != "cpu":
        return False
    if weight.dtype == torch.float32:
        return _has_onednn()
    return weight.dtype == torch.bfloat16 and (has_bfloat16_products() or _has_fbgemm())


@cache
def has_bfloat16_products() -> bool:
    """Whether oneDNN is there and multiplies bfloat16 on this CPU; else its operators refuse it."""
    return _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
        torch.ops.mkldnn, "_reorder_linear_weight"
    )


def _has_fbgemm() -> bool:
    """Whether FBGEMM is what torch's quantized operators run on: an x86 CPU."""
    return torch.backends.quantized.engine in ("fbgemm", "x86")


def is_small(model: nn.Module) -> bool:
    """Whether a model's weights are within `MAX_BYTES`."""
    return sum(parameter.nbytes for parameter in model.parameters()) <= MAX_BYTES


def pack_linears(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    """Replaces a small frozen model's plain linear layers by packed ones, where packing pays.

    Args:
        model: whose weights stay in memory beside the copies.
        dtype: of the layers that are replaced.
    """
    if not is_small(model):
        return
    for path, module in _find_plain(model, dtype).items():
        model.set_submodule(path, PackedLinear(module), strict=True)


def join_linears(model: nn.Module) -> None:
    """Replaces plain bfloat16 layers with one input by one product, where packing pays.

    The model is then for one thread at a time: what one layer computes waits for the others. Call
    it before `pack_linears`, which takes single layers.
    """
    if not is_small(model):
        return
    plain = _find_plain(model, torch.bfloat16)
    for path in plain:
        parent, _, role = path.rpartition(".")
        roles = next((roles for roles in SHARED_INPUTS if role == roles[0]), (role,))
        paths = [f"{parent}.{each}" if parent else each for each in roles]
        group = [plain[each] for each in paths if each in plain]
        if not len(group) == len(paths) > 1 or any(each.bias is not None for each in group):
            continue
        packed = PackedWeight(torch.cat([module.weight for module in group]))
        if not packed.is_packed:
            continue
        joint = JointOutputs([module.out_features for module in group])
        for position, (each, module) in enumerate(zip(paths, group, strict=True)):
            model.set_submodule(each, JointLinear(module, packed, joint, position), strict=True)


def _find_plain(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Linear]:
    """Linear layers of a dtype whose weights can be packed, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear and module.weight.dtype == dtype and can_pack(module.weight)
    }


def widen_activations(model: Any) -> None:
    """Makes a language model whose linears are all float16 copies compute in float32 between them.

    Args:
        model: of transformers; its linears are packed.
    """
    packed = (PackedLinear, JointLinear)
    linears = [each for each in model.modules() if isinstance(each, (nn.Linear, *packed))]
    if not linears or not all(isinstance(each, packed) and each.is_half for each in linears):
        return
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms, biases
            parameter.data = parameter.data.float()
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].float())
