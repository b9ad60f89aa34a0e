"""Losses of adapters on tasks' training examples, through the frozen base."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.errors import InvalidInputError
from service.inference.base_model import BaseModel
from service.synthesis.attachment import Attachment
from training.adapters import MeasureLoss


@dataclass(frozen=True)
class ThroughBase:
    """The frozen base with an attached adapter, and every task's training examples.

    Gradients reach the adapter vector, so that what made the vector can be trained.

    Attributes:
        base: frozen, wrapped by `attachment`.
        attachment: where adapters are put.
        get_loss: by a task's name and those of unseen tasks, the loss of its training examples,
            named by their numbers; the unseen tasks' data are not among them.
        num_examples: of each task.
        batch_size: examples of a drawn batch.
        unseen: tasks whose data must not be read.
    """

    base: BaseModel
    attachment: Attachment
    get_loss: Callable[[str, frozenset[str]], MeasureLoss]
    num_examples: int
    batch_size: int
    unseen: frozenset[str] = frozenset()

    def without(self, tasks: Iterable[str]) -> "ThroughBase":
        """The same base, with some tasks unseen."""
        return replace(self, unseen=frozenset(tasks))

    def measure(
        self, vector: Float[Tensor, " num_params"], task: str, examples: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Loss of an adapter on some of a task's training examples.

        Raises:
            InvalidInputError: the task is unseen.
        """
        if task in self.unseen:
            raise InvalidInputError(
                f"task {task!r} is unseen here: nothing may learn from its data"
            )
        self.attachment.rows.vectors = vector[None].to(self.base.device, self.base.dtype)
        loss = self.get_loss(task, self.unseen)(examples)
        self.attachment.rows.vectors = None
        return loss

    def draw_batch(self, generator: torch.Generator) -> Int[Tensor, " batch"]:
        """Numbers of a batch's examples."""
        return torch.randperm(self.num_examples, generator=generator)[: self.batch_size]

    def measure_batch(
        self, vector: Float[Tensor, " num_params"], task: str, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """Loss on a batch that is drawn."""
        return self.measure(vector, task, self.draw_batch(generator))
