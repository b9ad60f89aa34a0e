"""Average precision: by hand, by pycocotools called independently, and under the bootstrap."""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from service.inference.box_decoding import LocatedBox
from training.evaluation.average_precision import (
    bootstrap_ap,
    bootstrap_difference,
    score_category,
    score_scenes,
    weighted_ap,
)
from training.evaluation.statistics import draw_units
from training.tasks.detection_task import Annotation, Box

Scenes = list[list[Annotation]]
Found = list[list[LocatedBox]]

LEFT, RIGHT, FAR = (0.1, 0.1, 0.3, 0.3), (0.6, 0.1, 0.9, 0.3), (0.1, 0.7, 0.3, 0.9)


def ball(instance: str, box: Box = LEFT) -> Annotation:
    return Annotation("ball", instance, box)


def found(box: Box, score: float) -> LocatedBox:
    return LocatedBox(*box, score=score, label="")


def draw_scenes(seed: int, count: int = 60) -> tuple[Found, Scenes]:
    """Noisy detections of random objects, missed ones and false ones among them."""
    rng = np.random.default_rng(seed)
    detections: Found = []
    scenes: Scenes = []
    for _ in range(count):
        objects, boxes = [], []
        for _ in range(rng.integers(0, 4)):
            x, y, width, height = rng.uniform([0, 0, 0.1, 0.1], [0.6, 0.6, 0.4, 0.4])
            objects.append(ball(f"ball {rng.integers(12)}", (x, y, x + width, y + height)))
            if rng.random() < 0.8:
                x1, y1, x2, y2 = np.array([x, y, x + width, y + height]) + rng.normal(0, 0.02, 4)
                boxes.append(found((x1, y1, max(x1, x2), max(y1, y2)), rng.random()))
        for _ in range(rng.integers(0, 3)):
            x, y = rng.uniform(0, 0.6, 2)
            boxes.append(found((x, y, x + 0.3, y + 0.3), rng.random() * 0.8))
        scenes.append(objects)
        detections.append(boxes)
    return detections, scenes


def measure_with_coco(detections: Found, scenes: Sequence[Sequence[Annotation]]) -> list[float]:
    """AP50 and AP75 as COCO's own summary prints them."""

    def box(x1: float, y1: float, x2: float, y2: float) -> list[float]:
        return [500 * x1, 500 * y1, 500 * (x2 - x1), 500 * (y2 - y1)]

    truth = COCO()
    truth.dataset = {"info": {}, "categories": [{"id": 7}], "images": [], "annotations": []}
    results = []
    for number, (boxes, objects) in enumerate(zip(detections, scenes, strict=True), start=1):
        truth.dataset["images"].append({"id": number})
        for each in objects:
            row = {"image_id": number, "category_id": 7, "bbox": box(*each.box), "iscrowd": 0}
            row |= {"id": len(truth.dataset["annotations"]) + 1, "area": 1.0}
            truth.dataset["annotations"].append(row)
        for each in boxes:
            sides = box(each.x1, each.y1, each.x2, each.y2)
            results.append(
                {"image_id": number, "category_id": 7, "bbox": sides, "score": each.score}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[1:3]]


@pytest.mark.parametrize("seed", range(4))
def test_points_are_those_of_cocos_own_tools(seed: int) -> None:
    detections, scenes = draw_scenes(seed)
    score = score_scenes(detections, scenes)
    ap50, ap75 = measure_with_coco(detections, scenes)

    assert 0 < ap75 < ap50 < 1
    assert (score.ap50, score.ap75) == pytest.approx((ap50, ap75), abs=1e-9)


def test_a_case_by_hand() -> None:
    scenes = [[ball("a", LEFT), ball("b", RIGHT)], [ball("c", LEFT)]]
    detections = [[found(LEFT, 0.9), found(FAR, 0.8), found(RIGHT, 0.7)], []]
    score = score_scenes(detections, scenes)
    # hit, miss, hit: precision 1 up to recall 1/3, then 2/3 up to 2/3; recall 1 is not reached
    expected = (34 * 1.0 + 33 * 2 / 3) / 101

    assert score.ap50 == pytest.approx(expected)
    assert score.ap75 == pytest.approx(expected)
    assert score.matches50.is_hit.tolist() == [True, False, True]
    assert score.matches50.owner.tolist() == [0, -1, 1]
    assert score.matches50.instances == ("a", "b", "c")


