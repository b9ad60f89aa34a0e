"""Detection suite: average precision of base, own adapter, soup and generated adapter.

The generated adapter comes from words alone, a wording that training never saw, with z = 0, and
the same wording is the prompt. Generation reads the bundle, which holds no task's own adapter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidAdapterError
from service.inference.base_model import BaseModel
from service.inference.box_decoding import LocatedBox
from service.synthesis.attachment import Attachment
from service.synthesis.synthesizer import Synthesizer
from training.evaluation.average_precision import (
    CategoryScore,
    bootstrap_ap,
    bootstrap_difference,
    score_category,
)
from training.evaluation.boxes import find_boxes
from training.evaluation.statistics import Interval
from training.evaluation.text import GIBBERISH
from training.progress import Report
from training.tasks.detection_task import Annotation, DetectionTask

METHODS = ("base", "own", "soup", "generated", "gibberish")

MAX_TASK_GAP = 0.03
"""A generated adapter is as good as the task's own up to this difference of AP50."""

MAX_MEAN_GAP = 0.01
"""The same for the mean over tasks."""


@dataclass(frozen=True)
class DetectionResult:
    """All methods on one task.

    Attributes:
        name: task.
        title: task, for tables.
        description: held-out wording that the adapter was generated from; also the prompt.
        known_to_base: whether the base was trained on the category.
        objects: objects of the category in the test scenes.
        instances: different cut-outs among them.
        ap50: by method, with an interval from a bootstrap over instances.
        ap75: by method.
        seed_ap50: of adapters from generators trained with other seeds, by seed.
        gap: AP50 of generated minus own, paired bootstrap over instances.
        weight_error: relative L2 distance to the own adapter's vector, by method.
        own_row: AP50 of the own adapter's boxes against every category's objects.
        generated_row: the same for the generated adapter's boxes.
        nearest: nearest training task of each held-out wording.
    """

    name: str
    title: str
    description: str
    known_to_base: bool
    objects: int
    instances: int
    ap50: Mapping[str, Interval]
    ap75: Mapping[str, float]
    seed_ap50: Mapping[str, float]
    gap: Interval
    weight_error: Mapping[str, float]
    own_row: Mapping[str, float]
    generated_row: Mapping[str, float]
    nearest: Sequence[str]

    @property
    def mean_generated_ap50(self) -> float:
        """Mean over generator seeds."""
        values = [self.ap50["generated"].value, *self.seed_ap50.values()]
        return sum(values) / len(values)


def evaluate_detection(
    synthesizer: Synthesizer,
    own_adapters: Mapping[str, Float[Tensor, " num_params"]],
    seed_adapters: Mapping[str, Float[Tensor, " num_params"]],
    base: BaseModel,
    tasks: Sequence[DetectionTask],
    known_to_base: Mapping[str, bool],
    features: Float[Tensor, "scenes features rows columns"],
    objects: Sequence[tuple[Annotation, ...]],
    report: Report,
) -> list[DetectionResult]:
    """Scores every method on every task over the same test scenes.

    Args:
        synthesizer: of the bundle.
        own_adapters: by task.
        seed_adapters: `TASK.SEED` of other generators, for the same held-out wording.
        base: the bundle's base, not wrapped.
        tasks: what to detect.
        known_to_base: whether the base was trained on a category.
        features: of the test scenes.
        objects: annotations of the test scenes.
        report: called after every pass over the scenes.

    Raises:
        InvalidAdapterError: a task has no own adapter to compare with.
        BaseModelMismatchError: the base is not the bundle's.
    """
    bundle = synthesizer.bundle
    bundle.check_base(base.digest)
    attachment = Attachment(base.model, bundle.bases)
    categories = [task.name for task in tasks]
    results: list[DetectionResult] = []
    passes = 0

    def detect(vector: Tensor | None, prompt: str) -> list[list[LocatedBox]]:
        nonlocal passes
        found = find_boxes(base, attachment, vector, features, prompt)
        passes += 1
        report(passes)
        return found

    for task in tasks:
        if task.name not in own_adapters:
            raise InvalidAdapterError(f"no own adapter of task {task.name!r} to compare with")
        prompt = task.heldout_descriptions[0]
        words = [synthesizer.synthesize_words(each) for each in task.heldout_descriptions]
        vectors = {
            "own": own_adapters[task.name].float(),
            "soup": bundle.normalizer.mean,
            "generated": words[0].vector.float(),
            "gibberish": synthesizer.synthesize_words(GIBBERISH).vector.float(),
        }
        # The base is asked in words that it was trained on: its best case.
        found = {"base": detect(None, task.descriptions[0])}
        found |= {method: detect(vector, prompt) for method, vector in vectors.items()}
        scores = {m: score_category(boxes, objects, task.name) for m, boxes in found.items()}
        seeds = {
            key.rpartition(".")[2]: score_category(
                detect(vector.float(), prompt), objects, task.name
            ).ap50
            for key, vector in seed_adapters.items()
            if key.rpartition(".")[0] == task.name
        }
        own = vectors["own"]
        results.append(
            DetectionResult(
                name=task.name,
                title=task.title,
                description=prompt,
                known_to_base=known_to_base[task.name],
                objects=len(scores["own"].matches50.truth_owner),
                instances=len(scores["own"].matches50.instances),
                ap50={m: bootstrap_ap(score.matches50) for m, score in scores.items()},
                ap75={m: score.ap75 for m, score in scores.items()},
                seed_ap50=seeds,
                gap=bootstrap_difference(scores["generated"].matches50, scores["own"].matches50),
                weight_error={
                    m: float((v - own).norm() / own.norm())
                    for m, v in vectors.items()
                    if m != "own"
                },
                own_row=_score_row(found["own"], objects, categories),
                generated_row=_score_row(found["generated"], objects, categories),
                nearest=tuple(each.nearest[0].name for each in words),
            )
        )
    attachment.detach(base.model)
    return results


