"""AP of a method's adapters on test scenes: by task, with intervals over instances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from service.inference.base_model import BaseModel
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from training.evaluation.average_precision import resample_ap, score_category
from training.evaluation.boxes import find_boxes
from training.evaluation.statistics import Interval, Resampled
from training.progress import Report
from training.tasks.detection_task import Annotation, DetectionTask


@dataclass(frozen=True)
class TaskScore:
    """One task under one method.

    Attributes:
        ap50: mean over seeds, with a 95% interval from a bootstrap over instances.
        ap75: mean over seeds.
        seed_ap50: of each seed, in order; one where the method draws nothing.
    """

    ap50: Interval
    ap75: float
    seed_ap50: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """All tasks, and their means.

    Attributes:
        tasks: by name.
        ap50: mean over tasks, with a 95% interval over the instances of every task.
        ap75: mean over tasks.
    """

    tasks: Mapping[str, TaskScore]
    ap50: Interval
    ap75: float


def score_adapters(
    base: BaseModel,
    bases: AdapterBases,
    tasks: Sequence[DetectionTask],
    vectors: Mapping[str, Sequence[Float[Tensor, " num_params"]]] | None,
    features: Float[Tensor, "scenes features rows columns"],
    objects: Sequence[tuple[Annotation, ...]],
    report: Report,
) -> Scores:
    """Scores every task's adapters, prompted with the held-out wording.

    Args:
        base: not wrapped, and given back so.
        bases: of the adapters.
        tasks: what to find.
        vectors: of each task, one adapter a seed; None for the base alone, which is asked in
            words that it was trained on: its best case.
        features: of the test scenes.
        objects: annotations of the test scenes.
        report: called after every pass over the scenes.
    """
    attachment = Attachment(base.model, bases)
    scored: dict[str, TaskScore] = {}
    resampled: list[Resampled] = []
    passes = 0
    for number, task in enumerate(tasks):
        rows = [None] if vectors is None else [vector.float() for vector in vectors[task.name]]
        prompt = task.descriptions[0] if vectors is None else task.heldout_descriptions[0]
        scores = []
        for row in rows:
            found = find_boxes(base, attachment, row, features, prompt)
            scores.append(score_category(found, objects, task.name))
            passes += 1
            report(passes)
        # Every task has draws of its own: their instances have nothing to do with each other.
        draws = [resample_ap(score.matches50, seed=number) for score in scores]
        resampled.append(average(draws))
        scored[task.name] = TaskScore(
            resampled[-1].interval(),
            sum(score.ap75 for score in scores) / len(scores),
            tuple(score.ap50 for score in scores),
        )
    attachment.detach(base.model)
    ap75 = sum(each.ap75 for each in scored.values()) / len(scored)
    return Scores(scored, average(resampled).interval(), ap75)


def average(parts: Sequence[Resampled]) -> Resampled:
    """Mean of statistics, draw by draw."""
    values = [part.value for part in parts]
    return Resampled(sum(values) / len(values), np.mean([part.draws for part in parts], axis=0))
