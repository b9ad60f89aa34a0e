"""Images of requests, decoded and prepared in threads of their own."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from service.errors import InvalidImageError
from service.inference.detection import DetectionEngine, PreparedPicture
from service.inference.images import decode_base64, read_image
from service.inference.rendering import shrink_image
from service.metrics import ServiceMetrics
from service.threads import releasing

MAX_THREADS = 4
"""Images decoded at once at most: one of 25 megapixels takes about 200 MB meanwhile."""

MAX_EXAMPLE_SIDE = 1024
"""Example images are made this small, in pixels: encoders look at a third of it."""

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """An image that is ready for its batch.

    Attributes:
        prepared: as the model takes it.
        width: of the image, in pixels.
        height: of the image, in pixels.
        canvas: a copy to draw on, where one was asked for.
        seconds: what all this took.
    """

    prepared: PreparedPicture
    width: int
    height: int
    canvas: Image.Image | None
    seconds: float


class PictureReader:
    """Turns what clients send into pictures, off the event loop, and counts what is refused.

    Args:
        max_pixels: most pixels of one request.
        metrics: told why an image was refused.
    """

    def __init__(self, max_pixels: int, metrics: ServiceMetrics) -> None:
        self._max_pixels = max_pixels
        self._metrics = metrics
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="pictures")

    async def prepare(
        self, image: str | bytes, engine: DetectionEngine, *, keep_canvas: bool
    ) -> Picture:
        """Decodes an image (base64, or a file's bytes) and prepares it for an engine.

        Raises:
            InvalidImageError: it cannot, or must not, be decoded.
        """

        def prepare() -> Picture:
            started = time.perf_counter()
            content = decode_base64(image) if isinstance(image, str) else image
            picture = read_image(content, self._max_pixels)
            prepared = engine.prepare(picture)
            canvas = shrink_image(picture) if keep_canvas else None
            seconds = time.perf_counter() - started
            return Picture(prepared, picture.width, picture.height, canvas, seconds)

        return await self.run(prepare)

    async def read_examples(self, images: Sequence[str]) -> tuple[list[bytes], list[Image.Image]]:
        """Example images: their files, and their pixels.

        Raises:
            InvalidImageError: one cannot, or must not, be decoded, or they are too large
                together.
        """

        def read() -> tuple[list[bytes], list[Image.Image]]:
            files, pictures, num_pixels_left = [], [], self._max_pixels
            for number, image in enumerate(images):
                try:
                    files.append(decode_base64(image))
                    picture = read_image(files[-1], num_pixels_left)
                except InvalidImageError as error:
                    raise InvalidImageError(
                        f"images[{number}]: {error.detail}", error.reason
                    ) from error
                num_pixels_left -= picture.width * picture.height
                picture.thumbnail((MAX_EXAMPLE_SIDE, MAX_EXAMPLE_SIDE))
                pictures.append(picture)
            return files, pictures

        return await self.run(read)

    async def run(self, job: Callable[[], T]) -> T:
        """Runs work on a picture in a thread."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, releasing(job))
        except InvalidImageError as error:
            self._metrics.on_image_rejection(error.reason)
            raise

    def close(self) -> None:
        """Finishes what runs and lets go of the threads; blocking."""
        self._executor.shutdown(cancel_futures=True)
