"""Memorisation audit: is a generated adapter one of the training checkpoints?

Two questions (Wang et al. 2024, Neural Network Diffusion, section 4): how near is the nearest
training checkpoint, as an update of the base; and does the adapter err where a training checkpoint
errs. Both are read beside the same numbers of an independent fine-tuning of the task.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from service.errors import InvalidInputError
from service.synthesis.bases import AdapterBases
from training.evaluation.updates import multiply_updates

BATCH_CHECKPOINTS = 64


@dataclass(frozen=True)
class NearestCheckpoint:
    """The training checkpoint nearest to an adapter.

    Attributes:
        task: of the checkpoint.
        index: of the checkpoint among its task's.
        distance: `|delta W - delta W'|_F` over all modules.
        relative: distance over the adapter's own `|delta W|_F`; 0 for a copy.
    """

    task: str
    index: int
    distance: float
    relative: float


def find_nearest_checkpoint(
    bases: AdapterBases,
    vector: Float[Tensor, " num_params"],
    checkpoints: Mapping[str, Float[Tensor, "checkpoints num_params"]],
) -> NearestCheckpoint:
    """Searches all checkpoints of all training tasks.

    Raises:
        InvalidInputError: there are no checkpoints.
    """
    if not any(len(rows) for rows in checkpoints.values()):
        raise InvalidInputError("there are no training checkpoints to compare with")
    distances: list[tuple[float, str, int]] = []
    size = 0.0
    for task, rows in checkpoints.items():
        for start in range(0, len(rows), BATCH_CHECKPOINTS):
            part = rows[start : start + BATCH_CHECKPOINTS]
            products = multiply_updates(bases, vector.expand(len(part), -1), part)
            size = float(products.first[0].norm())
            total = products.distance.norm(dim=1)
            nearest = int(total.argmin())
            distances.append((float(total[nearest]), task, start + nearest))
    distance, task, index = min(distances)
    relative = distance / size if size else (float("inf") if distance else 0.0)
    return NearestCheckpoint(task, index, distance, relative)


def measure_iou(first: Bool[Tensor, " items"], second: Bool[Tensor, " items"]) -> float:
    """Intersection over union (Jaccard index) of two sets of the same items; 1 if both are empty.

    Args:
        first: whether each item is in the first set, e.g. whether a token is predicted wrongly.
        second: the same for the second set.
    """
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0
