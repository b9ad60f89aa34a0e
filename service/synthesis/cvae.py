"""The generator: a conditional VAE over adapter vectors, with 12-layer 1D CNNs.

    encoder  q(z | l, v) = N(mu, sigma^2)          paper Eqs. 2, 3
    sample   z = mu + sigma * eps, eps ~ N(0, I)   paper Eq. 4
    decoder  p(l | z, v) = N(decode(z, v), I)      paper Eqs. 5, 6
    prior    p(z) = N(0, I)                        paper Eq. 7

`l` is a normalised adapter vector, `v` a task vector. Serving needs only the decoder.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from service.errors import InvalidBundleError
from service.synthesis.layout import AdapterLayout


@dataclass(frozen=True)
class GeneratorConfig:
    """What determines the networks, besides the adapter layout.

    Attributes:
        preset: `paper` (flat vector, strided convolutions) or `token` (a token per module).
        condition_dim: length of a task vector.
        latent_dim: length of z.
        depth: convolutional layers each way; the paper's 12.
        width: channels; for `paper` the widest layer.
        chunk_size: `token` only: a module with more values is cut into several tokens.
        num_prototypes: `token` only: task vectors that the decoder attends over.
        attention_temperature: `token` only: of that attention, in units of cosine.
    """

    preset: str
    condition_dim: int
    latent_dim: int
    depth: int = 12
    width: int = 256
    chunk_size: int = 256
    num_prototypes: int = 1
    attention_temperature: float = 0.03

    def to_json(self) -> dict[str, Any]:
        """Plain dictionary."""
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "GeneratorConfig":
        """Reads `to_json`.

        Raises:
            InvalidBundleError: unknown keys, or a value of the wrong type.
        """
        try:
            return cls(**body)
        except TypeError as error:
            raise InvalidBundleError(f"generator config: {error}") from error


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
    ) -> tuple[
        Float[Tensor, "batch num_params"],
        Float[Tensor, "batch latent"],
        Float[Tensor, "batch latent"],
    ]:
        """Reconstruction, posterior mean and posterior log-variance for given `noise`."""
        mean, log_variance = self.encoder(adapters, condition)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return self.decoder(z, condition), mean, log_variance


def build_decoder(layout: AdapterLayout, config: GeneratorConfig) -> nn.Module:
    """Decoder of a preset.

    Raises:
        InvalidBundleError: unknown preset.
    """
    if config.preset == "paper":
        return PaperDecoder(layout.num_params, config)
    if config.preset == "token":
        return TokenDecoder(layout, config)
    raise InvalidBundleError(f"generator preset {config.preset!r} is unknown: paper or token")


# ---------------------------------------------------------------- preset "paper"


class PaperEncoder(nn.Module):
    """1D CNN over `[l; v]` as one channel; every layer halves the length."""

    def __init__(self, num_params: int, config: GeneratorConfig) -> None:
        super().__init__()
        lengths, channels = _paper_shape(num_params + config.condition_dim, config)
        self.layers = nn.ModuleList(
            nn.Conv1d(channels[i], channels[i + 1], kernel_size=3, stride=2, padding=1)
            for i in range(config.depth)
        )
        self.head = nn.Linear(channels[-1] * lengths[-1], 2 * config.latent_dim)

    def forward(self, adapters: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z."""
        h = torch.cat([adapters, condition], dim=1)[:, None]  # [batch, 1, params + cond]
        for layer in self.layers:
            h = functional.leaky_relu(layer(h), 0.1)
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
        last = self.layers[-1]
        assert isinstance(last, nn.ConvTranspose1d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Normalised adapter vectors `[batch, num_params]`."""
        h: Tensor = self.stem(torch.cat([z, condition], dim=1))
        h = h.view(z.shape[0], self.start_channels, -1)
        for index, layer in enumerate(self.layers):
            h = layer(functional.leaky_relu(h, 0.1))
            h = h[..., : self.lengths[-2 - index]]  # odd lengths: the mirror of the encoder
        return h[:, 0, : self.num_params]


def _paper_shape(length: int, config: GeneratorConfig) -> tuple[list[int], list[int]]:
    """Lengths and channels before the first layer and after each of the `depth` layers."""
    lengths = [length]
    for _ in range(config.depth):
        lengths.append(max(1, math.ceil(lengths[-1] / 2)))
    first = 8
    channels = [1, *(min(config.width, first * 2**i) for i in range(config.depth))]
    return lengths, channels


# ---------------------------------------------------------------- preset "token"


class TokenMap(nn.Module):
    """Cuts adapter vectors into tokens, one or more per module, and back.

    A token knows the role of its module (`q_proj`), the module's ordinal among those of its
    role (its depth in the network) and its chunk within the module.
    """

    index: Int[Tensor, "tokens chunk"]
    role: Int[Tensor, " tokens"]
    layer: Int[Tensor, " tokens"]
    chunk: Int[Tensor, " tokens"]

    def __init__(self, layout: AdapterLayout, chunk_size: int) -> None:
        super().__init__()
        sizes = {m.path: 0 for m in layout.modules}
        for entry in layout.entries:
            sizes[entry.module] += entry.numel
        chunk_size = min(chunk_size, max(sizes.values()))
        index, role, layer, chunk = [], [], [], []
        ordinal = dict.fromkeys(layout.roles, 0)
        offset = 0
        for module in layout.modules:
            size = sizes[module.path]
            for number, start in enumerate(range(0, size, chunk_size)):
                values = torch.arange(start, start + chunk_size)
                index.append(torch.where(values < size, values + offset, layout.num_params))
                role.append(layout.roles.index(module.role))
                layer.append(ordinal[module.role])
                chunk.append(number)
            ordinal[module.role] += 1
            offset += size
        self.num_params = layout.num_params
        self.chunk_size = chunk_size
        self.register_buffer("index", torch.stack(index), persistent=False)
        positions = {"role": role, "layer": layer, "chunk": chunk}
        self.counts = {name: max(numbers) + 1 for name, numbers in positions.items()}
        for name, numbers in positions.items():
            self.register_buffer(name, torch.tensor(numbers), persistent=False)

    def cut(self, vectors: Tensor) -> Float[Tensor, "batch tokens chunk"]:
        """Vectors to tokens; the padding of a module's last token is zero."""
        return functional.pad(vectors, (0, 1))[:, self.index]

    def join(self, tokens: Float[Tensor, "batch tokens chunk"]) -> Tensor:
        """Tokens to vectors `[batch, num_params]`; padding is dropped."""
        padded = tokens.new_zeros(tokens.shape[0], self.num_params + 1)
        padded[:, self.index.flatten()] = tokens.flatten(1)
        return padded[:, : self.num_params]

    def embedding(self, width: int) -> "TokenPositions":
        """Learned position of each token: role + layer + chunk."""
        return TokenPositions(self, width)


class TokenPositions(nn.Module):
    """Sum of learned embeddings of a token's role, layer and chunk, plus one of its own."""

    role_embedding: nn.Embedding
    layer_embedding: nn.Embedding
    chunk_embedding: nn.Embedding

    def __init__(self, tokens: TokenMap, width: int) -> None:
        super().__init__()
        self.tokens = tokens
        for name, count in tokens.counts.items():
            setattr(self, f"{name}_embedding", nn.Embedding(count, width))
        self.own = nn.Parameter(torch.randn(len(tokens.role), width) * 0.5)

    def forward(self) -> Float[Tensor, "tokens width"]:
        """Positions of all tokens."""
        positions: Tensor = self.role_embedding(self.tokens.role)
        positions = positions + self.layer_embedding(self.tokens.layer)
        positions = positions + self.chunk_embedding(self.tokens.chunk)
        return positions + self.own


class ConditionedConv(nn.Module):
    """One layer of the CNN: residual 1D convolution over tokens, modulated by the condition.

    `h + conv(gelu((1 + gain(c)) * norm(h) + shift(c)))`: FiLM (Perez et al. 2018), so the
    condition is felt in every layer.
    """

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(condition_width, 2 * width)
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1)

    def forward(
        self, h: Float[Tensor, "batch tokens width"], condition: Float[Tensor, "batch cond"]
    ) -> Float[Tensor, "batch tokens width"]:
        """The next layer's activations."""
        gain, shift = self.film(condition)[:, None].chunk(2, dim=-1)
        modulated = functional.gelu((1 + gain) * self.norm(h) + shift)
        update: Tensor = self.conv(modulated.mT).mT
        return h + update


