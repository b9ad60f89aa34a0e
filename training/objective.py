"""The training objective of the conditional VAE (paper Eq. 8)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Objective(NamedTuple):
    """Scalar loss and its parts.

    Attributes:
        loss: `reconstruction + kl_weight * kl`.
        reconstruction: squared error of normalised adapter values, mean over batch and values:
            the Gaussian negative log-likelihood of Eq. 6 at unit variance, times two, without
            its constant, per value.
        kl: KL(q(z | l, v) || N(0, I)) in nats per latent dimension, mean over the batch.
    """

    loss: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]
    kl: Float[Tensor, ""]


def evaluate_objective(
    reconstructed: Float[Tensor, "batch num_params"],
    adapters: Float[Tensor, "batch num_params"],
    mean: Float[Tensor, "batch latent"],
    log_variance: Float[Tensor, "batch latent"],
    kl_weight: float = 0.005,
) -> Objective:
    """Reconstruction plus weighted KL.

    Both parts are means, not sums, so that the paper's weight 0.005 means the same for every
    adapter size and latent dimension.
    """
    reconstruction = (reconstructed - adapters).square().mean()
    kl = 0.5 * (mean.square() + torch.exp(log_variance) - 1.0 - log_variance).mean()
    return Objective(reconstruction + kl_weight * kl, reconstruction, kl)
