"""Cut-outs and backgrounds: objects with alpha from registry packages, split by instance.

Photographs come from tuxpaint's stamps, renders from Sweet Home 3D's furniture catalogues,
backgrounds from desktop wallpapers and OpenCV's tutorial pictures. Everything is fetched once,
scaled once and kept in one safetensors file; no picture is part of this project.
"""

import hashlib
import io
import json
import re
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from service.errors import InvalidTaskDataError
from training.checkpoint import read_metadata, read_tensors, write_tensors
from training.tasks.archives import Archive, fetch_archive, unpack_archive
from training.tasks.cache import open_scratch_dir

PREPARED_FORMAT = 1  # raise it when readers or splits change: prepared files are then redone

STAMPS = Archive("apt", "tuxpaint-stamps-default")
FURNITURE = Archive("apt", "sweethome3d-furniture")
WALLPAPERS = Archive("apt", "mate-backgrounds")
TUTORIALS = Archive("apt", "opencv-doc")
ARCHIVES = (STAMPS, FURNITURE, WALLPAPERS, TUTORIALS)

CUTOUT_PIXELS = 160
"""Longest side of a kept cut-out."""

BACKGROUND_PIXELS = 480
"""Shortest side of a kept background."""

ALPHA_THRESHOLD = 16
"""An object's box is where its alpha exceeds this."""

TWIN_DISTANCE = 0.06
"""Cut-outs whose thumbnails differ less (RMS over RGBA, 0 to 1) are views of one family."""

DISTRACTOR = "distractor"
"""Category of the objects that no task asks for."""

CATEGORIES_FILE = Path(__file__).with_name("detection_categories.toml")
WIDE_CATEGORIES_FILE = CATEGORIES_FILE.with_name("detection_wide_categories.toml")

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Cutout:
    """One object.

    Attributes:
        name: where it comes from.
        category: name of its category, or `DISTRACTOR`.
        part: the only split in which it appears.
        pixels: RGBA, cropped to its alpha.
    """

    name: str
    category: str
    part: Part
    pixels: UInt8[Tensor, "4 height width"]


@dataclass(frozen=True)
class Background:
    """One background picture of one split."""

    name: str
    part: Part
    pixels: UInt8[Tensor, "3 height width"]


def load_cutouts(
    cache_dir: Path, progress: Callable[[str], None] = print, *, wide: bool = False
) -> tuple[tuple[Cutout, ...], tuple[Background, ...]]:
    """Prepares the pictures where that was not done yet, and reads them.

    Args:
        cache_dir: where they lie.
        progress: told what is done.
        wide: with further categories among the distractors; every object keeps its split.

    Raises:
        MissingDependencyError: Debian's packages cannot be fetched here.
        InvalidTaskDataError: a package does not hold what it should.
    """
    path = cache_dir / "detection" / "cutouts.safetensors"
    wanted = _describe_format()
    if not path.exists() or read_metadata(path).get("made_from") != wanted:
        _prepare(path, cache_dir, wanted, progress)
    tensors, metadata = read_tensors(path)
    index = json.loads(metadata["index"])
    cutouts = tuple(
        Cutout(row["name"], row["category"], row["part"], tensors[f"cutout.{i}"])
        for i, row in enumerate(index["cutouts"])
    )
    backgrounds = tuple(
        Background(row["name"], row["part"], tensors[f"background.{i}"])
        for i, row in enumerate(index["backgrounds"])
    )
    return tuple(_widen(cutouts)) if wide else cutouts, backgrounds


def _widen(cutouts: Iterable[Cutout]) -> Iterator[Cutout]:
    """Names the further categories among the distractors."""
    rules = tomllib.loads(WIDE_CATEGORIES_FILE.read_text(encoding="utf-8"))
    for each in cutouts:
        if re.search(rules["ignore"]["objects"], each.name):
            continue
        if each.category == DISTRACTOR:
            each = replace(each, category=_match(rules["categories"], "objects", each.name))
        yield each


