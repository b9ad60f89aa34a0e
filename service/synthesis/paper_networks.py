"""The generator's preset `paper`: 1D CNNs over the flat adapter vector."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from service.synthesis.generator_config import GeneratorConfig

SLOPE = 0.1
"""Of the leaky ReLU on the negative side."""


class PaperEncoder(nn.Module):
    """1D CNN over `[l; v]` as one channel; every layer halves the length."""

    def __init__(self, num_params: int, config: GeneratorConfig) -> None:
        super().__init__()
        lengths, channels = _paper_shape(num_params + config.condition_dim, config)
        self.layers = nn.ModuleList(
            nn.Conv1d(channels[i], channels[i + 1], kernel_size=3, stride=2, padding=1)
            for i in range(config.depth)
        )
        for layer in self.layers:
            _initialize(layer)
        self.head = nn.Linear(channels[-1] * lengths[-1], 2 * config.latent_dim)

    def forward(self, adapters: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z."""
        h = torch.cat([adapters, condition], dim=1)[:, None]  # [batch, 1, params + cond]
        for layer in self.layers:
            h = functional.leaky_relu(layer(h), SLOPE)
        mean, log_variance = self.head(h.flatten(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-12.0, 6.0)


class PaperDecoder(nn.Module):
    """Mirror of `PaperEncoder` from `[z; v]`: every layer doubles the length.

    The last layer starts at zero, so an untrained decoder gives the mean adapter.
    """

    def __init__(self, num_params: int, config: GeneratorConfig) -> None:
        super().__init__()
        self.num_params = num_params
        self.lengths, channels = _paper_shape(num_params + config.condition_dim, config)
        self.start_channels = channels[-1]
        self.stem = nn.Linear(
            config.latent_dim + config.condition_dim, channels[-1] * self.lengths[-1]
        )
        self.layers = nn.ModuleList(
            nn.ConvTranspose1d(channels[i + 1], channels[i], kernel_size=4, stride=2, padding=1)
            for i in reversed(range(config.depth))
        )
        for layer in self.layers:
            _initialize(layer)
        last = self.layers[-1]
        assert isinstance(last, nn.ConvTranspose1d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def read_task(self, condition: Tensor) -> Tensor:
        """What task vectors mean to the decoder: themselves."""
        return condition

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Normalised adapter vectors `[batch, num_params]`."""
        return self.decode_task(z, condition)

    def decode_task(self, z: Tensor, task: Tensor) -> Tensor:
        """The same."""
        h: Tensor = self.stem(torch.cat([z, task], dim=1))
        h = h.view(z.shape[0], self.start_channels, -1)
        for index, layer in enumerate(self.layers):
            h = layer(functional.leaky_relu(h, SLOPE))
            h = h[..., : self.lengths[-2 - index]]  # odd lengths: the mirror of the encoder
        return h[:, 0, : self.num_params]


def _initialize(layer: nn.Module) -> None:
    """Weights that keep the size of a signal (He et al. 2015, for a leaky ReLU), no biases.

    The paper names no initialisation. Under torch's default a signal shrinks in every layer, and
    with 12 layers each way the networks never learn more than the mean adapter.
    """
    assert isinstance(layer, nn.Conv1d | nn.ConvTranspose1d)
    fan_in = layer.in_channels * layer.kernel_size[0]
    if isinstance(layer, nn.ConvTranspose1d):
        fan_in //= layer.stride[0]  # so many products are summed to an output value
    nn.init.normal_(layer.weight, std=(2 / ((1 + SLOPE**2) * fan_in)) ** 0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


def _paper_shape(length: int, config: GeneratorConfig) -> tuple[list[int], list[int]]:
    """Lengths and channels before the first layer and after each of the `depth` layers."""
    lengths = [length]
    for _ in range(config.depth):
        lengths.append(max(1, math.ceil(lengths[-1] / 2)))
    first = 8
    channels = [1, *(min(config.width, first * 2**i) for i in range(config.depth))]
    return lengths, channels
