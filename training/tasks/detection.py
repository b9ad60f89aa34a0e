"""The sources that detection tasks can come from.

    "composites"        24 categories of composited cut-outs, fetched and composed on first use
    "composites:wide"   42, for the evaluation of unseen ones
    "coco:PATH"         a folder in COCO's format, with a `tasks.toml` beside it
    "voc:PATH"          a folder in Pascal VOC's format, with a `tasks.toml` beside it

Whatever the source, what comes out is the same: `DetectionData`.
"""

from collections.abc import Sequence
from pathlib import Path

from service.errors import InvalidRecipeError
from training.tasks.composites import load_composites
from training.tasks.detection_files import load_coco, load_voc
from training.tasks.detection_task import DetectionData

SOURCES = ("composites", "composites:wide", "coco:PATH", "voc:PATH")


def load_detection_data(
    source: str, names: Sequence[str] | None = None, cache_dir: Path | None = None
) -> DetectionData:
    """Loads the tasks of a source, in the order of `names`, or all of them.

    Raises:
        InvalidRecipeError: an unknown source.
        InvalidInputError: an unknown task name; the message lists the known ones.
        InvalidTaskDataError: pictures, annotations or wordings are missing or malformed.
        MissingDependencyError: what this source needs cannot be had here.
    """
    kind, _, place = source.partition(":")
    match kind, place:
        case "composites", "" | "wide":
            return load_composites(names, cache_dir, wide=bool(place))
        case "coco", _ if place:
            return load_coco(Path(place).expanduser(), names)
        case "voc", _ if place:
            return load_voc(Path(place).expanduser(), names)
        case _:
            raise InvalidRecipeError(
                f"unknown source of detection tasks {source!r}; use one of: {', '.join(SOURCES)}"
            )