def _describe_format() -> str:
    digest = hashlib.sha256(CATEGORIES_FILE.read_bytes()).hexdigest()
    return f"{PREPARED_FORMAT} {digest}"


def _prepare(path: Path, cache_dir: Path, made_from: str, progress: Callable[[str], None]) -> None:
    archives = {a: fetch_archive(a, cache_dir / "archives", progress) for a in ARCHIVES}
    rules = tomllib.loads(CATEGORIES_FILE.read_text(encoding="utf-8"))
    progress("preparing cut-outs and backgrounds")
    with open_scratch_dir(cache_dir) as scratch:
        for archive, file in archives.items():
            unpack_archive(file, scratch / archive.folder_name)
        found = list(read_objects(scratch, rules))
        backgrounds = list(read_backgrounds(scratch, rules["backgrounds"]))
    parts = split_families([(category, name, image) for name, category, image in found])
    counts = dict.fromkeys(rules["categories"], 0)
    for _, category, _ in found:
        if category != DISTRACTOR:
            counts[category] += 1
    if short := [name for name, count in counts.items() if count < 6]:
        raise InvalidTaskDataError(f"fewer than six cut-outs of {', '.join(short)}")
    tensors = {f"cutout.{i}": to_tensor(image) for i, (_, _, image) in enumerate(found)}
    tensors |= {f"background.{i}": to_tensor(image) for i, (_, image) in enumerate(backgrounds)}
    index = {
        "cutouts": [
            {"name": name, "category": category, "part": part}
            for (name, category, _), part in zip(found, parts, strict=True)
        ],
        "backgrounds": [{"name": name, "part": choose_part(name)} for name, _ in backgrounds],
    }
    write_tensors(path, tensors, {"made_from": made_from, "index": json.dumps(index)})
    progress(f"{len(found)} cut-outs in {len(counts)} categories, {len(backgrounds)} backgrounds")


def read_objects(root: Path, rules: Mapping[str, Any]) -> Iterator[tuple[str, str, Image.Image]]:
    """Yields (name, category, picture) of every object, in a fixed order.

    An object belongs to the first category with a rule that matches; one that matches
    `ignore` is left out, and what is left is a distractor.
    """
    categories: Mapping[str, Mapping[str, Any]] = rules["categories"]
    ignore = rules["ignore"]
    stamps = root / STAMPS.folder_name / "usr/share/tuxpaint/stamps"
    for path in sorted(stamps.rglob("*.png")):
        name = path.relative_to(stamps).as_posix()
        if path.stem.endswith("_mirror") or re.search(ignore["stamps"], name):
            continue
        category = _match(categories, "stamps", name)
        yield from _crop(f"stamp {name}", category, Image.open(path))
    catalogues = root / FURNITURE.folder_name / "usr/share/sweethome3d/furniture"
    for path in sorted(catalogues.glob("*.sh3f")):
        with zipfile.ZipFile(path) as catalogue:
            for title, icon in read_catalogue(catalogue):
                if re.search(ignore["furniture"], title, re.IGNORECASE):
                    continue
                category = _match(categories, "furniture", title)
                picture = Image.open(io.BytesIO(catalogue.read(icon)))
                yield from _crop(f"furniture {path.stem} {icon} {title}", category, picture)


def read_catalogue(catalogue: zipfile.ZipFile) -> Iterator[tuple[str, str]]:
    """Titles and icon members of a Sweet Home 3D catalogue, in its order."""
    text = catalogue.read("PluginFurnitureCatalog.properties").decode("latin-1")
    entries: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(name|icon)#(\d+)=(.*?)\r?$", text, re.MULTILINE):
        entries.setdefault(int(number), {})[key] = value.strip()
    for _, entry in sorted(entries.items()):
        if "name" in entry and "icon" in entry:
            yield entry["name"], entry["icon"].lstrip("/")


