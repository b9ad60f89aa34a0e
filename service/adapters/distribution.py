"""What is done with a task that is unlike everything that the generator was trained on.

A generator answers any words with some adapter. Whether that adapter has anything to do with them
depends on how near they lie to the training tasks; so that is decided here, and declared.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from service.adapters.record import AdapterRecord
from service.errors import OutOfDistributionError
from service.synthesis.novelty import THRESHOLD
from service.synthesis.synthesizer import NearestTask

_NAMED_TASKS = 3

DecisionKind = Literal["in_distribution", "nearest", "base", "generated_out_of_distribution"]
"""What answers: the task's own adapter; that of the nearest training task; the base; the task's
own adapter, although the task is unlike the training tasks."""


class OutOfDistribution(StrEnum):
    """What to do with a task that is unlike the training tasks.

    Attributes:
        REJECT: an error that names the nearest tasks.
        NEAREST: the adapter of the nearest training task.
        BASE: the base model.
        GENERATE: the adapter that the generator makes of it anyway.
    """

    REJECT = "reject"
    NEAREST = "nearest"
    BASE = "base"
    GENERATE = "generate"


@dataclass(frozen=True)
class Decision:
    """What was decided for a task, for the receipt.

    Attributes:
        kind: what answers.
        nearest: training task nearest to the description.
        in_distribution: the description's score.
        threshold: score from which a description is in distribution.
    """

    kind: DecisionKind
    nearest: NearestTask
    in_distribution: float
    threshold: float


def decide(
    record: AdapterRecord, policy: OutOfDistribution, threshold: float = THRESHOLD
) -> Decision:
    """Whether a generated adapter may answer for its task.

    Args:
        record: what was generated for the task.
        policy: what to do where it lies outside.
        threshold: least score of a task.

    Raises:
        OutOfDistributionError: it lies outside, and the policy is to reject it.
    """
    is_inside = is_in_distribution(record, threshold)
    score = record.in_distribution
    assert score is not None, "it was just looked at"
    nearest = record.nearest[0]
    kind: DecisionKind = "in_distribution"
    if not is_inside:
        match policy:
            case OutOfDistribution.REJECT:
                raise OutOfDistributionError(_describe(record, score, threshold))
            case OutOfDistribution.NEAREST:
                kind = "nearest"
            case OutOfDistribution.BASE:
                kind = "base"
            case OutOfDistribution.GENERATE:
                kind = "generated_out_of_distribution"
    return Decision(kind, nearest, score, threshold)


def is_in_distribution(record: AdapterRecord, threshold: float = THRESHOLD) -> bool:
    """Whether a generated adapter's task resembles the training tasks."""
    assert record.in_distribution is not None, "only what was generated for a task is judged"
    return record.in_distribution >= threshold


def _describe(record: AdapterRecord, score: float, threshold: float) -> str:
    tasks = ", ".join(
        f"{task.name} ({task.similarity:.2f})" for task in record.nearest[:_NAMED_TASKS]
    )
    return (
        f"the task is unlike everything that the generator was trained on: its score is "
        f"{score:.3f}, it takes {threshold:g}. Nearest are {tasks}. "
        "Describe the task in other words, or set `out_of_distribution` to `nearest`, `base` "
        "or `generate`"
    )
