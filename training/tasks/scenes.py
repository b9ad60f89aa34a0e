"""Composited scenes: cut-outs on backgrounds, each scene determined by its split and number."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as vision

from training.tasks.cutouts import ALPHA_THRESHOLD, DISTRACTOR, Background, Cutout, Part
from training.tasks.detection_task import Annotation

SCENE_PIXELS = 224
MAX_OBJECTS = 4
MAX_DISTRACTORS = 2
SIZES = (56, 140)
"""Longest side of an object in a scene, in pixels."""

MAX_COVER = 0.15
"""Most of a box that another object's box may cover."""

PLACEMENT_TRIES = 12
UNFLIPPED = frozenset({"coin", "sign"})
"""Categories with writing, which is never mirrored."""


@dataclass(frozen=True)
class Scene:
    """A picture and its objects."""

    pixels: UInt8[Tensor, "3 height width"]
    objects: tuple[Annotation, ...]


class SceneComposer:
    """Makes the scenes of one split.

    Two to four objects and up to two distractors lie on a crop of a background; sizes,
    places, flips, turns and colours follow from (split, stream, index) alone. Categories are
    drawn uniformly, then an instance of the category.

    Args:
        cutouts: of all splits; those of `part` are used.
        backgrounds: of all splits; those of `part` are used.
        part: the split.
        categories: that may be in the scenes.
        stream: another number makes other scenes of the same kind.
    """

    def __init__(
        self,
        cutouts: Sequence[Cutout],
        backgrounds: Sequence[Background],
        part: Part,
        categories: Sequence[str],
        stream: int = 0,
    ) -> None:
        self.part: Part = part
        self.categories = tuple(categories)
        self._stream = stream
        self._backgrounds = [b for b in backgrounds if b.part == part]
        self._objects = {
            name: [c for c in cutouts if c.part == part and c.category == name]
            for name in (*self.categories, DISTRACTOR)
        }
        assert all(self._objects.values()), "a category has no cut-out in this split"

    def compose(self, index: int) -> Scene:
        """The scene of that number."""
        part = ("train", "validation", "test").index(self.part)
        seed = (self._stream * 3 + part) * 10_000_000 + index
        random = torch.Generator().manual_seed(seed)
        canvas = self._draw_background(random)
        wanted = [
            self.categories[_integer(random, 0, len(self.categories) - 1)]
            for _ in range(_integer(random, 2, MAX_OBJECTS))
        ]
        wanted += [DISTRACTOR] * _integer(random, 0, MAX_DISTRACTORS)
        placed: list[Annotation] = []
        boxes: list[tuple[float, float, float, float]] = []
        for category in wanted:
            pool = self._objects[category]
            cutout = pool[_integer(random, 0, len(pool) - 1)]
            pixels = vary_cutout(cutout, random, varied=self.part == "train")
            box = _place(canvas, pixels, boxes, random)
            if box is None:
                continue
            boxes.append(box)
            if category != DISTRACTOR:
                x1, y1, x2, y2 = (side / SCENE_PIXELS for side in box)
                placed.append(Annotation(category, cutout.name, (x1, y1, x2, y2)))
        return Scene(canvas.mul(255).round().clamp(0, 255).to(torch.uint8), tuple(placed))

    def _draw_background(self, random: torch.Generator) -> Float[Tensor, "3 height width"]:
        chosen = self._backgrounds[_integer(random, 0, len(self._backgrounds) - 1)].pixels
        height, width = chosen.shape[1:]
        side = _integer(random, 160, min(height, width))
        top, left = _integer(random, 0, height - side), _integer(random, 0, width - side)
        crop = chosen[None, :, top : top + side, left : left + side].float() / 255
        if _uniform(random, 0, 1) < 0.5:
            crop = crop.flip(-1)
        size = (SCENE_PIXELS, SCENE_PIXELS)
        canvas = functional.interpolate(crop, size, mode="bilinear", antialias=True)[0]
        return canvas * _uniform(random, 0.6, 1.2)


def vary_cutout(
    cutout: Cutout, random: torch.Generator, *, varied: bool
) -> Float[Tensor, "4 height width"]:
    """The cut-out at a random size, flipped or not, brighter or darker; RGBA from 0 to 1.

    Args:
        cutout: the object.
        random: source of every choice.
        varied: turns, stretches and recolours it too, which makes few instances go further.
    """
    pixels = cutout.pixels.float() / 255
    if cutout.category not in UNFLIPPED and _uniform(random, 0, 1) < 0.5:
        pixels = pixels.flip(-1)
    if varied:
        pixels = vision.rotate(
            pixels, _uniform(random, -12, 12), vision.InterpolationMode.BILINEAR, expand=True
        )
        hue = _uniform(random, -0.08, 0.08)
        colour = vision.adjust_hue(pixels[:3].clamp(0, 1), hue)
        colour = vision.adjust_saturation(colour, _uniform(random, 0.5, 1.5))
        colour = vision.adjust_contrast(colour, _uniform(random, 0.7, 1.3))
        pixels = torch.cat([colour, pixels[3:]])
    longest = _uniform(random, *SIZES)
    stretch = _uniform(random, 0.88, 1.14) if varied else 1.0
    height, width = pixels.shape[1:]
    scale = longest / max(height, width * stretch)
    size = (max(8, round(height * scale)), max(8, round(width * stretch * scale)))
    pixels = functional.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]
    gain = _uniform(random, 0.75, 1.2)
    return torch.cat([(pixels[:3] * gain).clamp(0, 1), pixels[3:]])


def _place(
    canvas: Float[Tensor, "3 height width"],
    pixels: Float[Tensor, "4 h w"],
    boxes: Sequence[tuple[float, float, float, float]],
    random: torch.Generator,
) -> tuple[float, float, float, float] | None:
    """Blends an object in where it covers the others least; its alpha's box, or None."""
    visible = pixels[3] > ALPHA_THRESHOLD / 255
    rows, columns = visible.any(1).nonzero().flatten(), visible.any(0).nonzero().flatten()
    if not len(rows):
        return None
    pixels = pixels[:, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    height, width = pixels.shape[1:]
    for _ in range(PLACEMENT_TRIES):
        left = _integer(random, 0, SCENE_PIXELS - width)
        top = _integer(random, 0, SCENE_PIXELS - height)
        box = (float(left), float(top), float(left + width), float(top + height))
        if all(_cover(box, other) <= MAX_COVER for other in boxes):
            region = canvas[:, top : top + height, left : left + width]
            alpha = pixels[3:]
            region.copy_(region * (1 - alpha) + pixels[:3] * alpha)
            return box
    return None


def _cover(
    box: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> float:
    """Intersection over the smaller of two boxes' areas."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return width * height / min(areas)


def _integer(random: torch.Generator, low: int, high: int) -> int:
    """Uniform among `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, (), generator=random))


def _uniform(random: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=random))
