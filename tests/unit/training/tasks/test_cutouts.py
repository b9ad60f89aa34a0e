"""Cut-outs: read from a catalogue, cropped to their alpha, split by families of look-alikes."""

import io
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from service.errors import InvalidTaskDataError
from tests.fixtures.tiny_scenes import draw_ellipse
from training.tasks.cutouts import (
    BACKGROUND_PIXELS,
    CUTOUT_PIXELS,
    DISTRACTOR,
    FURNITURE,
    PARTS,
    STAMPS,
    TUTORIALS,
    WALLPAPERS,
    choose_part,
    group_twins,
    read_backgrounds,
    read_catalogue,
    read_objects,
    split_families,
    to_tensor,
)

RULES: dict[str, Any] = {
    "categories": {
        "bird": {"stamps": r"animals/birds/", "base": True},
        "sofa": {"furniture": r"\bsofa\b"},
    },
    "ignore": {"stamps": r"cartoon", "furniture": r"\blight source\b"},
    "backgrounds": {"wallpapers": r".*\.jpg", "tutorials": r"graf1\.png"},
}


def draw_object(seed: int, size: int = 40) -> Image.Image:
    """A picture that looks like no other: large blocks of random colours."""
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=random)
    pixels = draw_ellipse(size, size)
    pixels[:3] = blocks.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy(), "RGBA")


def pad(picture: Image.Image, margin: int = 10) -> Image.Image:
    canvas = Image.new("RGBA", (picture.width + 2 * margin, picture.height + 2 * margin))
    canvas.paste(picture, (margin, margin))
    return canvas


def test_twins_are_grouped_through_chains() -> None:
    steps = torch.tensor([0.0, 0.05, 0.1, 0.5, 0.55, 0.9])
    thumbnails = steps[:, None].expand(-1, 16).contiguous()

    assert group_twins(thumbnails) == [[0, 1, 2], [3, 4], [5]]


def test_a_family_is_never_split() -> None:
    objects = []
    for family in range(30):
        picture = draw_object(family)
        for view in range(1 + family % 3):
            brighter = picture.point(lambda value, view=view: min(255, value + view))
            objects.append(("ball", f"ball {family} {view}", brighter))
    parts = split_families(objects)
    sides: dict[str, set[str]] = {}
    for (_, name, _), part in zip(objects, parts, strict=True):
        sides.setdefault(name.split()[1], set()).add(part)

    assert all(len(side) == 1 for side in sides.values())
    shares = {part: count / len(parts) for part, count in Counter(parts).items()}
    assert shares["test"] == pytest.approx(0.3, abs=0.06)
    assert shares["validation"] == pytest.approx(0.08, abs=0.06)


def test_every_category_has_objects_in_every_split() -> None:
    objects = [
        (category, f"{category} {i}", draw_object(100 * number + i))
        for number, category in enumerate(("a", "b", DISTRACTOR))
        for i in range(6)
    ]
    parts = split_families(objects)

    for category in ("a", "b", DISTRACTOR):
        own = {
            part for (owner, _, _), part in zip(objects, parts, strict=True) if owner == category
        }
        assert own == set(PARTS)


def test_the_split_depends_on_names_and_not_on_order() -> None:
    objects = [("a", f"object {i}", draw_object(i)) for i in range(20)]
    parts = dict(zip((name for _, name, _ in objects), split_families(objects), strict=True))
    backwards = objects[::-1]

    assert split_families(backwards) == [parts[name] for _, name, _ in backwards]


def test_backgrounds_are_split_by_the_hashes_of_their_names() -> None:
    counts = Counter(choose_part(f"picture {i}.jpg") for i in range(5000))

    assert counts["test"] / 5000 == pytest.approx(0.22, abs=0.02)
    assert counts["validation"] / 5000 == pytest.approx(0.10, abs=0.02)
    assert choose_part("picture 7.jpg") == choose_part("picture 7.jpg")


def test_pixels_are_channels_first() -> None:
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    picture.putpixel((2, 1), (7, 8, 9))
    pixels = to_tensor(picture)

    assert pixels.shape == (3, 2, 3)
    assert pixels[:, 1, 2].tolist() == [7, 8, 9]
    assert pixels[:, 0, 0].tolist() == [1, 2, 3]


def make_catalogue(path: Path, entries: dict[str, Image.Image]) -> None:
    lines, members = [], {}
    for number, (title, picture) in enumerate(entries.items(), start=1):
        lines += [f"name#{number}={title}", f"icon#{number}=/icons/{number}.png"]
        data = io.BytesIO()
        picture.save(data, "PNG")
        members[f"icons/{number}.png"] = data.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", "\r\n".join(lines) + "\r\n")
        for name, data_bytes in members.items():
            archive.writestr(name, data_bytes)


def test_objects_are_cropped_and_put_into_their_category(tmp_path: Path) -> None:
    stamps = tmp_path / STAMPS.folder_name / "usr/share/tuxpaint/stamps"
    for name in ("animals/birds/crow", "animals/birds/crow_mirror", "animals/cartoon/x", "food/y"):
        path = stamps / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pad(draw_object(1, 400)).save(path)
    Image.new("RGBA", (50, 50)).save(stamps / "food" / "empty.png")
    catalogue = tmp_path / FURNITURE.folder_name / "usr/share/sweethome3d/furniture/a.sh3f"
    pictures = {
        "Big Sofa": draw_object(2),
        "Light source": draw_object(3),
        "Sofabed": draw_object(4),
    }
    make_catalogue(catalogue, pictures)
    found = {name: (category, image) for name, category, image in read_objects(tmp_path, RULES)}

    assert {name: category for name, (category, _) in found.items()} == {
        "stamp animals/birds/crow.png": "bird",
        "stamp food/y.png": DISTRACTOR,
        "furniture a icons/1.png Big Sofa": "sofa",
        "furniture a icons/3.png Sofabed": DISTRACTOR,
    }
    assert found["stamp animals/birds/crow.png"][1].size == (CUTOUT_PIXELS, CUTOUT_PIXELS)
    with zipfile.ZipFile(catalogue) as archive:
        assert next(iter(read_catalogue(archive))) == ("Big Sofa", "icons/1.png")


def test_backgrounds_are_scaled_and_a_package_without_any_is_refused(tmp_path: Path) -> None:
    for archive, name in ((WALLPAPERS, "hills.jpg"), (TUTORIALS, "graf1.png")):
        folder = tmp_path / archive.folder_name / "deep"
        folder.mkdir(parents=True)
        Image.new("RGB", (100, 50)).save(folder / name)
    found = dict(read_backgrounds(tmp_path, RULES["backgrounds"]))

    assert {name: picture.size for name, picture in found.items()} == dict.fromkeys(
        ("hills.jpg", "graf1.png"), (2 * BACKGROUND_PIXELS, BACKGROUND_PIXELS)
    )
    with pytest.raises(InvalidTaskDataError, match="holds none of its backgrounds"):
        list(read_backgrounds(tmp_path, {**RULES["backgrounds"], "tutorials": "other"}))
