"""The generator's preset `in_context`: training tasks' adapters are its context.

    w_i      = softmax over the k nearest tasks of cos(v, v_i) / temperature
    soup     = sum_i w_i l_i
    decode   = soup + shift + gate * CNN(soup, [z; sum_i w_i read(v_i, l_i)])

`v_i` and `l_i` are a training task's mean task vector and its own adapter; the temperature is
chosen in training, on tasks whose family is hidden. At gate and shift 0 the decoder is
retrieval with weights. The shift, the same for all tasks, is only trained through the base: what
helps every task, as one multi-task adapter would. The residual is trained in episodes that hide
the task to be decoded, and all of its family, from the context. So it learns what is to be done
about a task that nothing was trained for, and `z` what the description leaves open.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from service.synthesis.generator_config import GeneratorConfig
from service.synthesis.layout import AdapterLayout
from service.synthesis.token_networks import TokenDecoder


class InContextDecoder(TokenDecoder):
    """Similarity-weighted adapters of the nearest training tasks, and a gated residual over them.

    Attributes:
        keys: unit mean task vector of each training task.
        adapters: own adapter of each, normalised.
        temperature: of the weights; starts at the configured one.
        gate: share of the residual; starts at 0.
        shift: starts at 0; reconstruction leaves it there.
    """

    keys: Float[Tensor, "tasks cond"]
    temperature: Float[Tensor, ""]
    adapters: Float[Tensor, "tasks num_params"]

    def __init__(self, layout: AdapterLayout, config: GeneratorConfig) -> None:
        super().__init__(layout, config)
        self.num_neighbours = min(config.num_neighbours, config.num_prototypes)
        self.register_buffer("temperature", torch.tensor(config.attention_temperature))
        self.register_buffer("keys", torch.zeros(config.num_prototypes, config.condition_dim))
        self.register_buffer("adapters", torch.zeros(config.num_prototypes, layout.num_params))
        del self.task  # free values per task are what a hidden task would be known by
        self.read = nn.Sequential(
            nn.Linear(config.condition_dim + config.width, config.width), nn.GELU()
        )
        self.stem = nn.Linear(self.tokens.chunk_size, config.width)
        self.gate = nn.Parameter(torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(layout.num_params))
        nn.init.normal_(self.heads, std=config.width**-0.5)  # else nothing would open the gate

    def set_keys(self, prototypes: Float[Tensor, "tasks cond"]) -> None:
        """Sets the training tasks' mean task vectors; they are normalised here."""
        self.keys.copy_(functional.normalize(prototypes, dim=1))

    def set_adapters(self, adapters: Float[Tensor, "tasks num_params"]) -> None:
        """Sets the training tasks' own adapters, normalised."""
        self.adapters.copy_(adapters)

    def weigh_tasks(
        self,
        condition: Float[Tensor, "batch cond"],
        hidden: Bool[Tensor, "batch tasks"] | None = None,
    ) -> Float[Tensor, "batch tasks"]:
        """Weights of the training tasks for task vectors; the hidden ones have none."""
        cosine = functional.normalize(condition, dim=1) @ self.keys.mT
        if hidden is not None:
            cosine = cosine.masked_fill(hidden, -torch.inf)
        top = cosine.topk(self.num_neighbours, dim=1)
        shares = (top.values / self.temperature).softmax(dim=1)
        return torch.zeros_like(cosine).scatter(1, top.indices, shares)

    def forward(
        self, z: Tensor, condition: Tensor, hidden: Bool[Tensor, "batch tasks"] | None = None
    ) -> Tensor:
        """Normalised adapter vectors `[batch, num_params]`.

        Args:
            z: latent codes.
            condition: task vectors.
            hidden: training tasks that must not be looked at, per row; at least one must be left.
        """
        return self.decode_task(z, self.weigh_tasks(condition, hidden))

    def read_task(self, condition: Float[Tensor, "batch cond"]) -> Float[Tensor, "batch tasks"]:
        """What task vectors mean to the decoder: weights of the training tasks."""
        return self.weigh_tasks(condition)

    def decode_task(self, z: Tensor, task: Float[Tensor, "batch tasks"]) -> Tensor:
        """Normalised adapter vectors of the weights of training tasks."""
        soup = task @ self.adapters
        context = self.stem(self.tokens.cut(soup))  # [batch, tokens, width]
        told = torch.cat([task @ self.keys, context.mean(1)], dim=1)
        c = self.condition(torch.cat([z, self.read(told)], dim=1))
        return soup + self.shift + self.gate * self.decode_tokens(self.positions() + context, c)
