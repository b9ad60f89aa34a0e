"""Decoding of many adapters in one pass, each to the bytes that it has alone.

A matrix product of floats rounds otherwise with another number of rows, so a plain batched
forward gives adapters that depend on who else was waiting (on a CPU, 0.2% of the float16
values differ). So products keep the shape that they have for a single adapter and are made row
by row; what is elementwise, or the same for all rows, is done once for all.

A single adapter takes two thirds of the time of the training forward (CPU, shipped text generator):
the convolutions are products of windows with packed weights, the modulations of all layers come
from one product, and each head reads its role's matrix in place, where the training forward copies
a matrix for every token. The results are the training forward's up to rounding.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from service.synthesis.packed_weight import PackedWeight
from service.synthesis.token_networks import ConditionedConv, TokenDecoder


class RowDecoder:
    """A trained decoder of any preset, for serving.

    Args:
        decoder: on its device; its weights must not change any more.
    """

    def __init__(self, decoder: nn.Module) -> None:
        if type(decoder) is TokenDecoder:
            self._decode: Callable[[Tensor, Tensor], Tensor] = _TokenRows(decoder)
        else:
            self._decode = partial(_by_row, decoder)

    def __call__(
        self, z: Float[Tensor, "batch latent"], condition: Float[Tensor, "batch cond"]
    ) -> Float[Tensor, "batch num_params"]:
        """Normalised adapter vectors, every row equal to that row's alone, bit by bit."""
        return self._decode(z, condition)


def _by_row(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of one row at a time."""
    if len(inputs[0]) == 1:
        return function(*inputs)
    rows = range(len(inputs[0]))
    return torch.cat([function(*(each[i : i + 1] for each in inputs)) for i in rows])


class _TokenRows:
    """The decoder of preset `token`."""

    def __init__(self, decoder: TokenDecoder) -> None:
        self._decoder = decoder
        films, self._layers = [], []
        for layer in decoder.layers:
            assert isinstance(layer, ConditionedConv)
            films.append(layer.film)
            # [out, in, taps] to [out, taps * in], as a window of tokens lies in memory
            kernel = PackedWeight(layer.conv.weight.mT.flatten(1))
            self._layers.append((layer, partial(_convolve, layer.conv, kernel)))
        film = PackedWeight(torch.cat([each.weight for each in films]))
        bias = torch.cat([each.bias for each in films]).detach()
        self._modulate = partial(film.multiply, bias=bias)

    def __call__(self, z: Tensor, condition: Tensor) -> Tensor:
        decoder = self._decoder
        c = _by_row(decoder.read_condition, z, _by_row(decoder.read_task, condition))
        films = _by_row(self._modulate, c).view(len(z), len(self._layers), 2, 1, -1)
        h = decoder.positions().expand(len(z), -1, -1)  # [batch, tokens, width]
        for (layer, convolve), (gain, shift) in zip(
            self._layers, films.permute(1, 2, 0, 3, 4), strict=True
        ):
            modulated = functional.gelu(torch.addcmul(shift, 1 + gain, layer.norm(h)))
            h = h + _by_row(convolve, modulated)
        return decoder.tokens.join(_apply_heads(decoder, decoder.norm(h)))


def _convolve(
    conv: nn.Conv1d, kernel: PackedWeight, h: Float[Tensor, "1 tokens width"]
) -> Float[Tensor, "1 tokens width"]:
    """As `conv`, whose output is as long as its input, over tokens."""
    (taps,) = conv.kernel_size
    windows = functional.pad(h, (0, 0, taps // 2, taps // 2)).unfold(1, taps, 1).mT.flatten(2)
    return kernel.multiply(windows, conv.bias)  # windows: [1, tokens, taps * width]


def _apply_heads(
    decoder: TokenDecoder, h: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens chunk"]:
    """`h[b, t] @ heads[role of t]`, each a product of its own with one row."""
    batch, tokens, width = h.shape
    out = h.new_empty(batch, tokens, decoder.heads.shape[2])
    for role, head in enumerate(decoder.heads):
        mine = (decoder.tokens.role == role).nonzero()[:, 0]
        rows = h[:, mine].reshape(-1, 1, width)  # [batch * tokens of the role, 1, width]
        heads = head.expand(len(rows), -1, -1)  # no copy
        out[:, mine] = torch.bmm(rows, heads).view(batch, len(mine), -1)
    return out
