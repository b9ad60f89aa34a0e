"""Reader of Pascal VOC's lists and annotation files."""

from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

from service.errors import InvalidTaskDataError
from training.tasks.labelled_picture import LabelledObject, LabelledPicture, clip_box

SUFFIXES = (".jpg", ".jpeg", ".png")


def read_voc_ids(folder: Path, part: str) -> tuple[str, ...] | None:
    """Picture ids of a split's list; None where the data set has no such list.

    Raises:
        InvalidTaskDataError: an id that is a path, or not UTF-8.
    """
    path = folder / "ImageSets" / "Main" / f"{part}.txt"
    if not path.exists():
        return None
    ids = tuple(line.split()[0] for line in _read_text(path).splitlines() if line.strip())
    if wrong := [name for name in ids if "/" in name or "\\" in name or name.startswith(".")]:
        raise InvalidTaskDataError(f"{path}: {wrong[0]!r} is no picture id")
    return tuple(dict.fromkeys(ids))


def read_voc_pictures(folder: Path, ids: Iterable[str]) -> list[LabelledPicture]:
    """Pictures and their objects.

    Raises:
        InvalidTaskDataError: a picture or its annotation file is missing, or it is malformed.
    """
    return [_read_picture(folder, name) for name in ids]


def _read_picture(folder: Path, name: str) -> LabelledPicture:
    candidates = [folder / "JPEGImages" / f"{name}{suffix}" for suffix in SUFFIXES]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise InvalidTaskDataError(f"{candidates[0]} is not there, though a list names it")
    place = folder / "Annotations" / f"{name}.xml"
    root = _parse_xml(place)
    labels, objects = set[str](), []
    try:
        width, height = (float(_read_field(root, f"size/{side}")) for side in ("width", "height"))
        for number, element in enumerate(root.iterfind("object")):
            label = _read_field(element, "name")
            labels.add(label)
            if (element.findtext("difficult") or "0").strip() != "0":
                continue
            x1, y1, x2, y2 = (
                float(_read_field(element, f"bndbox/{side}"))
                for side in ("xmin", "ymin", "xmax", "ymax")
            )
            box = clip_box((x1 - 1, y1 - 1, x2, y2), width, height)  # pixels count from 1
            if box is not None:
                objects.append(LabelledObject(label, f"{name}/{number}", box))
    except ValueError as error:
        raise InvalidTaskDataError(f"{place}: {error}") from error
    return LabelledPicture(name, path, frozenset(labels), tuple(objects))


def _parse_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file without a document type, so that no entity can be declared.

    Raises:
        InvalidTaskDataError: it is missing, not UTF-8, not XML, or has a document type.
    """
    text = _read_text(path)
    if "<!DOCTYPE" in text:
        raise InvalidTaskDataError(f"{path} has a document type, which annotations do not need")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise InvalidTaskDataError(f"{path} is not XML: {error}") from error


def _read_field(element: ElementTree.Element, path: str) -> str:
    value = (element.findtext(path) or "").strip()
    if not value:
        raise ValueError(f"{path} is missing")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidTaskDataError(f"{path} is not there") from error
    except UnicodeDecodeError as error:
        raise InvalidTaskDataError(f"{path} is not UTF-8 text: {error}") from error
