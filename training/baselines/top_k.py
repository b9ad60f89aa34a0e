"""Top-k: similarity-weighted mean of the most similar tasks' own adapters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidInputError
from training.baselines.base import TrainingTasks
from training.baselines.leave_one_out import choose_by_leave_one_out

TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, math.inf)
"""Candidates, in units of cosine; infinity weighs the k tasks equally."""


@dataclass
class TopK:
    """`softmax(cos(v, keys) / temperature)` over the k most similar tasks, times their adapters.

    Retrieval of adapters by their tasks' embeddings, as LoraRetriever (Zhao et al. 2024) has it,
    with weights. The temperature is chosen by leave-one-out on the training tasks.

    Attributes:
        k: tasks that are mixed; all where None.
        temperatures: candidates.
        temperature: the one chosen; set by `fit`.
    """

    name: ClassVar[str] = "top_k"
    uses_target: ClassVar[bool] = False

    k: int | None = 5
    temperatures: tuple[float, ...] = TEMPERATURES
    temperature: float = field(init=False)
    tasks: TrainingTasks = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise InvalidInputError("top_k needs k of at least 1")
        if not self.temperatures or min(self.temperatures) <= 0:
            raise InvalidInputError("top_k needs temperatures above 0")

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Chooses the temperature; a single candidate is taken as it is."""
        tasks.require_finite()
        self.tasks = tasks
        self.temperature = self.temperatures[0]
        if len(self.temperatures) > 1:
            self.temperature = choose_by_leave_one_out(
                tasks,
                self.temperatures,
                lambda rest, vectors: mix_top_k(rest, vectors, self.k, self.temperatures),
            )

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """The weighted mean."""
        mixed = mix_top_k(self.tasks, task_vector[None], self.k, (self.temperature,))
        return mixed[0, 0].float()


def mix_top_k(
    tasks: TrainingTasks,
    vectors: Float[Tensor, "wordings d_task"],
    k: int | None,
    temperatures: Sequence[float],
) -> Float[Tensor, "temperatures wordings num_params"]:
    """Weighted means of the k most similar tasks' own adapters, one per temperature."""
    similarities = tasks.measure_similarities(vectors)
    top = similarities.topk(min(k or len(tasks.names), len(tasks.names)), dim=1)
    mixed = []
    for temperature in temperatures:
        weights = torch.zeros_like(similarities)
        weights.scatter_(1, top.indices, (top.values / temperature).softmax(1))
        mixed.append(weights @ tasks.own_adapters)
    return torch.stack(mixed)
