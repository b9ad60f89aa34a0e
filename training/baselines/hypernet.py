"""Hypernetwork MLP from a task vector to an adapter, in the manner of Text-to-LoRA."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from service.inference.base_model import resolve_device
from service.synthesis.layout import AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from service.synthesis.token_networks import TokenMap
from training.baselines.base import MeasureTaskLoss, TrainingTasks
from training.baselines.networks import Sampler, build_seeded, fit_network


class HyperNetwork(nn.Module):
    """`[task(v); position]` of every token through a residual MLP and its role's head.

    A token is a module of the adapter, or a chunk of one. Heads start at zero, so an untrained
    network gives the soup.
    """

    def __init__(
        self, layout: AdapterLayout, task_dim: int, width: int, depth: int, chunk_size: int
    ) -> None:
        super().__init__()
        self.tokens = TokenMap(layout, chunk_size)
        self.positions = self.tokens.embedding(width)
        self.task = nn.Sequential(nn.Linear(task_dim, width), nn.LayerNorm(width))
        self.stem = nn.Linear(2 * width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.SiLU(),
                nn.Linear(4 * width, width),
                nn.SiLU(),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.heads = nn.Parameter(torch.zeros(len(layout.roles), width, self.tokens.chunk_size))

    def forward(self, vectors: Float[Tensor, "batch d_task"]) -> Float[Tensor, "batch num_params"]:
        """Normalised adapter vectors."""
        positions = self.positions().expand(len(vectors), -1, -1)  # [batch, tokens, width]
        task = self.task(vectors)[:, None].expand_as(positions)
        h = self.stem(torch.cat([task, positions], dim=2))
        for block in self.blocks:
            h = h + block(h)
        heads = self.heads[self.tokens.role]  # [tokens, width, chunk]
        return self.tokens.join(torch.einsum("btw,twc->btc", self.norm(h), heads))


@dataclass
class HyperNet:
    """Re-implementation in the manner of Text-to-LoRA (Charakorn et al., ICML 2025).

    Taken from there: a task embedding beside learned embeddings of module and layer, a residual
    MLP, one forward pass for all modules, an L1 reconstruction loss on standardised weights, and
    training through the base model. Different: a head per role gives the layout's own tensors
    (so kind `core` works), several late checkpoints stand for a task, and end-to-end training
    starts from reconstruction instead of replacing it.

    Attributes:
        width: of the MLP.
        depth: residual blocks.
        chunk_size: a module with more values is cut into several tokens.
        num_steps: of the reconstruction.
        batch_size: tasks per step of it.
        learning_rate: peak of it.
        task_loss: end-to-end loss; reconstruction alone where None.
        num_task_steps: end-to-end steps, of one task each.
        task_learning_rate: peak of these.
    """

    name: ClassVar[str] = "hypernet"
    uses_target: ClassVar[bool] = False

    width: int = 256
    depth: int = 3
    chunk_size: int = 256
    num_steps: int = 3000
    batch_size: int = 8
    learning_rate: float = 1e-3
    task_loss: MeasureTaskLoss | None = None
    num_task_steps: int = 500
    task_learning_rate: float = 1e-4
    network: HyperNetwork = field(init=False, repr=False)
    normalizer: AdapterNormalizer = field(init=False, repr=False)

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Trains by reconstruction, then through the base where there is a task loss."""
        sampler = Sampler.build(tasks)
        self.normalizer = tasks.normalizer
        self.network = build_seeded(
            lambda: HyperNetwork(
                tasks.layout, sampler.task_dim, self.width, self.depth, self.chunk_size
            ),
            seed,
        )
        self._reconstruct(sampler, seed)
        if self.task_loss is not None:
            self._train_through_base(sampler, self.task_loss, seed + 1)
        self.network.eval().requires_grad_(False)

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """One forward pass; nothing is drawn."""
        return self._decode(task_vector[None].float())[0]

    def _decode(self, vectors: Tensor) -> Tensor:
        return self.normalizer.denormalize(self.network(vectors.to(resolve_device("auto"))).cpu())

    def _reconstruct(self, sampler: Sampler, seed: int) -> None:
        adapters = sampler.adapters.to(resolve_device("auto"))

        def measure_loss(generator: torch.Generator) -> Tensor:
            chosen = sampler.draw_tasks(self.batch_size, generator)
            vectors = sampler.draw_wordings(chosen, generator).to(adapters.device)
            targets = adapters[sampler.draw_adapters(chosen, generator)]
            return functional.l1_loss(self.network(vectors), targets)

        fit_network(
            self.network.parameters(),
            measure_loss,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            seed=seed,
        )

    def _train_through_base(self, sampler: Sampler, task_loss: MeasureTaskLoss, seed: int) -> None:
        def measure_loss(generator: torch.Generator) -> Tensor:
            chosen = sampler.draw_tasks(1, generator)
            vector = self._decode(sampler.draw_wordings(chosen, generator))[0]
            return task_loss(vector, sampler.names[int(chosen)], generator)

        fit_network(
            self.network.parameters(),
            measure_loss,
            num_steps=self.num_task_steps,
            learning_rate=self.task_learning_rate,
            seed=seed,
        )
