"""Few-shot refinement: gradient steps on what a decoder reads of a task, never on weights.

A decoder turns the code `[z; task(v)]` of a few hundred numbers into a whole adapter. Examples of
a task that no training task is like move this code: the frozen base measures how well it predicts
them with the adapter, the gradient with respect to the adapter goes back through the decoder, and
Adam (Kingma and Ba 2015) takes a step. What counts in the end is the code under which the examples
were predicted best, so that refinement never makes the prediction of them worse.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from service.synthesis.cvae import Decoder
from service.synthesis.normalizer import AdapterNormalizer

MAX_REFINE_STEPS = 16

_STEP_SHARE = 0.2
"""Of the code's own size: how far Adam moves a number in one step."""

_Z_STEP = 0.1
"""The same for z, whose prior has the standard deviation 1."""


@dataclass(frozen=True)
class Refined:
    """What refinement came to.

    Attributes:
        vector: the adapter under which the examples were predicted best, float32.
        steps: gradient steps that were made.
        loss_before: nats a token of the examples with the adapter as generated.
        loss_after: the same with `vector`, never more.
    """

    vector: Float[Tensor, " num_params"]
    steps: int
    loss_before: float
    loss_after: float


class Refinement:
    """The steps of one adapter.

    Args:
        decoder: frozen.
        normalizer: of its adapters.
        z: latent code to start from.
        task_vector: of the task.
    """

    def __init__(
        self,
        decoder: Decoder,
        normalizer: AdapterNormalizer,
        z: Float[Tensor, " latent"],
        task_vector: Float[Tensor, " cond"],
    ) -> None:
        self._decoder = decoder
        self._normalizer = normalizer
        with torch.no_grad():
            task = decoder.read_task(task_vector[None])
        size = float(task.square().mean().sqrt())
        self._code = [z[None].clone().requires_grad_(), task.clone().requires_grad_()]
        rates = (_Z_STEP, _STEP_SHARE * size)
        groups = [
            {"params": [part], "lr": rate} for part, rate in zip(self._code, rates, strict=True)
        ]
        self._optimizer = torch.optim.Adam(groups)
        self._steps = 0
        self._first_loss: float | None = None
        self._best: tuple[float, Tensor] | None = None
        self._vector = self._decode()

    @property
    def vector(self) -> Float[Tensor, " num_params"]:
        """The adapter that is to be measured next."""
        return self._vector.detach()

    def step(self, loss: float, gradient: Float[Tensor, " num_params"]) -> None:
        """Moves the code against the gradient of the loss with respect to `vector`.

        Args:
            loss: nats a token of the examples with `vector`.
            gradient: of it.
        """
        self._remember(loss)
        gradients = torch.autograd.grad(self._vector, self._code, gradient)
        for part, change in zip(self._code, gradients, strict=True):
            part.grad = change
        self._optimizer.step()
        self._steps += 1
        self._vector = self._decode()

    def finish(self, loss: float) -> Refined:
        """The best adapter, after `vector` was measured for the last time."""
        self._remember(loss)
        assert self._best is not None
        assert self._first_loss is not None
        least, vector = self._best
        return Refined(vector, self._steps, self._first_loss, least)

    def _decode(self) -> Float[Tensor, " num_params"]:
        with torch.enable_grad():
            normalized = self._decoder.decode_task(*self._code)[0].float().cpu()
            return self._normalizer.denormalize(normalized)

    def _remember(self, loss: float) -> None:
        if self._first_loss is None:
            self._first_loss = loss
        if self._best is None or loss < self._best[0]:
            self._best = (loss, self.vector)
