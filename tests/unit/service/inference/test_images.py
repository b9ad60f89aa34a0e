"""Pictures from strangers: every kind that is taken, and every way to be refused."""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from service.errors import InvalidImageError
from service.inference.images import MAX_ASPECT_RATIO, decode_base64, read_image

MAX_PIXELS = 10_000
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def make_png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that declares a size and holds what it likes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deep_gray() -> Image.Image:
    image = Image.new("I;16", (4, 2))
    image.putpixel((0, 0), 65_535)
    image.putpixel((1, 0), 32_768)
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_common_files_become_rgb(kind: str) -> None:
    image = read_image(encode(Image.new("RGB", (6, 4), RED), kind), MAX_PIXELS)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    red, green, blue = image.getpixel((3, 2))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.new("L", (4, 2), 100), "PNG", (100, 100, 100)),
        (Image.new("1", (4, 2), 1), "PNG", WHITE),
        (Image.new("LA", (4, 2), (0, 0)), "PNG", WHITE),
        (Image.new("RGBA", (4, 2), (255, 0, 0, 0)), "PNG", WHITE),
        (Image.new("RGBA", (4, 2), (255, 0, 0, 255)), "PNG", RED),
        (Image.new("RGB", (4, 2), RED).quantize(4), "PNG", RED),
        (Image.new("CMYK", (4, 2), (0, 255, 255, 0)), "JPEG", (254, 0, 0)),
        (deep_gray(), "PNG", WHITE),
    ],
    ids=["gray", "bits", "gray+alpha", "transparent", "opaque", "palette", "cmyk", "16 bits"],
)
def test_other_colours_become_rgb(
    image: Image.Image, kind: str, expected: tuple[int, int, int]
) -> None:
    read = read_image(encode(image, kind), MAX_PIXELS)
    assert read.mode == "RGB"
    assert read.getpixel((0, 0)) == pytest.approx(expected, abs=3)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    image = read_image(encode(deep_gray()), MAX_PIXELS)
    assert image.getpixel((1, 0)) == pytest.approx((128, 128, 128), abs=1)
    assert image.getpixel((2, 0)) == (0, 0, 0)


def test_palette_with_transparent_colours_lies_on_white() -> None:
    image = Image.new("RGB", (4, 2), RED).quantize(4)
    content = encode(image, transparency=bytes([0] * 4))
    assert read_image(content, MAX_PIXELS).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (3, (5, 3)), (6, (3, 0)), (8, (0, 5))]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_picture_is_turned_upright(kind: str, orientation: int, corner: tuple[int, int]) -> None:
    image = Image.new("RGB", (6, 4), "black")
    image.putpixel((0, 0), WHITE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    upright = read_image(encode(image, kind, exif=exif, **options), MAX_PIXELS)
    assert upright.size == ((6, 4) if orientation in (1, 3) else (4, 6))
    assert min(upright.getpixel(corner)) > 150  # type: ignore[arg-type, type-var]


def test_broken_metadata_does_not_matter() -> None:
    image = Image.new("RGB", (6, 4), RED)
    for exif in (
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
    ):
        for kind in ("JPEG", "PNG", "WEBP"):
            assert read_image(encode(image, kind, exif=exif), MAX_PIXELS).size == (6, 4)


def test_second_picture_of_a_phone_is_ignored() -> None:
    first, second = (Image.new("RGB", (6, 4), colour) for colour in ("red", "blue"))
    content = encode(first, "MPO", save_all=True, append_images=[second])
    assert read_image(content, MAX_PIXELS).getpixel((0, 0)) == pytest.approx(RED, abs=3)


def animate(kind: str) -> bytes:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


WHOLE = encode(Image.effect_noise((60, 40), 90))
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "text": (lambda: b"hello", "unknown_format"),
    "gif": (lambda: encode(Image.new("RGB", (6, 4)), "GIF"), "unknown_format"),
    "tiff": (lambda: encode(Image.new("RGB", (6, 4)), "TIFF"), "unknown_format"),
    "bmp": (lambda: encode(Image.new("RGB", (6, 4)), "BMP"), "unknown_format"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unknown_format"),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unknown_format"),
    "cut short": (lambda: WHOLE[: len(WHOLE) // 2], "broken"),
    "no pixels": (lambda: make_png(50, 50), "broken"),
    "wrong checksum": (lambda: WHOLE[:60] + b"\0" + WHOLE[61:], "broken"),
    "animated png": (lambda: animate("PNG"), "animated"),
    "animated webp": (lambda: animate("WEBP"), "animated"),
    "one pixel too many": (lambda: encode(Image.new("L", (73, 137))), "too_many_pixels"),
    "declared huge": (lambda: make_png(60_000, 60_000), "too_many_pixels"),
    "declared large": (lambda: make_png(10_000, 10_000), "too_many_pixels"),
    "zlib bomb": (
        lambda: make_png(9_000, 9_000, zlib.compress(bytes(10**7), 9)),
        "too_many_pixels",
    ),
    "thin": (lambda: encode(Image.new("L", (MAX_ASPECT_RATIO * 2 + 1, 2))), "too_thin"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_files_are_refused_with_a_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(InvalidImageError) as caught:
        read_image(make(), MAX_PIXELS)
    if name != "wrong checksum":
        assert caught.value.reason == reason


def test_jpeg_of_very_many_scans_is_refused() -> None:
    content = encode(Image.effect_noise((60, 40), 90), "JPEG", progressive=True)
    start = content.index(b"\xff\xda")
    scan = content[start : content.index(b"\xff", start + 12)]
    with pytest.raises(InvalidImageError) as caught:
        read_image(content[:start] + scan * 200 + content[start:], MAX_PIXELS)
    assert caught.value.reason == "too_many_scans"


@pytest.mark.parametrize("size", [(1, 1), (1, MAX_ASPECT_RATIO), (100, 100)])
def test_sizes_at_the_limits_are_taken(size: tuple[int, int]) -> None:
    assert read_image(encode(Image.new("RGB", size)), MAX_PIXELS).size == size


def test_base64_is_read_to_the_letter() -> None:
    text = base64.b64encode(b"\xff\xfe picture").decode()
    assert decode_base64(text) == b"\xff\xfe picture"
    assert decode_base64(f"data:image/png;base64,{text}") == b"\xff\xfe picture"
    assert decode_base64(f"DATA:image/svg+xml;base64,{text}") == b"\xff\xfe picture"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "abc",
        "ab=c",
        "abcd\n",
        " abcd",
        "ab-_",
        "äbcd",
        "abcd====",
        "data:image/png;base64,",
        "data:text/plain;base64,abcd",
        "data:image/png,abcd",
        "data:image/png;charset=utf-8;base64,abcd",
        "https://example.org/picture.png",
    ],
)
def test_other_texts_are_no_base64(text: str) -> None:
    with pytest.raises(InvalidImageError):
        decode_base64(text)
