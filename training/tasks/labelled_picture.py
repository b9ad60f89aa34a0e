"""A picture of a labelled data set, whatever the data set's format."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.tasks.detection_task import Box


@dataclass(frozen=True, slots=True)
class LabelledObject:
    """One object under the data set's own label.

    Attributes:
        label: as the data set writes it.
        instance: `<picture id>/<object id>`.
        box: where it is.
    """

    label: str
    instance: str
    box: Box


@dataclass(frozen=True, slots=True)
class LabelledPicture:
    """A picture file and its objects.

    Attributes:
        name: what tells it from the others of the data set.
        path: its file.
        labels: that the data set knows from it; also of objects that are left out.
        objects: those that count.
    """

    name: str
    path: Path
    labels: frozenset[str]
    objects: tuple[LabelledObject, ...]


def clip_box(sides: Sequence[float], width: float, height: float) -> Box | None:
    """Left, upper, right and lower side in pixels as fractions, cut at the picture's border.

    None where nothing of the box is left.

    Raises:
        ValueError: a side is no finite number, or the picture has no size.
    """
    if len(sides) != 4 or not all(map(math.isfinite, (*sides, width, height))):
        raise ValueError("a box is four finite numbers")
    if width <= 0 or height <= 0:
        raise ValueError("the picture's width and height must be positive")
    x1, x2 = (min(max(side / width, 0.0), 1.0) for side in (sides[0], sides[2]))
    y1, y2 = (min(max(side / height, 0.0), 1.0) for side in (sides[1], sides[3]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