def count_passes(num_tasks: int, num_seeds: int) -> int:
    """Passes over the scenes that `evaluate_detection` makes."""
    return num_tasks * (len(METHODS) + num_seeds)


@dataclass(frozen=True)
class DetectionCheck:
    """Whether the suite's targets are met; `missed` says what was not."""

    missed: tuple[str, ...]


def check_detection(results: Sequence[DetectionResult]) -> DetectionCheck:
    """Compares with the targets: generated like own, above soup, every adapter specialised."""
    missed = []
    for each in results:
        gap = each.mean_generated_ap50 - each.ap50["own"].value
        if abs(gap) > MAX_TASK_GAP:
            missed.append(f"{each.name}: generated - own = {gap:+.3f}, allowed {MAX_TASK_GAP}")
        for kind, row in (("own", each.own_row), ("generated", each.generated_row)):
            best = max(row, key=lambda category: row[category])
            if best != each.name:
                missed.append(f"{each.name}: the {kind} adapter finds {best} better")
    means = mean_ap50(results)
    if abs(means["generated"] - means["own"]) > MAX_MEAN_GAP:
        gap = means["generated"] - means["own"]
        missed.append(f"mean: generated - own = {gap:+.3f}, allowed {MAX_MEAN_GAP}")
    if means["generated"] <= means["soup"]:
        missed.append("mean: the soup is as good as the generated adapters")
    return DetectionCheck(tuple(missed))


def mean_ap50(results: Sequence[DetectionResult]) -> dict[str, float]:
    """mAP50 by method; `generated` is the mean over generator seeds."""
    means = {m: sum(r.ap50[m].value for r in results) / len(results) for m in METHODS}
    means["generated"] = sum(r.mean_generated_ap50 for r in results) / len(results)
    return means


def mean_ap75(results: Sequence[DetectionResult]) -> dict[str, float]:
    """mAP75 by method."""
    return {m: sum(r.ap75[m] for r in results) / len(results) for m in METHODS}


def to_json(results: Sequence[DetectionResult]) -> list[dict[str, object]]:
    """Results as plain dictionaries."""
    return [asdict(result) for result in results]


def _score_row(
    found: Sequence[Sequence[LocatedBox]],
    objects: Sequence[tuple[Annotation, ...]],
    categories: Sequence[str],
) -> dict[str, float]:
    scores: dict[str, CategoryScore] = {
        category: score_category(found, objects, category) for category in categories
    }
    return {category: score.ap50 for category, score in scores.items()}
