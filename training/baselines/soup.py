"""Model Soup, uniform: the mean of all tasks' own adapters."""

from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from training.baselines.base import TrainingTasks


@dataclass
class Soup:
    """Uniform mean over tasks, each with equal weight (Wortsman et al. 2022, uniform soup).

    The same for every task vector; equals the mean adapter of the bundle's normaliser.
    """

    name: ClassVar[str] = "soup"
    uses_target: ClassVar[bool] = False

    mean: Float[Tensor, " num_params"] = field(init=False, repr=False)

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Averages; the seed changes nothing."""
        tasks.require_finite()
        self.mean = tasks.own_adapters.mean(0).float()

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """The mean adapter."""
        return self.mean.clone()
