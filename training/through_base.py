"""Losses of adapters on tasks' training examples, through the frozen base."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
        get_loss: by a task's name, the loss of its training examples, named by their numbers.
        num_examples: of each task.
        batch_size: examples of a drawn batch.
    """

    base: BaseModel
    attachment: Attachment
    get_loss: Callable[[str], MeasureLoss]
    num_examples: int
    batch_size: int

    def measure(
        self, vector: Float[Tensor, " num_params"], task: str, examples: Int[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Loss of an adapter on some of a task's training examples."""
        self.attachment.rows.vectors = vector[None].to(self.base.device, self.base.dtype)
        loss = self.get_loss(task)(examples)
        self.attachment.rows.vectors = None
        return loss

    def measure_batch(
        self, vector: Float[Tensor, " num_params"], task: str, generator: torch.Generator
    ) -> Float[Tensor, ""]:
        """The same on a batch that is drawn."""
        examples = torch.randperm(self.num_examples, generator=generator)[: self.batch_size]
        return self.measure(vector, task, examples)
