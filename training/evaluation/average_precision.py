"""Average precision of detections, matched by pycocotools, with a bootstrap over instances."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.inference.box_decoding import LocatedBox
from training.evaluation.statistics import Interval, Resampled, draw_units
from training.tasks.detection_task import Annotation

THRESHOLDS = (0.5, 0.75)
"""IoU of mAP50 and mAP75."""

PIXELS = 1000.0
"""Fractions are scaled to this, because COCO's tools think in pixels."""

RECALLS = np.linspace(0.0, 1.0, 101)
"""Recall levels at which COCO samples precision."""

RESAMPLES = 500
"""Bootstrap draws: each is an AP."""


@dataclass(frozen=True)
class Matches:
    """Detections of one category at one IoU threshold, sorted by falling score.

    Attributes:
        is_hit: whether a detection matches an object.
        owner: index into `instances` of the matched object, -1 for none.
        scene: scene of the detection.
        instances: names of the objects' instances.
        truth_owner: index into `instances` of every object.
        truth_scene: scene of every object.
    """

    is_hit: npt.NDArray[np.bool_]
    owner: npt.NDArray[np.int64]
    scene: npt.NDArray[np.int64]
    instances: tuple[str, ...]
    truth_owner: npt.NDArray[np.int64]
    truth_scene: npt.NDArray[np.int64]


@dataclass(frozen=True)
class CategoryScore:
    """Average precision of one category, and the matches that it was computed from."""

    ap50: float
    ap75: float
    matches50: Matches


def score_category(
    found: Sequence[Sequence[LocatedBox]],
    objects: Sequence[Sequence[Annotation]],
    category: str,
) -> CategoryScore:
    """COCO's average precision (101 recall levels) at IoU 0.5 and 0.75.

    Args:
        found: detections of each scene.
        objects: annotations of each scene; those of other categories do not count.
        category: what was to be found.
    """
    wanted = [[each for each in scene if each.category == category] for scene in objects]
    return score_scenes(found, wanted)


def score_scenes(
    found: Sequence[Sequence[LocatedBox]], wanted: Sequence[Sequence[Annotation]]
) -> CategoryScore:
    """As `score_category`, where every annotation is wanted."""
    assert len(found) == len(wanted), "one list of detections a scene is needed"
    evaluation = _match(found, wanted)
    precision = evaluation.eval["precision"][:, :, 0, 0, -1] if evaluation else None
    values = [0.0, 0.0] if precision is None else [float(np.mean(row)) for row in precision]
    return CategoryScore(values[0], values[1], _read_matches(evaluation, wanted))


def bootstrap_ap(
    matches: Matches, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = 0.95
) -> Interval:
    """AP with a percentile interval from resampled instances."""
    return resample_ap(matches, seed=seed, resamples=resamples).interval(confidence)


def bootstrap_difference(
    first: Matches,
    second: Matches,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> Interval:
    """Difference of two methods' AP on the same scenes: paired draws of instances."""
    assert first.instances == second.instances, "the methods saw different objects"
    ours = resample_ap(first, seed=seed, resamples=resamples)
    theirs = resample_ap(second, seed=seed, resamples=resamples)
    return (ours - theirs).interval(confidence)


def resample_ap(matches: Matches, *, seed: int = 0, resamples: int = RESAMPLES) -> Resampled:
    """AP of all instances and of draws of them.

    Scenes repeat few instances many times, so it is instances that are drawn with replacement:
    an object, and the detection that found it, count as often as their instance was drawn.
    """
    draws = draw_units(len(matches.instances), seed, resamples)
    values = np.array([weighted_ap(matches, weights) for weights in draws])
    return Resampled(weighted_ap(matches, np.ones(len(matches.instances))), values)


def weighted_ap(matches: Matches, weights: npt.NDArray[np.float64]) -> float:
    """COCO's AP where objects of an instance count `weights[instance]` times."""
    total = weights[matches.truth_owner].sum()
    if total == 0 or len(matches.is_hit) == 0:
        return 0.0
    hit = np.where(matches.is_hit, weights[matches.owner], 0.0)
    miss = np.where(matches.is_hit, 0.0, 1.0)
    hits, misses = np.cumsum(hit), np.cumsum(miss)
    recall = hits / total
    precision = hits / np.maximum(hits + misses, 1e-12)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    index = np.searchsorted(recall, RECALLS, side="left")
    padded = np.append(envelope, 0.0)
    return float(padded[np.minimum(index, len(envelope))].mean())


def _match(found: Sequence[Sequence[LocatedBox]], wanted: Sequence[Sequence[Annotation]]) -> Any:
    """Evaluation by pycocotools; None where there are no objects or no detections."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    for scene, objects in enumerate(wanted):
        for each in objects:
            box = _to_coco(each.box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": scene,
                    "category_id": 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    results = [
        {
            "image_id": scene,
            "category_id": 1,
            "score": box.score,
            "bbox": _to_coco((box.x1, box.y1, box.x2, box.y2)),
        }
        for scene, boxes in enumerate(found)
        for box in boxes
    ]
    if not annotations or not results:
        return None
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": scene} for scene in range(len(wanted))],
        "categories": [{"id": 1}],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.array(THRESHOLDS)
        evaluation.params.areaRng = [[0, 1e10]]
        evaluation.params.areaRngLbl = ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _read_matches(evaluation: object, wanted: Sequence[Sequence[Annotation]]) -> Matches:
    """Matches at IoU 0.5, in the order in which COCO accumulates them."""
    flat = [each for objects in wanted for each in objects]
    instances = tuple(sorted({each.instance for each in flat}))
    number = {name: i for i, name in enumerate(instances)}
    truth_owner = np.array([number[each.instance] for each in flat], dtype=np.int64)
    truth_scene = np.array([i for i, objects in enumerate(wanted) for _ in objects], dtype=np.int64)
    scores, hits, owners, scenes = [], [], [], []
    for image in getattr(evaluation, "evalImgs", ()) if evaluation else ():
        if image is None:
            continue
        for score, match in zip(image["dtScores"], image["dtMatches"][0], strict=True):
            scores.append(score)
            hits.append(match > 0)
            owners.append(truth_owner[int(match) - 1] if match > 0 else -1)
            scenes.append(image["image_id"])
    order = np.argsort(-np.array(scores), kind="mergesort") if scores else np.array([], dtype=int)
    return Matches(
        np.array(hits, dtype=bool)[order],
        np.array(owners, dtype=np.int64)[order],
        np.array(scenes, dtype=np.int64)[order],
        instances,
        truth_owner,
        truth_scene,
    )


def _to_coco(box: tuple[float, float, float, float]) -> list[float]:
    """x, y, width, height."""
    x1, y1, x2, y2 = (side * PIXELS for side in box)
    return [x1, y1, max(0.0, x2 - x1), max(0.0, y2 - y1)]
