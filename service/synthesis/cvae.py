"""The generator: a conditional VAE over adapter vectors, with 12-layer 1D CNNs.

    encoder  q(z | l, v) = N(mu, sigma^2)          paper Eqs. 2, 3
    sample   z = mu + sigma * eps, eps ~ N(0, I)   paper Eq. 4
    decoder  p(l | z, v) = N(decode(z, v), I)      paper Eqs. 5, 6
    prior    p(z) = N(0, I)                        paper Eq. 7

`l` is a normalised adapter vector, `v` a task vector. Serving needs only the decoder.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from service.errors import InvalidBundleError
from service.synthesis.generator_config import GeneratorConfig
from service.synthesis.in_context import InContextDecoder
from service.synthesis.layout import AdapterLayout
from service.synthesis.paper_networks import PaperDecoder, PaperEncoder
from service.synthesis.token_networks import TokenDecoder, TokenEncoder


@runtime_checkable
class Encoder(Protocol):
    """q(z | l, v)."""

    def __call__(
        self, adapters: Float[Tensor, "batch num_params"], condition: Float[Tensor, "batch cond"]
    ) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Mean and log-variance of z."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """Mean of p(l | z, v)."""

    def __call__(
        self, z: Float[Tensor, "batch latent"], condition: Float[Tensor, "batch cond"]
    ) -> Float[Tensor, "batch num_params"]:
        """Normalised adapter vectors: `decode_task` of what `read_task` gives."""
        ...

    def read_task(self, condition: Float[Tensor, "batch cond"]) -> Float[Tensor, "batch code"]:
        """Task vectors to what they mean to the decoder."""
        ...

    def decode_task(
        self, z: Float[Tensor, "batch latent"], task: Float[Tensor, "batch code"]
    ) -> Float[Tensor, "batch num_params"]:
        """Normalised adapter vectors."""
        ...


class ConditionalVAE(nn.Module):
    """Encoder and decoder; `forward` does one reparameterised pass (paper Eqs. 2-5)."""

    def __init__(self, layout: AdapterLayout, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = build_decoder(layout, config)
        self.encoder: nn.Module = (
            PaperEncoder(layout.num_params, config)
            if config.preset == "paper"
            else TokenEncoder(layout, config)
        )

    def forward(
        self,
        adapters: Float[Tensor, "batch num_params"],
        condition: Float[Tensor, "batch cond"],
        noise: Float[Tensor, "batch latent"],
        **context: Tensor,
    ) -> tuple[
        Float[Tensor, "batch num_params"],
        Float[Tensor, "batch latent"],
        Float[Tensor, "batch latent"],
    ]:
        """Reconstruction, posterior mean and posterior log-variance for given `noise`.

        `context` goes to the decoder.
        """
        mean, log_variance = self.encoder(adapters, condition)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return self.decoder(z, condition, **context), mean, log_variance


def build_decoder(layout: AdapterLayout, config: GeneratorConfig) -> nn.Module:
    """Decoder of a preset.

    Raises:
        InvalidBundleError: unknown preset.
    """
    if config.preset == "paper":
        return PaperDecoder(layout.num_params, config)
    if config.preset == "token":
        return TokenDecoder(layout, config)
    if config.preset == "in_context":
        return InContextDecoder(layout, config)
    raise InvalidBundleError(
        f"generator preset {config.preset!r} is unknown: paper, token or in_context"
    )