def test_an_object_is_found_once_and_not_by_a_loose_box() -> None:
    loose = (0.1, 0.1, 0.3, 0.26)  # four fifths of the object
    nearly = (0.1, 0.1, 0.3, 0.22)
    doubled = score_scenes([[found(LEFT, 0.9), found(LEFT, 0.8)]], [[ball("a")]])

    assert doubled.matches50.is_hit.tolist() == [True, False]
    assert score_scenes([[found(loose, 0.9)]], [[ball("a")]]).ap75 == pytest.approx(1.0)
    assert score_scenes([[found(nearly, 0.9)]], [[ball("a")]]).ap75 == 0.0
    assert score_scenes([[found(nearly, 0.9)]], [[ball("a")]]).ap50 == pytest.approx(1.0)


def test_objects_of_other_categories_do_not_count() -> None:
    scenes = [[ball("a", LEFT), Annotation("cube", "d", RIGHT)]]
    detections = [[found(LEFT, 0.5)]]

    assert score_category(detections, scenes, "ball").ap50 == pytest.approx(1.0)
    assert score_category(detections, scenes, "cube").ap50 == 0.0


def test_without_detections_or_objects_it_is_zero() -> None:
    nothing = score_scenes([[], []], [[ball("a")], []])

    assert (nothing.ap50, nothing.ap75) == (0.0, 0.0)
    assert nothing.matches50.instances == ("a",)
    assert len(nothing.matches50.is_hit) == 0
    interval = bootstrap_ap(nothing.matches50, resamples=20)
    assert (interval.value, interval.low, interval.high) == (0.0, 0.0, 0.0)
    assert score_scenes([[found(LEFT, 0.9)]], [[]]).ap50 == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_with_all_weights_one_it_is_ap50(seed: int) -> None:
    score = score_scenes(*draw_scenes(seed))
    ones = np.ones(len(score.matches50.instances))

    assert weighted_ap(score.matches50, ones) == pytest.approx(score.ap50, abs=1e-9)


def test_weights_are_copies_of_an_instance() -> None:
    scenes = [[ball("a", LEFT), ball("b", RIGHT)]]
    detections = [[found(FAR, 0.9), found(LEFT, 0.8)]]
    matches = score_scenes(detections, scenes).matches50
    # a twice, b once: one miss and two hits of three objects
    expected = (67 * 2 / 3) / 101

    assert weighted_ap(matches, np.array([2.0, 1.0])) == pytest.approx(expected)
    assert weighted_ap(matches, np.array([0.0, 2.0])) == 0.0
    assert weighted_ap(matches, np.array([1.0, 0.0])) == pytest.approx(0.5)
    assert weighted_ap(matches, np.zeros(2)) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_intervals_contain_the_point_and_follow_from_the_seed(seed: int) -> None:
    matches = score_scenes(*draw_scenes(seed)).matches50
    interval = bootstrap_ap(matches, seed=seed, resamples=200)

    assert interval.low < interval.value < interval.high
    assert interval == bootstrap_ap(matches, seed=seed, resamples=200)
    assert interval != bootstrap_ap(matches, seed=seed + 1, resamples=200)
    narrow = bootstrap_ap(matches, seed=seed, resamples=200, confidence=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_a_difference_is_paired() -> None:
    detections, scenes = draw_scenes(1)
    worse = [boxes if i % 10 else [] for i, boxes in enumerate(detections)]
    first, second = (score_scenes(d, scenes).matches50 for d in (detections, worse))
    difference = bootstrap_difference(first, second, resamples=200)
    alone = bootstrap_ap(first, resamples=200)

    assert difference.low <= difference.value <= difference.high
    assert difference.high - difference.low < alone.high - alone.low
    same = bootstrap_difference(first, first, resamples=50)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_every_resample_draws_as_many_as_there_are() -> None:
    draws = draw_units(7, seed=0, resamples=100)

    assert draws.shape == (100, 7)
    assert (draws.sum(1) == 7).all()
    assert draws.mean() == pytest.approx(1.0)
