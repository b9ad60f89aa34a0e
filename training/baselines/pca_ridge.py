"""PCA codec of the adapters, and ridge regression from task vectors to codes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidInputError
from training.baselines.base import TrainingTasks
from training.baselines.leave_one_out import choose_by_leave_one_out

STRENGTHS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""Candidates of ridge's penalty; the largest all but gives the soup."""


@dataclass(frozen=True)
class PcaCodec:
    """Principal components of the tasks' own adapters, in normalised units around the soup.

    Attributes:
        mean: the soup.
        scale: of each value, equal within a tensor, so that no large tensor takes all components.
        components: orthonormal rows, by falling variance.
    """

    mean: Float[Tensor, " num_params"]
    scale: Float[Tensor, " num_params"]
    components: Float[Tensor, "codes num_params"]

    @classmethod
    def fit(cls, tasks: TrainingTasks, num_components: int) -> "PcaCodec":
        """Fits; n tasks have n - 1 components at most."""
        mean = tasks.own_adapters.mean(0)
        scale = tasks.normalizer.scale.double()
        centred = (tasks.own_adapters - mean) / scale
        components = torch.linalg.svd(centred, full_matrices=False).Vh
        return cls(mean, scale, components[: min(num_components, len(tasks.names) - 1)])

    def encode(self, adapters: Float[Tensor, "batch num_params"]) -> Float[Tensor, "batch codes"]:
        """Adapters to codes."""
        return (adapters - self.mean) / self.scale @ self.components.T

    def decode(self, codes: Float[Tensor, "*batch codes"]) -> Float[Tensor, "*batch num_params"]:
        """Codes to adapters; the zero code is the soup."""
        return codes @ self.components * self.scale + self.mean


@dataclass(frozen=True)
class Ridge:
    """`y = b + x W` with the least `sum_i w_i |y_i - b - x_i W|^2 + strength |W|^2`."""

    weights: Float[Tensor, "inputs codes"]
    bias: Float[Tensor, " codes"]

    @classmethod
    def fit(
        cls,
        x: Float[Tensor, "rows inputs"],
        y: Float[Tensor, "rows codes"],
        row_weights: Float[Tensor, " rows"],
        strengths: Sequence[float],
    ) -> list["Ridge"]:
        """One model per strength, from one singular value decomposition (Hastie et al., 3.4.1)."""
        share = row_weights / row_weights.sum()
        x_mean, y_mean = share @ x, share @ y
        root = row_weights.sqrt()[:, None]
        u, s, vh = torch.linalg.svd(root * (x - x_mean), full_matrices=False)
        rotated = u.T @ (root * (y - y_mean))
        models = []
        for strength in strengths:
            weights = vh.T @ (s / (s.square() + strength))[:, None].mul(rotated)
            models.append(cls(weights, y_mean - x_mean @ weights))
        return models

    def predict(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows codes"]:
        """Codes of inputs."""
        return x @ self.weights + self.bias


@dataclass
class PcaRidge:
    """Linear map from task vectors to the codes of the adapters.

    Every training wording is a row, and every task has the same weight in all. The strength is
    chosen by leave-one-out on the training tasks, with codec and ridge fitted anew each time.

    Attributes:
        num_components: codes at most.
        strengths: candidates.
        strength: the one chosen; set by `fit`.
    """

    name: ClassVar[str] = "pca_ridge"
    uses_target: ClassVar[bool] = False

    num_components: int = 16
    strengths: tuple[float, ...] = STRENGTHS
    strength: float = field(init=False)
    codec: PcaCodec = field(init=False, repr=False)
    ridge: Ridge = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_components < 1:
            raise InvalidInputError("pca_ridge needs at least one component")
        if not self.strengths or min(self.strengths) <= 0:
            raise InvalidInputError("pca_ridge needs strengths above 0")

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Chooses the strength and fits; the seed changes nothing."""
        tasks.require_finite()
        self.strength = self.strengths[0]
        if len(self.strengths) > 1:
            self.strength = choose_by_leave_one_out(tasks, self.strengths, self._predict)
        self.codec, (self.ridge,) = self._fit(tasks, (self.strength,))

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """The decoded prediction."""
        return self.codec.decode(self.ridge.predict(task_vector[None].double()))[0].float()

    def _fit(
        self, tasks: TrainingTasks, strengths: Sequence[float]
    ) -> tuple[PcaCodec, list[Ridge]]:
        codec = PcaCodec.fit(tasks, self.num_components)
        counts = torch.tensor([len(rows) for rows in tasks.task_vectors])
        codes = codec.encode(tasks.own_adapters).repeat_interleave(counts, dim=0)
        row_weights = (1.0 / counts.double()).repeat_interleave(counts)
        x = torch.cat(tasks.task_vectors).double()
        return codec, Ridge.fit(x, codes, row_weights, strengths)

    def _predict(
        self, rest: TrainingTasks, vectors: Float[Tensor, "wordings d_task"]
    ) -> Float[Tensor, "strengths wordings num_params"]:
        codec, models = self._fit(rest, self.strengths)
        return codec.decode(torch.stack([model.predict(vectors.double()) for model in models]))