class TaskAttention(nn.Module):
    """Reads a task vector by attention over the training tasks' own.

    `softmax(cos(v, keys) / temperature) @ values`: keys are the tasks' mean task vectors, values
    are learned. A wording that training never saw is read as the tasks that it resembles; an
    MLP on the raw vector, fitted to a dozen wordings a task, reads it as anything.
    """

    keys: Float[Tensor, "prototypes cond"]

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.temperature = config.attention_temperature
        self.register_buffer("keys", torch.zeros(config.num_prototypes, config.condition_dim))
        self.values = nn.Parameter(torch.randn(config.num_prototypes, config.width))

    def set_keys(self, prototypes: Float[Tensor, "prototypes cond"]) -> None:
        """Sets the training tasks' mean task vectors; they are normalised here."""
        self.keys.copy_(functional.normalize(prototypes, dim=1))

    def forward(self, condition: Float[Tensor, "batch cond"]) -> Float[Tensor, "batch width"]:
        """What the task vectors mean to the decoder."""
        cosine = functional.normalize(condition, dim=1) @ self.keys.mT
        weights: Tensor = (cosine / self.temperature).softmax(dim=1)
        return weights @ self.values


class TokenEncoder(nn.Module):
    """12-layer 1D CNN over adapter tokens, conditioned on the task vector, pooled to z."""

    def __init__(self, layout: AdapterLayout, config: GeneratorConfig) -> None:
        super().__init__()
        self.tokens = TokenMap(layout, config.chunk_size)
        width = config.width
        self.positions = self.tokens.embedding(width)
        self.stem = nn.Linear(self.tokens.chunk_size, width)
        self.condition = nn.Linear(config.condition_dim, width)
        self.layers = nn.ModuleList(ConditionedConv(width, width) for _ in range(config.depth))
        self.head = nn.Linear(width, 2 * config.latent_dim)

    def forward(self, adapters: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z."""
        c = functional.gelu(self.condition(condition))
        h = self.stem(self.tokens.cut(adapters)) + self.positions()
        for layer in self.layers:
            h = layer(h, c)
        mean, log_variance = self.head(functional.gelu(h).mean(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-12.0, 6.0)


class TokenDecoder(nn.Module):
    """12-layer 1D CNN from token positions to adapter tokens, conditioned on `[z; task(v)]`.

    Every role has its own head, of full rank as long as `width >= chunk_size`. Heads start at
    zero, so an untrained decoder gives the mean adapter (the soup).
    """

    def __init__(self, layout: AdapterLayout, config: GeneratorConfig) -> None:
        super().__init__()
        self.tokens = TokenMap(layout, config.chunk_size)
        width = config.width
        self.positions = self.tokens.embedding(width)
        self.task = TaskAttention(config)
        self.condition = nn.Sequential(
            nn.Linear(config.latent_dim + width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
        )
        self.layers = nn.ModuleList(ConditionedConv(width, width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Parameter(torch.zeros(len(layout.roles), width, self.tokens.chunk_size))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Normalised adapter vectors `[batch, num_params]`."""
        c = self.condition(torch.cat([z, self.task(condition)], dim=1))
        h = self.positions().expand(z.shape[0], -1, -1)  # [batch, tokens, width]
        for layer in self.layers:
            h = layer(h, c)
        heads = self.heads[self.tokens.role]  # [tokens, width, chunk]
        return self.tokens.join(torch.einsum("btw,twc->btc", self.norm(h), heads))
