"""Pictures with their boxes drawn on them."""

import hashlib
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from service.inference.detection import DetectedBox

COLORS = ("#c81e4a", "#1f7a33", "#3f5fd0", "#b8500a", "#8a1fae", "#007575", "#8a5a1f", "#5f6300")
"""Far from each other, and dark enough for white letters."""

MAX_SIDE = 1600
"""Longer side of a rendered picture: enough to read, and an answer of a few megabytes."""

MAX_LABEL_CHARACTERS = 40
_FONT_SIZES = (10, 40)  # least and most, in pixels
_LINE_WIDTHS = (1, 8)


def shrink_image(image: Image.Image) -> Image.Image:
    """A copy of at most `MAX_SIDE` pixels a side, to be drawn on."""
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    return small


def render_boxes(image: Image.Image, boxes: Sequence[DetectedBox], *, width: int) -> bytes:
    """PNG of a picture with each box, its label and its score.

    Args:
        image: RGB; it is left as it is.
        boxes: the first one is drawn last, on top.
        width: of the picture whose pixels the boxes count; `image` may be a smaller copy of it.
    """
    canvas = image.copy()
    draw = ImageDraw.Draw(canvas)
    scale = canvas.width / width
    shorter = min(canvas.size)
    font = ImageFont.load_default(_limit(shorter / 24, _FONT_SIZES))
    line_width = _limit(shorter / 160, _LINE_WIDTHS)
    for found in reversed(boxes):
        left, top, right, bottom = (value * scale for value in found.box)
        color = choose_color(found.label)
        right, bottom = max(left, right - 1), max(top, bottom - 1)  # its last pixels
        draw.rectangle((left, top, right, bottom), outline=color, width=line_width)
        caption = f"{found.label[:MAX_LABEL_CHARACTERS]} {found.score:.2f}".strip()
        _draw_caption(draw, caption, left, top, color, font)
    with io.BytesIO() as file:
        canvas.save(file, "PNG", compress_level=3)
        return file.getvalue()


def choose_color(label: str) -> str:
    """The same colour for the same label, in every picture."""
    return COLORS[hashlib.sha256(label.encode()).digest()[0] % len(COLORS)]


def _draw_caption(
    draw: ImageDraw.ImageDraw, caption: str, left: float, top: float, color: str, font: Any
) -> None:
    """White on the box's colour, above the box where there is room, else inside; never cut off."""
    canvas_width = draw.im.size[0]
    _, upper, width, lower = draw.textbbox((0, 0), caption, font=font)
    padding = max(1, round(font.size / 6))
    height = lower - upper + 2 * padding
    x = max(0, min(left, canvas_width - width - 2 * padding))
    y = top - height if top >= height else top
    draw.rectangle((x, y, x + width + 2 * padding, y + height), fill=color)
    draw.text((x + padding, y + padding - upper), caption, fill="white", font=font)


def _limit(value: float, bounds: tuple[int, int]) -> int:
    least, most = bounds
    return max(least, min(most, round(value)))
