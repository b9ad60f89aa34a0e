"""Pictures that strangers send: checked before they are decoded, then always plain RGB."""

import binascii
import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from service.errors import InvalidImageError

FORMATS = ("PNG", "JPEG", "WEBP")
"""The only decoders that a stranger's bytes reach."""

MAX_ASPECT_RATIO = 200
"""Longer side by shorter side: beyond it nothing is left of a picture that a model resizes."""

MAX_SCANS = 100
"""Of a progressive JPEG, which usually has ten: each costs a pass over all of its pixels."""

_START_OF_SCAN = b"\xff\xda"
_JPEGS = ("JPEG", "MPO")
_MULTI_PICTURE = "MPO"  # a JPEG with a second picture behind it, as phones write: not animated
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)
_DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (EXIF 2.32, tag 0x0112)."""

_WARNINGS_LOCK = threading.Lock()


def decode_base64(text: str) -> bytes:
    """Bytes of a base64 text (RFC 4648, section 4), with or without `data:image/...;base64,`.

    Raises:
        InvalidImageError: empty, another kind of URL, or not base64 to the letter.
    """
    if text[:5].lower() == "data:":
        prefix = _DATA_URL.match(text)
        if prefix is None:
            raise InvalidImageError(
                "the image's data URL must begin with data:image/<type>;base64,", "not_base64"
            )
        text = text[prefix.end() :]
    try:
        if text.endswith("==="):  # which the decoder would ignore
            raise binascii.Error
        content = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # binascii.Error, too
        raise InvalidImageError(
            "the image is not base64: encode the file's bytes with the standard alphabet and "
            "padding, without line breaks",
            "not_base64",
        ) from None
    _check_not_empty(content)
    return content


def read_image(content: bytes, max_pixels: int) -> Image.Image:
    """Decodes a PNG, JPEG or WebP file to RGB, upright as its EXIF orientation says.

    The size is checked in the file's head, before anything is decoded. Transparency is laid on
    white; 16 bits become 8; palette, grey and CMYK become RGB.

    Raises:
        InvalidImageError: another format, broken or cut short, animated, too many pixels, or
            too long and thin.
    """
    _check_not_empty(content)
    with _refusing_broken_files():
        with _ignoring_warnings():
            image = _open(content, max_pixels)
        with image:
            _check_head(image, max_pixels)
            if image.format in _JPEGS and content.count(_START_OF_SCAN) > MAX_SCANS:
                raise InvalidImageError(
                    "the image has too many scans: save it as an ordinary JPEG", "too_many_scans"
                )
            image.load()
            turn = _find_turn(image)
            picture = _to_rgb(image)
            return picture if turn is None else picture.transpose(turn)


def _check_not_empty(content: bytes) -> None:
    if not content:
        raise InvalidImageError("the image is empty: send a PNG, JPEG or WebP file", "empty")


def _open(content: bytes, max_pixels: int) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise InvalidImageError(
            "the image cannot be read: send a PNG, JPEG or WebP file", "unknown_format"
        ) from None
    except Image.DecompressionBombError:
        raise InvalidImageError(
            f"the image has more than {max_pixels} pixels: send a smaller one", "too_many_pixels"
        ) from None


def _check_head(image: ImageFile.ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InvalidImageError(
            f"the image has {width} x {height} pixels, more than {max_pixels}: send a smaller one",
            "too_many_pixels",
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InvalidImageError(
            f"the image has {width} x {height} pixels: crop it, one side may be at most "
            f"{MAX_ASPECT_RATIO} times the other",
            "too_thin",
        )
    if image.format != _MULTI_PICTURE and getattr(image, "n_frames", 1) != 1:
        raise InvalidImageError("the image is animated: send one frame of it", "animated")


def _find_turn(image: Image.Image) -> Image.Transpose | None:
    """What turns the picture upright; metadata that cannot be read turns nothing."""
    try:
        with _ignoring_warnings():
            return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow raises many kinds on broken EXIF, and the pixels are good
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP_MODES:
        # Pillow's own conversion clips 16 bits at 255 instead of scaling them.
        deep = image.convert("I").point(lambda value: value * (1 / 257) + 0.5)
        return deep.convert("L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGB", layer.size, "white")
        paper.paste(layer, mask=layer.getchannel("A"))
        return paper
    return image.convert("RGB")


@contextmanager
def _refusing_broken_files() -> Iterator[None]:
    """Whatever a decoder says about a file is the file's fault."""
    try:
        yield
    except InvalidImageError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds on broken files
        raise InvalidImageError(
            "the image is broken or cut short: send the whole file", "broken"
        ) from error


@contextmanager
def _ignoring_warnings() -> Iterator[None]:
    """Silences Pillow about a file's head; one thread at a time, as the filters are global."""
    with _WARNINGS_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
