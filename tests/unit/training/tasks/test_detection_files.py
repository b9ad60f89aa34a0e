"""Folders in COCO's and Pascal VOC's format: the same tasks and scenes come out of both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from service.errors import InvalidInputError, InvalidTaskDataError
from training.tasks.detection import load_detection_data
from training.tasks.detection_files import hold_out, load_coco, load_voc
from training.tasks.detection_labels import (
    HELDOUT_TEMPLATES,
    TEMPLATES,
    find_nearest,
    identify_label,
)
from training.tasks.detection_task import SceneSource
from training.tasks.labelled_picture import LabelledPicture, clip_box

TASKS = """
[sofa]
title = "Sofas"
descriptions = ["Detect the sofa in the image.", "Find the couch."]
heldout_descriptions = ["Show me the settee."]

[dining_table]
title = "Tables"
descriptions = ["Detect the dining table in the image."]
heldout_descriptions = ["Where do they eat?"]
"""

Body = dict[str, Any]


def draw_picture(path: Path, colour: tuple[int, int, int] = (200, 10, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20), colour).save(path)


def coco_body(part: str, count: int) -> Body:
    """Pictures of 40 x 20 with a couch each; the first has a table and a crowd too."""
    images = [
        {"id": i, "file_name": f"{part}{i}.png", "width": 40, "height": 20} for i in range(count)
    ]
    couch = {"category_id": 63, "bbox": [4, 5, 20, 10]}
    annotations: list[Body] = [{"id": i, "image_id": i, **couch} for i in range(count)]
    annotations += [
        {"id": 90, "image_id": 0, "category_id": 67, "bbox": [0, 0, 40, 20], "iscrowd": 0},
        {"id": 91, "image_id": 0, "category_id": 63, "bbox": [0, 0, 40, 20], "iscrowd": 1},
    ]
    names = {63: "couch", 67: "dining table", 3: "car"}
    categories = [{"id": number, "name": name} for number, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_coco(root: Path, edit: Callable[[Body], object] = lambda _body: None) -> Path:
    """A data set of 12 training and 3 other pictures; `edit` spoils the training file."""
    for part, count in (("train", 12), ("val", 3)):
        body = coco_body(part, count)
        for row in body["images"]:
            draw_picture(root / f"{part}2017" / row["file_name"])
        if part == "train":
            edit(body)
        path = root / "annotations" / f"instances_{part}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(body))
    return root


def voc_xml(*objects: str, size: str = "<width>40</width><height>20</height>") -> str:
    return f"<annotation><size>{size}</size>{''.join(objects)}</annotation>"


def voc_object(label: str, box: tuple[float, ...] = (5, 6, 24, 15), difficult: int = 0) -> str:
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    return (
        f"<object><name>{label}</name><difficult>{difficult}</difficult>"
        f"<bndbox>{corners}</bndbox></object>"
    )


def make_voc(root: Path, parts: dict[str, int], xml: str | None = None) -> Path:
    """A data set with so many pictures in each list; `xml` replaces the first annotation."""
    usual = voc_xml(voc_object("sofa"), voc_object("diningtable", difficult=1))
    for part, count in parts.items():
        ids = [f"{part}_{i:03d}" for i in range(count)]
        for name in ids:
            draw_picture(root / "JPEGImages" / f"{name}.jpg")
            annotation = root / "Annotations" / f"{name}.xml"
            annotation.parent.mkdir(exist_ok=True)
            annotation.write_text(usual)
        listing = root / "ImageSets" / "Main" / f"{part}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text("\n".join(ids) + "\n")
    if xml is not None:
        (root / "Annotations" / "train_000.xml").write_text(xml)
    return root


def test_coco_boxes_are_fractions_under_the_tasks_names(tmp_path: Path) -> None:
    (make_coco(tmp_path) / "tasks.toml").write_text(TASKS)
    data = load_detection_data(f"coco:{tmp_path}", ["sofa"])

    assert [task.name for task in data.tasks] == ["sofa"]
    assert data.tasks[0].descriptions[1] == "Find the couch."
    assert isinstance(data.test, SceneSource)
    first, *others = data.test.objects
    assert [(o.category, o.instance) for o in first] == [("sofa", "0/0"), ("dining_table", "0/90")]
    assert first[0].box == pytest.approx((0.1, 0.25, 0.6, 0.75))
    assert all([o.category for o in scene] == ["sofa"] for scene in others)


def test_pixels_are_read_as_stored_whatever_their_mode(tmp_path: Path) -> None:
    make_coco(tmp_path)
    picture = tmp_path / "val2017" / "val0.png"
    Image.new("L", (40, 20), 7).save(picture)
    data = load_coco(tmp_path)

    assert torch.equal(data.test.read_pixels(0), torch.full((3, 20, 40), 7, dtype=torch.uint8))
    assert data.test.read_pixels(1)[:, 3, 5].tolist() == [200, 10, 20]
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 20)).save(picture, exif=turned)
    assert data.test.read_pixels(0).shape == (3, 20, 40)
    picture.write_bytes(b"no picture")
    with pytest.raises(InvalidTaskDataError, match=r"val0\.png cannot be read"):
        data.test.read_pixels(0)


def test_coco_holds_out_training_pictures_and_tests_on_val(tmp_path: Path) -> None:
    data = load_coco(make_coco(tmp_path))

    assert len(data.train.objects) + len(data.validation.objects) == 12
    assert len(data.validation.objects) >= 1
    assert len(data.test.objects) == 3


def test_what_is_held_out_stays_so_when_pictures_are_added() -> None:
    pictures = [LabelledPicture(f"{i}", Path(), frozenset(), ()) for i in range(2000)]
    kept, held_out = hold_out(pictures)
    fewer_kept, fewer_held_out = hold_out(pictures[:1000])

    assert 60 < len(held_out) < 140
    assert set(fewer_held_out) <= set(held_out)
    assert set(fewer_kept) <= set(kept)
    assert {*kept, *held_out} == set(pictures)
    assert len(hold_out(pictures[:2])[1]) == 1


def test_without_wordings_every_label_has_generic_ones(tmp_path: Path) -> None:
    data = load_coco(make_coco(tmp_path), ["car", "sofa"])

    assert [task.name for task in data.tasks] == ["car", "couch"], "a name is known by its meaning"
    assert data.tasks[0].descriptions[0] == "Detect the car in the image."
    assert [task.name for task in load_coco(tmp_path).tasks] == ["car", "couch", "dining_table"]
    assert len(TEMPLATES) >= 8
    assert len(HELDOUT_TEMPLATES) >= 3


def test_pictures_without_an_object_stay_as_negatives(tmp_path: Path) -> None:
    make_coco(tmp_path, lambda body: body.update(annotations=body["annotations"][:1]))
    data = load_coco(tmp_path)
    scenes = [*data.train.objects, *data.validation.objects]

    assert sorted(map(len, scenes)) == [0] * 11 + [1]


def test_boxes_are_clipped_and_dropped_where_nothing_is_left(tmp_path: Path) -> None:
    def edit(body: Body) -> None:
        body["annotations"][:] = [
            {"id": 1, "image_id": 0, "category_id": 63, "bbox": [30, -5, 20, 10]},
            {"id": 2, "image_id": 0, "category_id": 63, "bbox": [41, 0, 5, 5]},
            {"id": 3, "image_id": 0, "category_id": 63, "bbox": [1, 1, 0, 5]},
        ]

    data = load_coco(make_coco(tmp_path, edit))
    (found,) = [o for s in (*data.train.objects, *data.validation.objects) for o in s]

    assert (found.instance, found.box) == ("0/1", pytest.approx((0.75, 0.0, 1.0, 0.25)))
    assert clip_box((0, 0, 40, 20), 40, 20) == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda body: body.pop("images"), "no list 'images'"),
        (lambda body: body["images"][1].pop("id"), "image 1: 'id' must be of type int"),
        (lambda body: body["images"][1].update(width=0), "annotation 1: .*must be positive"),
        (lambda body: body["annotations"][2].pop("bbox"), "annotation 2: .*'bbox'"),
        (lambda body: body["annotations"][2].update(bbox=[1, 2, 3]), "annotation 2: "),
        (lambda body: body["annotations"][2].update(bbox=[1, 2, 3, float("nan")]), "finite"),
        (lambda body: body["annotations"][2].update(image_id=77), "image 77 .*unknown"),
        (lambda body: body["annotations"][2].update(category_id=5), "category 5 is unknown"),
        (lambda body: body["annotations"].append("x"), "annotation 14: 'image_id' must be"),
        (lambda body: body["images"][1].update(file_name="no.png"), "no picture 'no.png'"),
        (lambda body: body["images"][1].update(file_name="../val2017/val0.png"), "no picture"),
        (lambda body: body["images"].clear() or body["annotations"].clear(), "no pictures for"),
    ],
)
def test_a_malformed_coco_file_says_where(
    tmp_path: Path, edit: Callable[[Body], object], message: str
) -> None:
    with pytest.raises(InvalidTaskDataError, match=message):
        load_coco(make_coco(tmp_path, edit))


def test_missing_coco_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidTaskDataError, match=r"must hold one instances_train\*\.json"):
        load_coco(tmp_path)
    make_coco(tmp_path)
    second = tmp_path / "annotations" / "instances_val2014.json"
    second.write_text("{}")
    with pytest.raises(InvalidTaskDataError, match="there are 2"):
        load_coco(tmp_path)
    second.unlink()
    (tmp_path / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(InvalidTaskDataError, match="is not JSON"):
        load_coco(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "other")
    with pytest.raises(InvalidTaskDataError, match="val2017 is not there"):
        load_coco(tmp_path)


def test_a_task_without_a_label_lists_the_nearest(tmp_path: Path) -> None:
    make_coco(tmp_path)
    (tmp_path / "tasks.toml").write_text(TASKS.replace("[dining_table]", "[dinning_tables]"))
    with pytest.raises(InvalidTaskDataError, match=r"no label 'dinning_tables'.*: dining table$"):
        load_coco(tmp_path)
    (tmp_path / "tasks.toml").write_text(TASKS.replace("[dining_table]", "[couch]"))
    with pytest.raises(InvalidTaskDataError, match="'sofa' and 'couch' are one label"):
        load_coco(tmp_path)
    (tmp_path / "tasks.toml").unlink()
    with pytest.raises(InvalidInputError, match=r"'zebra'.*known: car, couch, dining_table"):
        load_coco(tmp_path, ["zebra"])


@pytest.mark.parametrize(
    "same",
    [
        ("sofa", "Couch"),
        ("motorbike", "motorcycle"),
        ("aeroplane", "airplane"),
        ("tvmonitor", "tv"),
        ("diningtable", "dining table", "Dining_Table"),
        ("pottedplant", "potted plant"),
    ],
)
def test_labels_of_one_meaning_are_one(same: tuple[str, ...]) -> None:
    assert len({identify_label(label) for label in same}) == 1


def test_nearest_labels() -> None:
    assert find_nearest("bycicle", ["bicycle", "car"]) == ["bicycle"]
    assert find_nearest("qqq", ["bicycle", "car"]) == ["bicycle", "car"]


def test_voc_boxes_count_pixels_from_one(tmp_path: Path) -> None:
    (make_voc(tmp_path, {"train": 3, "val": 2, "test": 1}) / "tasks.toml").write_text(TASKS)
    data = load_voc(tmp_path)

    assert [len(s.objects) for s in (data.train, data.validation, data.test)] == [3, 2, 1]
    ((found,),) = data.test.objects
    assert (found.category, found.instance) == ("sofa", "test_000/0")
    assert found.box == pytest.approx((0.1, 0.25, 0.6, 0.75))
    assert data.train.read_pixels(0).shape == (3, 20, 40)


def test_voc_without_a_test_list_tests_on_val(tmp_path: Path) -> None:
    data = load_detection_data(f"voc:{make_voc(tmp_path, {'train': 12, 'val': 2})}")

    assert len(data.test.objects) == 2
    assert len(data.train.objects) + len(data.validation.objects) == 12
    assert [task.name for task in data.tasks] == ["diningtable", "sofa"]


def test_voc_without_a_validation_list_holds_pictures_out(tmp_path: Path) -> None:
    data = load_voc(make_voc(tmp_path, {"train": 12, "test": 2}))

    assert len(data.test.objects) == 2
    assert len(data.validation.objects) >= 1


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        ("<annotation>", "is not XML"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "has a document type"),
        ("\ud800", "is not UTF-8"),
        (voc_xml(voc_object("sofa"), size=""), "size/width is missing"),
        (voc_xml("<object><name>sofa</name></object>"), "bndbox/xmin is missing"),
        (voc_xml(voc_object("")), "name is missing"),
        (voc_xml(voc_object("sofa", (1, 2, 3, float("nan")))), "finite"),
        (voc_xml(voc_object("sofa")).replace("5</xmin>", "five</xmin>"), "five"),
    ],
)
def test_a_malformed_voc_file_is_named(tmp_path: Path, xml: str, message: str) -> None:
    make_voc(tmp_path, {"train": 3, "val": 2})
    path = tmp_path / "Annotations" / "train_000.xml"
    path.write_bytes(xml.encode("utf-8", "surrogatepass"))
    with pytest.raises(InvalidTaskDataError, match=rf"train_000\.xml.*{message}"):
        load_voc(tmp_path)


def test_missing_voc_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidTaskDataError, match=r"must hold train\.txt"):
        load_voc(tmp_path)
    make_voc(tmp_path, {"train": 3, "val": 2})
    (tmp_path / "Annotations" / "val_001.xml").unlink()
    with pytest.raises(InvalidTaskDataError, match=r"val_001\.xml is not there"):
        load_voc(tmp_path)
    (tmp_path / "JPEGImages" / "val_000.jpg").unlink()
    with pytest.raises(InvalidTaskDataError, match=r"val_000\.jpg is not there"):
        load_voc(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("../val_000\n")
    with pytest.raises(InvalidTaskDataError, match="is no picture id"):
        load_voc(tmp_path)
