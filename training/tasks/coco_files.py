"""Reader of COCO's annotation files."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from service.errors import InvalidTaskDataError
from training.tasks.labelled_picture import LabelledObject, LabelledPicture, clip_box

T = TypeVar("T", int, str)


def read_coco_pictures(folder: Path, part: str) -> list[LabelledPicture]:
    """Pictures of one split (`train` or `val`), in the order of the file.

    Raises:
        InvalidTaskDataError: the annotation file or a picture is missing, or it is malformed.
    """
    found = sorted((folder / "annotations").glob(f"instances_{part}*.json"))
    if len(found) != 1:
        there = f"there are {len(found)}" if found else "there is none"
        raise InvalidTaskDataError(
            f"{folder / 'annotations'} must hold one instances_{part}*.json (as in "
            f"instances_{part}2017.json); {there}"
        )
    pictures = folder / found[0].stem.removeprefix("instances_")
    if not pictures.is_dir():
        raise InvalidTaskDataError(f"{pictures} is not there; it holds the pictures of {found[0]}")
    try:
        body = json.loads(found[0].read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidTaskDataError(f"{found[0]} is not JSON: {error}") from error
    return _read_body(body, pictures, found[0])


def _read_body(body: Any, folder: Path, place: Path) -> list[LabelledPicture]:
    tables = {key: _read_table(body, key, place) for key in ("categories", "images", "annotations")}
    labels = {
        _read(row, "id", int, f"{place}: category {i}"): _read(
            row, "name", str, f"{place}: category {i}"
        )
        for i, row in enumerate(tables["categories"])
    }
    images = {
        _read(row, "id", int, f"{place}: image {i}"): row for i, row in enumerate(tables["images"])
    }
    objects: dict[int, list[LabelledObject]] = {number: [] for number in images}
    for i, row in enumerate(tables["annotations"]):
        where = f"{place}: annotation {row.get('id', i) if isinstance(row, dict) else i}"
        image, category = (_read(row, key, int, where) for key in ("image_id", "category_id"))
        if image not in images or category not in labels:
            raise InvalidTaskDataError(f"{where}: image {image} or category {category} is unknown")
        if row.get("iscrowd"):
            continue
        if read := _read_object(row, labels[category], images[image], where):
            objects[image].append(read)
    known = frozenset(labels.values())
    pictures = []
    for number, row in images.items():
        name = _read(row, "file_name", str, f"{place}: image {number}")
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts or not (folder / inside).is_file():
            raise InvalidTaskDataError(f"{place}: {folder} holds no picture {name!r}")
        pictures.append(LabelledPicture(name, folder / inside, known, tuple(objects[number])))
    return pictures


def _read_object(
    row: Mapping[str, Any], label: str, image: Mapping[str, Any], place: str
) -> LabelledObject | None:
    """An annotation's object; None where its box lies outside the picture."""
    try:
        x, y, width, height = (float(side) for side in row["bbox"])
        size = float(image["width"]), float(image["height"])
        box = clip_box((x, y, x + width, y + height), *size)
        instance = f"{image['id']}/{row['id']}"
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidTaskDataError(
            f"{place}: needs an id, a bbox of x, y, width and height, and an image with a width "
            f"and a height ({error!r})"
        ) from error
    return None if box is None else LabelledObject(label, instance, box)


def _read_table(body: Any, key: str, place: Path) -> list[Any]:
    if not isinstance(body, dict) or not isinstance(body.get(key), list):
        raise InvalidTaskDataError(f"{place} is not in COCO's format: no list {key!r}")
    table: list[Any] = body[key]
    return table


def _read(row: Any, key: str, kind: type[T], place: str) -> T:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InvalidTaskDataError(f"{place}: {key!r} must be of type {kind.__name__}")
    return value
