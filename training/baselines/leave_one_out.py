"""Choice of one hyper-parameter by leave-one-out on the training tasks."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from training.baselines.base import TrainingTasks

Predict = Callable[
    [TrainingTasks, Float[Tensor, "wordings d_task"]],
    Float[Tensor, "candidates wordings num_params"],
]
"""Adapters of every candidate for task vectors of a task that is not among the tasks."""


def choose_by_leave_one_out(
    tasks: TrainingTasks, candidates: Sequence[float], predict: Predict
) -> float:
    """The candidate whose adapters are nearest to the own ones of left-out training tasks.

    The error is squared, in units of the scale of each tensor, a mean over values, wordings and
    tasks; each task is predicted from the other families alone. Of equal candidates the first.

    Raises:
        InvalidInputError: one task only.
    """
    scale = tasks.normalizer.scale.double()
    errors = torch.zeros(len(candidates), dtype=torch.float64)
    for rest, left_out in tasks.leave_one_out():
        for vectors, own in zip(left_out.task_vectors, left_out.own_adapters, strict=True):
            errors += ((predict(rest, vectors) - own) / scale).square().mean((1, 2))
    return candidates[int(errors.argmin())]
