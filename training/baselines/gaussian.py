"""Per-coordinate Gaussian around the nearest task's checkpoints."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from training.baselines.base import TrainingTasks


@dataclass
class Gaussian:
    """A draw from `N(mean, std^2)` of the nearest task's checkpoints, each value on its own.

    The control of Zeng et al. 2025 ("Generative Modeling of Weights: Generalization or
    Memorization?"): noise around what was memorised. A generator that does no better has learned
    no more than that. A task with one checkpoint has no spread: its adapter comes back as it is.
    """

    name: ClassVar[str] = "gaussian"
    uses_target: ClassVar[bool] = False

    tasks: TrainingTasks = field(init=False, repr=False)

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Keeps the tasks; the seed changes nothing."""
        tasks.require_finite()
        self.tasks = tasks

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """A draw by the seed; the standard deviation is that of a sample (n - 1)."""
        index = self.tasks.find_nearest(task_vector)
        mean, rows = self.tasks.own_adapters[index], self.tasks.checkpoints[index].double()
        std = rows.std(0) if len(rows) > 1 else torch.zeros_like(mean)
        noise = torch.randn(len(mean), generator=torch.Generator().manual_seed(seed))
        return (mean + std * noise).float()
