"""The generator's preset `token`: 1D CNNs over one token per module, or chunk of one."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from service.synthesis.generator_config import GeneratorConfig
from service.synthesis.layout import AdapterLayout


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

    def set_keys(self, prototypes: Float[Tensor, "prototypes cond"]) -> None:
        """As `TaskAttention.set_keys`."""
        self.task.set_keys(prototypes)

    def read_task(self, condition: Tensor) -> Float[Tensor, "batch width"]:
        """What task vectors mean to the decoder: `task(v)`."""
        read: Tensor = self.task(condition)
        return read

    def read_condition(self, z: Tensor, task: Tensor) -> Float[Tensor, "batch width"]:
        """What modulates every layer: `[z; task(v)]` through a small MLP."""
        c: Tensor = self.condition(torch.cat([z, task], dim=1))
        return c

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Normalised adapter vectors `[batch, num_params]`; serving: `row_decoding`."""
        return self.decode_task(z, self.read_task(condition))

    def decode_task(self, z: Tensor, task: Float[Tensor, "batch width"]) -> Tensor:
        """The same, of what `read_task` gives."""
        positions = self.positions().expand(z.shape[0], -1, -1)
        return self.decode_tokens(positions, self.read_condition(z, task))

    def decode_tokens(
        self, h: Float[Tensor, "batch tokens width"], c: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch num_params"]:
        """The CNN over tokens, modulated by the condition, and each role's head."""
        for layer in self.layers:
            h = layer(h, c)
        heads = self.heads[self.tokens.role]  # [tokens, width, chunk]
        return self.tokens.join(torch.einsum("btw,twc->btc", self.norm(h), heads))
