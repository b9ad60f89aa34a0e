"""Boxes drawn on pictures: where they are, in which colour, at every size."""

import io
from collections.abc import Sequence

import pytest
from PIL import Image, ImageColor

from service.inference.detection import DetectedBox
from service.inference.rendering import MAX_SIDE, choose_color, render_boxes, shrink_image

GRAY = (128, 128, 128)


def render(size: tuple[int, int], boxes: Sequence[DetectedBox]) -> Image.Image:
    image = Image.new("RGB", size, GRAY)
    content = render_boxes(image, boxes, width=size[0])
    assert image.getcolors() == [(size[0] * size[1], GRAY)]  # the given one is left alone
    return Image.open(io.BytesIO(content), formats=["PNG"])


def test_frame_is_on_the_box_and_in_its_labels_colour() -> None:
    picture = render((320, 240), [DetectedBox((40.0, 80.0, 200.0, 180.0), "sofa", 0.9)])
    colour = ImageColor.getrgb(choose_color("sofa"))
    for place in ((40, 130), (199, 130), (120, 179), (40, 80)):
        assert picture.getpixel(place) == colour
    assert picture.getpixel((120, 130)) == GRAY
    assert picture.getpixel((210, 130)) == GRAY
    caption = [value for _, value in picture.crop((40, 60, 120, 80)).getcolors(4096) or []]
    assert colour in caption
    assert any(min(value) > 200 for value in caption)  # letters


def test_colours_belong_to_labels() -> None:
    assert choose_color("sofa") == choose_color("sofa")
    assert len({choose_color(f"thing {number}") for number in range(100)}) == 8


def test_first_box_lies_on_top() -> None:
    box = (5.0, 20.0, 90.0, 60.0)
    picture = render((100, 80), [DetectedBox(box, "sofa", 0.9), DetectedBox(box, "bird", 0.1)])
    assert picture.getpixel((5, 50)) == ImageColor.getrgb(choose_color("sofa"))


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (64, 3), (3, 64), (1600, 1200)])
@pytest.mark.parametrize("label", ["", "sofa", "x" * 300, "кот 猫", "two\nlines"])
def test_every_size_and_label_can_be_drawn(size: tuple[int, int], label: str) -> None:
    width, height = size
    boxes = [
        DetectedBox((0.0, 0.0, float(width), float(height)), label, 1.0),
        DetectedBox((width / 2, height / 2, width / 2 + 0.1, height / 2 + 0.1), label, 0.0),
        DetectedBox((width - 0.5, height - 0.5, float(width), float(height)), label, 0.5),
    ]
    picture = render(size, boxes)
    assert picture.size == size
    picture.load()


def test_boxes_count_the_pixels_of_the_picture_before_it_was_shrunk() -> None:
    large = Image.new("RGB", (2 * MAX_SIDE, MAX_SIDE), GRAY)
    small = shrink_image(large)
    assert small.size == (MAX_SIDE, MAX_SIDE // 2)
    box = DetectedBox((1000.0, 1000.0, 3000.0, 1500.0), "sofa", 0.5)
    content = render_boxes(small, [box], width=large.width)
    picture = Image.open(io.BytesIO(content))
    assert picture.getpixel((500, 600)) == ImageColor.getrgb(choose_color("sofa"))


def test_small_picture_is_copied_not_enlarged() -> None:
    image = Image.new("RGB", (20, 10))
    small = shrink_image(image)
    assert small is not image
    assert small.size == (20, 10)