def read_backgrounds(root: Path, rules: Mapping[str, Any]) -> Iterator[tuple[str, Image.Image]]:
    """Yields the backgrounds that the rules name."""
    for archive, pattern in ((WALLPAPERS, rules["wallpapers"]), (TUTORIALS, rules["tutorials"])):
        folder = root / archive.folder_name
        seen: set[str] = set()
        for path in sorted(folder.rglob("*")):
            if not re.fullmatch(pattern, path.name) or path.name in seen:
                continue
            seen.add(path.name)
            picture = Image.open(path).convert("RGB")
            scale = BACKGROUND_PIXELS / min(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            yield path.name, picture.resize(size, Image.Resampling.LANCZOS)
        if not seen:
            raise InvalidTaskDataError(f"{archive.package} holds none of its backgrounds")


def _match(categories: Mapping[str, Mapping[str, Any]], source: str, name: str) -> str:
    for category, rule in categories.items():
        if source in rule and re.search(rule[source], name, re.IGNORECASE):
            return category
    return DISTRACTOR


def _crop(name: str, category: str, picture: Image.Image) -> Iterator[tuple[str, str, Image.Image]]:
    """The object within its alpha; nothing where it fills its picture or is nearly empty."""
    rgba = picture.convert("RGBA")
    alpha = rgba.getchannel("A").point(lambda value: 255 if value > ALPHA_THRESHOLD else 0)
    box = alpha.getbbox()
    if box is None or min(box[2] - box[0], box[3] - box[1]) < 12:
        return
    cropped = rgba.crop(box)
    cropped.thumbnail((CUTOUT_PIXELS, CUTOUT_PIXELS), Image.Resampling.LANCZOS)
    yield name, category, cropped


def split_families(objects: list[tuple[str, str, Image.Image]]) -> list[Part]:
    """A split for each (category, name, picture), whole families of look-alikes together.

    Within a category families are dealt in an order that their names' hashes fix: about 30% of
    the objects are for test, 8% (one at least) for validation.
    """
    parts: dict[int, Part] = {}
    for category in sorted({category for category, _, _ in objects}):
        members = [i for i, (owner, _, _) in enumerate(objects) if owner == category]
        thumbnails = torch.stack([_thumbnail(objects[i][2]) for i in members])
        families = group_twins(thumbnails)
        order = sorted(families, key=lambda family: _hash(objects[members[min(family)]][1]))
        quotas: dict[Part, float] = {
            "test": 0.30 * len(members),
            "validation": max(1.0, 0.08 * len(members)),
        }
        for family in order:
            part: Part = next((p for p, left in quotas.items() if left > 0.5), "train")
            if part in quotas:
                quotas[part] -= len(family)
            for member in family:
                parts[members[member]] = part
    return [parts[i] for i in range(len(objects))]


def group_twins(thumbnails: Float[Tensor, "objects values"]) -> list[list[int]]:
    """Connected groups of objects whose thumbnails lie nearer than `TWIN_DISTANCE`."""
    near = torch.cdist(thumbnails, thumbnails) / thumbnails.shape[1] ** 0.5 < TWIN_DISTANCE
    left = set(range(len(thumbnails)))
    groups = []
    while left:
        group, frontier = set[int](), {min(left)}
        while frontier:
            group |= frontier
            frontier = {j for i in frontier for j in near[i].nonzero().flatten().tolist()} - group
        left -= group
        groups.append(sorted(group))
    return groups


def choose_part(name: str) -> Part:
    """Split of a background: 22% for test, 10% for validation, by the hash of its name."""
    share = _hash(name) / 2**32
    return "test" if share < 0.22 else "validation" if share < 0.32 else "train"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])


def _thumbnail(picture: Image.Image) -> Float[Tensor, " values"]:
    small = picture.resize((16, 16), Image.Resampling.BOX)
    values = to_tensor(small).float() / 255
    values[:3] *= values[3:]
    return values.flatten()


def to_tensor(picture: Image.Image) -> UInt8[Tensor, "channels height width"]:
    """Pixels of a picture, channels first."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()
