"""Decoding of many adapters in one pass, each to the bytes that it has alone.

A matrix product of floats rounds otherwise with another number of rows, so a plain batched
forward gives adapters that depend on who else was waiting (on a CPU, 0.2% of the float16
values differ). So products keep the shape that they have for a single adapter and are made row
by row; what is elementwise, or the same for all rows, is done once for all.

The heads, one matrix per role, are most of the decoder's memory traffic: each product reads its
role's matrix in place, where the training forward copies a matrix for every token.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from service.synthesis.token_networks import ConditionedConv, TokenDecoder


def decode_rows(
    decoder: nn.Module, z: Float[Tensor, "batch latent"], condition: Float[Tensor, "batch cond"]
) -> Float[Tensor, "batch num_params"]:
    """Normalised adapter vectors, every row equal to `decoder` of that row alone, bit by bit."""
    if type(decoder) is TokenDecoder:
        return _decode_tokens(decoder, z, condition)
    return _by_row(decoder, z, condition)


def _by_row(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of one row at a time."""
    if len(inputs[0]) == 1:
        return function(*inputs)
    rows = range(len(inputs[0]))
    return torch.cat([function(*(each[i : i + 1] for each in inputs)) for i in rows])


def _decode_tokens(decoder: TokenDecoder, z: Tensor, condition: Tensor) -> Tensor:
    c = _by_row(decoder.read_condition, z, condition)
    h = decoder.positions().expand(z.shape[0], -1, -1)  # [batch, tokens, width]
    for layer in decoder.layers:
        assert isinstance(layer, ConditionedConv)
        gain, shift = _by_row(layer.film, c)[:, None].chunk(2, dim=-1)
        modulated = functional.gelu((1 + gain) * layer.norm(h) + shift)
        h = h + _by_row(layer.conv, modulated.mT).mT
    return decoder.tokens.join(_apply_heads(decoder, decoder.norm(h)))


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
