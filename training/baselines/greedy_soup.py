"""Model Soup, greedy: adapters are added as long as the mean does no worse."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidInputError
from training.baselines.base import TrainingTasks

ScoreAdapter = Callable[[Float[Tensor, " num_params"], str], float]
"""Score of an adapter vector on the validation data of the named task; higher is better.

It must be on one scale for all tasks (share of headroom, say), because scores are averaged.
"""


@dataclass
class GreedySoup:
    """Greedy soup (Wortsman et al. 2022, Recipe 1) over tasks.

    Own adapters are sorted by their mean score on the validation tasks. Each is kept if the
    uniform mean of those kept so far and it scores no worse. The validation tasks are training
    tasks, so a task that was left out before `fit` is never scored on. Costs two scores per
    training task and validation task.

    Attributes:
        score: of an adapter on one task.
        num_validation_tasks: drawn by the seed of `fit`; all training tasks where None.
        kept: names of the tasks in the soup, best first; set by `fit`.
    """

    name: ClassVar[str] = "greedy_soup"
    uses_target: ClassVar[bool] = False

    score: ScoreAdapter
    num_validation_tasks: int | None = None
    kept: tuple[str, ...] = field(init=False)
    mean: Float[Tensor, " num_params"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_validation_tasks is not None and self.num_validation_tasks < 1:
            raise InvalidInputError("greedy_soup needs at least one validation task")

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Builds the soup; the seed draws the validation tasks."""
        tasks.require_finite()
        order = torch.randperm(len(tasks.names), generator=torch.Generator().manual_seed(seed))
        validation = [tasks.names[i] for i in sorted(order[: self.num_validation_tasks].tolist())]

        def mean_score(indices: list[int]) -> float:
            vector = tasks.own_adapters[indices].mean(0).float()
            return sum(self.score(vector, name) for name in validation) / len(validation)

        alone = [mean_score([index]) for index in range(len(tasks.names))]
        ranked = sorted(range(len(alone)), key=lambda index: -alone[index])  # stable
        kept, best = [ranked[0]], alone[ranked[0]]
        for index in ranked[1:]:
            together = mean_score([*kept, index])
            if together >= best:
                kept, best = [*kept, index], together
        self.kept = tuple(tasks.names[index] for index in kept)
        self.mean = tasks.own_adapters[kept].mean(0).float()

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """The soup, the same for every task vector."""
        return self.mean.clone()
