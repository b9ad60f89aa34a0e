"""Choice of the next token, row by row."""

import torch
from jaxtyping import Float
from torch import Tensor


def choose_token(
    logits: Float[Tensor, " vocabulary"],
    *,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> int:
    """The most likely token at temperature 0, else one drawn by nucleus sampling.

    Args:
        logits: float32, on the CPU.
        temperature: divides the logits.
        top_p: the smallest set of most likely tokens with at least this mass is drawn from
            (Holtzman et al. 2020).
        generator: the row's own, so that what shares its batch cannot change its draws.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(0) - ordered  # mass of the tokens that are more likely
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))
