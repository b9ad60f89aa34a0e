"""Nearest adapter: retrieval of one task."""

from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from training.baselines.base import TrainingTasks


@dataclass
class Nearest:
    """Own adapter of the task whose mean task vector has the highest cosine to the given one."""

    name: ClassVar[str] = "nearest"
    uses_target: ClassVar[bool] = False

    tasks: TrainingTasks = field(init=False, repr=False)

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Keeps the tasks; the seed changes nothing."""
        tasks.require_finite()
        self.tasks = tasks

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """The retrieved adapter; of equally near tasks the first."""
        return self.tasks.own_adapters[self.tasks.find_nearest(task_vector)].float()
