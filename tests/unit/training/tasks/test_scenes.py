"""Composited scenes: determined by their number, boxed by their alpha, of one split only."""

import pytest
import torch
from torch import Tensor

from tests.fixtures.tiny_scenes import CATEGORIES, draw_backgrounds, draw_cutouts, draw_ellipse
from training.tasks import scenes
from training.tasks.cutouts import PARTS, Background, Cutout, Part
from training.tasks.detection_task import Box
from training.tasks.scenes import (
    MAX_COVER,
    SCENE_PIXELS,
    SIZES,
    SceneComposer,
    vary_cutout,
)

SCENES = range(40)


def make_composer(
    part: Part = "train",
    stream: int = 0,
    backgrounds: tuple[Background, ...] | None = None,
) -> SceneComposer:
    backgrounds = backgrounds or draw_backgrounds()
    return SceneComposer(draw_cutouts(), backgrounds, part, CATEGORIES, stream)


def cover(box: Box, other: Box) -> float:
    """Shared area over the smaller box's area."""
    width = max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
    height = max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
    return width * height / min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))


def alpha_box(pixels: Tensor) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 of what is not black."""
    shown = pixels.sum(0) > 0
    rows, columns = shown.any(1).nonzero().flatten(), shown.any(0).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@pytest.mark.parametrize("part", PARTS)
def test_a_scene_is_determined_by_its_number(part: Part) -> None:
    first, again = make_composer(part), make_composer(part)
    backwards = {i: again.compose(i) for i in reversed(SCENES)}

    for i in SCENES:
        scene = first.compose(i)
        assert torch.equal(scene.pixels, backwards[i].pixels)
        assert scene.objects == backwards[i].objects
        assert scene.pixels.shape == (3, SCENE_PIXELS, SCENE_PIXELS)


def test_other_numbers_splits_and_streams_make_other_scenes() -> None:
    made = [
        make_composer("train").compose(0),
        make_composer("train").compose(1),
        make_composer("train", stream=1).compose(0),
        make_composer("validation").compose(0),
    ]

    for i, scene in enumerate(made):
        assert not any(torch.equal(scene.pixels, other.pixels) for other in made[:i])


def test_scenes_hold_objects_and_backgrounds_of_their_split_only() -> None:
    shades = {"train": 40, "validation": 80, "test": 120}
    backgrounds = tuple(
        Background(part, part, torch.full((3, 200, 240), shade, dtype=torch.uint8))
        for part, shade in shades.items()
    )
    instances: dict[str, set[str]] = {}
    for part in PARTS:
        composer = make_composer(part, backgrounds=backgrounds)
        made = [composer.compose(i) for i in SCENES]
        instances[part] = {o.instance for scene in made for o in scene.objects}
        assert {o.category for scene in made for o in scene.objects} == set(CATEGORIES)
        for scene in made:  # brightness varies from 0.6 to 1.2 of the background's
            shade = scene.pixels.flatten(1).mode(1).values.float()
            assert ((shade > 0.59 * shades[part]) & (shade < 1.21 * shades[part])).all()

    assert all(f" {part} " in name for part in PARTS for name in instances[part])


def test_no_box_covers_another_beyond_the_limit() -> None:
    composer = make_composer()
    pairs = 0
    for i in range(100):
        boxes = [o.box for o in composer.compose(i).objects]
        for j, box in enumerate(boxes):
            assert all(0 <= side <= 1 for side in box)
            assert all(cover(box, other) <= MAX_COVER + 1e-6 for other in boxes[:j])
            pairs += j

    assert pairs > 100


@pytest.mark.parametrize("part", ["train", "test"])
def test_boxes_are_where_the_alpha_shows(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "MAX_DISTRACTORS", 0)
    white = torch.full((4, 50, 70), 255, dtype=torch.uint8)
    white[3, :8], white[3, -8:], white[3, :, :15], white[3, :, -15:] = 0, 0, 0, 0
    cutouts = [Cutout(name, name, part, white) for name in ("ball", "distractor")]
    composer = SceneComposer(cutouts, draw_backgrounds(), part, ["ball"])
    for i in SCENES:
        scene = composer.compose(i)
        boxes = torch.tensor([o.box for o in scene.objects]) * SCENE_PIXELS
        x1, y1, x2, y2 = *boxes[:, :2].amin(0).tolist(), *boxes[:, 2:].amax(0).tolist()

        assert alpha_box(scene.pixels) == pytest.approx((x1, y1, x2, y2), abs=1e-3)
        for left, top, right, bottom in boxes.round().int().tolist():
            inside = scene.pixels[0, top:bottom, left:right]
            assert inside.any(0).all()
            assert inside.any(1).all()
            assert SIZES[0] / 2 < max(right - left, bottom - top) <= SIZES[1] + 1


def test_held_out_cutouts_are_not_turned_or_recoloured() -> None:
    cutout = Cutout("sign", "sign", "test", draw_ellipse(40, 40))
    cutout.pixels[:3] = torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None]
    plain = vary_cutout(cutout, torch.Generator().manual_seed(0), varied=False)
    varied = vary_cutout(cutout, torch.Generator().manual_seed(0), varied=True)
    shares = plain[:3, 20, 20] / plain[0, 20, 20]

    torch.testing.assert_close(shares, torch.tensor([1.0, 0.5, 0.25]), rtol=0.02, atol=0.02)
    assert varied[:3].min() >= 0.0
    assert varied[:3].max() <= 1.0
    assert not torch.allclose(varied[:3, 20, 20], plain[:3, 20, 20], atol=0.02)


def test_what_is_written_is_never_mirrored() -> None:
    pixels = draw_ellipse(100, 100)
    pixels[3] = 255
    pixels[:3, :, :50], pixels[:3, :, 50:] = 255, 0
    for category, may_flip in (("sign", False), ("ball", True)):
        cutout = Cutout(category, category, "test", pixels)
        lefts = [
            vary_cutout(cutout, torch.Generator().manual_seed(i), varied=False)[0, 10, 3]
            for i in range(20)
        ]
        assert any(left < 0.1 for left in lefts) is may_flip
