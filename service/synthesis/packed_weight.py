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

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_BYTES = 2 * 2**30
"""The plain weights stay in memory for code that reads them, so larger models are not packed."""

_ROWS = 16
"""Rows of the product that the layout is chosen for; any number works."""

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
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.dtype == dtype and can_pack(module.weight):
            model.set_submodule(path, PackedLinear(module), strict=True)


def widen_activations(model: Any) -> None:
    """Makes a language model whose linears are all float16 copies compute in float32 between them.

    Args:
        model: of transformers; its linears are packed.
    """
    linears = [each for each in model.modules() if isinstance(each, (nn.Linear, PackedLinear))]
    if not linears or not all(isinstance(each, PackedLinear) and each.is_half for each in linears):
        return
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms, biases
            parameter.data = parameter.data.float()
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].float())
