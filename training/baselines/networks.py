"""Seeded initialisation, training and draws, for the baselines that are networks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from service.inference.base_model import resolve_device
from training.baselines.base import TrainingTasks
from training.schedule import warm_cosine

Network = TypeVar("Network", bound=nn.Module)

WARM_SHARE = 0.05
"""Share of the steps over which the learning rate rises."""


def build_seeded(build: Callable[[], Network], seed: int) -> Network:
    """Initialises a network from a seed, on a GPU where there is one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().to(resolve_device("auto"))


def fit_network(
    parameters: Iterable[nn.Parameter],
    measure_loss: Callable[[torch.Generator], Float[Tensor, ""]],
    *,
    num_steps: int,
    learning_rate: float,
    seed: int,
) -> None:
    """AdamW without weight decay, linear warm-up, cosine decay to zero, gradients clipped at 1.

    Args:
        parameters: what is trained.
        measure_loss: scalar loss of one step; all that it draws comes from the generator it is
            given, which follows from (seed, step).
        num_steps: optimiser steps; none leaves the parameters alone.
        learning_rate: peak.
        seed: of the steps' generators.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warm_cosine(step, num_steps, WARM_SHARE * num_steps)
        loss = measure_loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class Sampler:
    """Draws pairs of one checkpoint and one wording of a task, every task equally often.

    Attributes:
        names: of the tasks.
        adapters: their normalised checkpoints, tasks in order.
        vectors: task vectors of their training wordings, tasks in order.
        num_adapters: checkpoints of each task.
        num_vectors: wordings of each task.
    """

    names: tuple[str, ...]
    adapters: Float[Tensor, "rows num_params"]
    vectors: Float[Tensor, "wordings d_task"]
    num_adapters: Int[Tensor, " tasks"]
    num_vectors: Int[Tensor, " tasks"]

    @classmethod
    def build(cls, tasks: TrainingTasks) -> "Sampler":
        """Normalises the checkpoints by the tasks' own statistics.

        Raises:
            InvalidInputError: values that are not finite.
        """
        tasks.require_finite()
        return cls(
            tasks.names,
            tasks.normalizer.normalize(torch.cat(tasks.checkpoints).float()),
            torch.cat(tasks.task_vectors).float(),
            torch.tensor([len(rows) for rows in tasks.checkpoints]),
            torch.tensor([len(rows) for rows in tasks.task_vectors]),
        )

    @property
    def task_dim(self) -> int:
        """Length of a task vector."""
        return self.vectors.shape[1]

    def draw_tasks(self, count: int, generator: torch.Generator) -> Int[Tensor, " batch"]:
        """Numbers of tasks."""
        return torch.randint(len(self.names), (count,), generator=generator)

    def draw_wordings(
        self, tasks: Int[Tensor, " batch"], generator: torch.Generator
    ) -> Float[Tensor, "batch d_task"]:
        """A task vector of a random training wording of each task."""
        return self.vectors[_draw_rows(self.num_vectors, tasks, generator)]

    def draw_adapters(
        self, tasks: Int[Tensor, " batch"], generator: torch.Generator
    ) -> Int[Tensor, " batch"]:
        """The row in `adapters` of a random checkpoint of each task."""
        return _draw_rows(self.num_adapters, tasks, generator)


def _draw_rows(counts: Tensor, tasks: Tensor, generator: torch.Generator) -> Tensor:
    """A random row of each task, where task i has `counts[i]` rows after those before it."""
    first = counts.cumsum(0) - counts
    share = torch.rand(len(tasks), generator=generator, dtype=torch.float64)
    return first[tasks] + (share * counts[tasks]).long()
