"""Oracle: the mean of the target task's own checkpoints."""

from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidInputError
from training.baselines.base import TrainingTasks


@dataclass
class OwnCheckpointsMean:
    """Mean of the target's checkpoints, all fine-tuning seeds together.

    An oracle: it reads the target's weights, which no generator may, and bounds what a method
    could reach that knows the task's own adapters.

    Attributes:
        target: name of the task that adapters are made for.
    """

    name: ClassVar[str] = "own_checkpoints_mean"
    uses_target: ClassVar[bool] = True

    target: str
    mean: Float[Tensor, " num_params"] = field(init=False, repr=False)

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Averages.

        Raises:
            InvalidInputError: the target is not among the tasks.
        """
        if self.target not in tasks.names:
            raise InvalidInputError(
                f"oracle {self.name!r} needs target {self.target!r} among the tasks: fit it on "
                "all of them"
            )
        tasks.require_finite()
        self.mean = tasks.own_adapters[tasks.names.index(self.target)].float()

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """The target's mean checkpoint, whatever the task vector."""
        return self.mean.clone()
