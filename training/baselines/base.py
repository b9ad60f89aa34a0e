"""What a baseline is given, and what it must give back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from service.errors import InvalidInputError
from service.synthesis.layout import AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from training.task_vectors import TaskVectors

MeasureTaskLoss = Callable[[Float[Tensor, " num_params"], str, torch.Generator], Float[Tensor, ""]]
"""Differentiable loss of an adapter vector on training data of the named task, drawn anew."""


@dataclass(frozen=True)
class TrainingTasks:
    """Tasks with their own adapters, all in one order.

    Attributes:
        names: of the tasks, each once.
        families: what must be left out together: tasks of one family resemble each other.
        task_vectors: of each task, a unit row per training wording.
        checkpoints: of each task, late checkpoints of one or more fine-tuning seeds.
        layout: of all adapters.

    Raises:
        InvalidInputError: no task, a name twice, a task without wordings or checkpoints, or
            adapters of another layout.
    """

    names: tuple[str, ...]
    families: tuple[str, ...]
    task_vectors: tuple[Float[Tensor, "_wordings d_task"], ...]
    checkpoints: tuple[Float[Tensor, "_checkpoints num_params"], ...]
    layout: AdapterLayout

    def __post_init__(self) -> None:
        parts = (self.names, self.families, self.task_vectors, self.checkpoints)
        if len({len(part) for part in parts}) != 1 or not self.names:
            raise InvalidInputError(
                "training tasks need a name, a family, task vectors and checkpoints each: got "
                + ", ".join(str(len(part)) for part in parts)
            )
        if len(set(self.names)) != len(self.names):
            raise InvalidInputError("training tasks name a task twice")
        for name, vectors, rows in zip(
            self.names, self.task_vectors, self.checkpoints, strict=True
        ):
            if not len(vectors) or not len(rows):
                raise InvalidInputError(f"task {name!r} has no wordings or no checkpoints")
            if rows.shape[1] != self.layout.num_params:
                raise InvalidInputError(
                    f"checkpoints of task {name!r} have {rows.shape[1]} values, but the layout "
                    f"has {self.layout.num_params}"
                )

    @classmethod
    def from_stages(
        cls,
        layout: AdapterLayout,
        checkpoints: Mapping[str, Float[Tensor, "_checkpoints num_params"]],
        vectors: TaskVectors,
        families: Mapping[str, str],
    ) -> "TrainingTasks":
        """Tasks as the stages of a run leave them; a task without family is one of its own."""
        names = tuple(checkpoints)
        return cls(
            names,
            tuple(families.get(name, name) for name in names),
            tuple(vectors.of_task(index) for index in range(len(names))),
            tuple(checkpoints.values()),
            layout,
        )

    def without(self, *labels: str) -> "TrainingTasks":
        """The tasks but some, each named itself or with its whole family.

        What is returned holds no tensor of the tasks left out.

        Raises:
            InvalidInputError: no such task or family, or no task would be left.
        """
        known = sorted({*self.names, *self.families})
        if unknown := [label for label in labels if label not in known]:
            raise InvalidInputError(f"no task or family {unknown[0]!r}; known: {', '.join(known)}")
        pairs = enumerate(zip(self.names, self.families, strict=True))
        left = [index for index, pair in pairs if not {*pair} & {*labels}]
        if not left:
            raise InvalidInputError(
                f"without {', '.join(map(repr, labels))} no task is left to learn from"
            )
        return self._take(left)

    def leave_one_out(self) -> Iterator[tuple["TrainingTasks", "TrainingTasks"]]:
        """Pairs (the rest, what is left out): a family at a time, or a task where all are one.

        Raises:
            InvalidInputError: there is one task only.
        """
        if len(self.names) < 2:
            raise InvalidInputError("leave-one-out needs at least two tasks")
        labels = self.families if len(set(self.families)) > 1 else self.names
        for left_out in dict.fromkeys(labels):
            outside = [index for index, label in enumerate(labels) if label != left_out]
            inside = [index for index, label in enumerate(labels) if label == left_out]
            yield self._take(outside), self._take(inside)

    def _take(self, indices: Sequence[int]) -> "TrainingTasks":
        return TrainingTasks(
            tuple(self.names[index] for index in indices),
            tuple(self.families[index] for index in indices),
            tuple(self.task_vectors[index] for index in indices),
            tuple(self.checkpoints[index] for index in indices),
            self.layout,
        )

    @cached_property
    def own_adapters(self) -> Float[Tensor, "tasks num_params"]:
        """Mean of each task's checkpoints, in float64.

        Raises:
            InvalidInputError: a value is not finite.
        """
        means = torch.stack([rows.double().mean(0) for rows in self.checkpoints])
        return _require_finite(means, "own adapters")

    @cached_property
    def keys(self) -> Float[Tensor, "tasks d_task"]:
        """Mean task vector of each task, of unit length, in float64.

        Raises:
            InvalidInputError: a value is not finite.
        """
        means = torch.stack([rows.double().mean(0) for rows in self.task_vectors])
        return _require_finite(normalize(means, dim=1), "task vectors")

    @cached_property
    def normalizer(self) -> AdapterNormalizer:
        """Statistics of these tasks alone, each with equal weight."""
        return AdapterNormalizer.fit(
            self.layout, dict(zip(self.names, self.checkpoints, strict=True))
        )

    def require_finite(self) -> None:
        """Refuses adapters and task vectors that nothing can be learned from.

        Raises:
            InvalidInputError: a value is not finite.
        """
        _ = (self.own_adapters, self.keys)

    def measure_similarities(
        self, vectors: Float[Tensor, "wordings d_task"]
    ) -> Float[Tensor, "wordings tasks"]:
        """Cosine of each task vector to each task's mean task vector, in float64."""
        return normalize(vectors.double(), dim=1) @ self.keys.T

    def find_nearest(self, task_vector: Float[Tensor, " d_task"]) -> int:
        """The task of the highest cosine; of equally near ones the first."""
        return int(self.measure_similarities(task_vector[None])[0].argmax())


@runtime_checkable
class Baseline(Protocol):
    """A method that makes an adapter for a task vector from other tasks' adapters.

    Equal tasks, task vector and seeds give equal bytes, and the global random state is left as
    it is. Weight-space methods combine adapter vectors value by value, factors of a LoRA included.
    """

    @property
    def name(self) -> str:
        """Its name in the registry and in tables."""
        ...

    @property
    def uses_target(self) -> bool:
        """Whether it is an oracle, which must be fitted on the target task too."""
        ...

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        """Learns from the tasks; what it chooses, it chooses on these alone.

        Raises:
            InvalidInputError: values that are not finite, or too few tasks.
        """
        ...

    def generate(
        self, task_vector: Float[Tensor, " d_task"], seed: int
    ) -> Float[Tensor, " num_params"]:
        """The adapter vector for a task, in float32. Call `fit` before.

        Args:
            task_vector: of the task's description.
            seed: of what is drawn here; methods that draw nothing ignore it.
        """
        ...


def _require_finite(values: Tensor, what: str) -> Tensor:
    if not torch.isfinite(values).all():
        raise InvalidInputError(f"{what} of the training tasks hold values that are not finite")
    return values
