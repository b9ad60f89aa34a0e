"""One adapter for all tasks, fine-tuned on their training data together."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from service.synthesis.attachment import initial_vector
from training.baselines.base import MeasureTaskLoss, TrainingTasks
from training.baselines.networks import fit_network


@dataclass
class MultiTask:
    """A single adapter, the same for every task vector; a step is a batch of one random task.

    Attributes:
        task_loss: of an adapter vector on a task's training data.
        num_steps: of the training.
        learning_rate: peak.
    """

    name: ClassVar[str] = "multi_task"
    uses_target: ClassVar[bool] = False

    task_loss: MeasureTaskLoss
    num_steps: int = 500
    learning_rate: float = 0.02
    vector: Float[Tensor, " num_params"] = field(init=False, repr=False)

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Trains from an update of zero; the tasks' own adapters are not used."""
        tasks.require_finite()
        vector = torch.nn.Parameter(initial_vector(tasks.layout, seed))

        def measure_loss(generator: torch.Generator) -> Tensor:
            task = int(torch.randint(len(tasks.names), (1,), generator=generator))
            return self.task_loss(vector, tasks.names[task], generator)

        fit_network(
            [vector],
            measure_loss,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            seed=seed,
        )
        self.vector = vector.detach()

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """The adapter."""
        return self.vector.clone()
