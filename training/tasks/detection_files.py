"""Detection tasks from a person's own pictures: folders in COCO's or Pascal VOC's format.

`tasks.toml` in the folder has one table a task: title, descriptions, heldout_descriptions. A
task is matched with the data set's label of that meaning (`sofa` with `couch`). Without the
file every label is a task of its own, in the generic wordings of `detection_labels.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from service.errors import InvalidTaskDataError
from training.tasks.coco_files import read_coco_pictures
from training.tasks.cutouts import to_tensor
from training.tasks.detection_labels import (
    find_nearest,
    identify_label,
    name_label,
    word_label,
)
from training.tasks.detection_task import Annotation, DetectionData, build_detection_task
from training.tasks.documents import draw_fraction
from training.tasks.labelled_picture import LabelledPicture
from training.tasks.text_task import Wordings, read_wordings, select_names
from training.tasks.voc_files import read_voc_ids, read_voc_pictures

VALIDATION_SHARE = 0.05
"""Of the training pictures, where the data set has no third split."""


@dataclass(frozen=True)
class PictureFiles:
    """Scenes that are picture files, read when they are asked for.

    Attributes:
        paths: file of each scene.
        objects: annotations of each scene; none where it holds nothing of the tasks.
    """

    paths: tuple[Path, ...]
    objects: tuple[tuple[Annotation, ...], ...]

    def read_pixels(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """RGB as stored; an EXIF orientation is left alone, for the boxes were drawn without it.

        Raises:
            InvalidTaskDataError: the file is no picture, or a broken one.
        """
        try:
            with Image.open(self.paths[index]) as picture:
                return to_tensor(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InvalidTaskDataError(f"{self.paths[index]} cannot be read: {error}") from error


def load_coco(folder: Path, names: Sequence[str] | None = None) -> DetectionData:
    """Tasks and scenes of a folder in COCO's format.

    `annotations/` holds one `instances_train*.json` and one `instances_val*.json`; the pictures
    lie in `train*/` and `val*/` of the same ending. COCO's own test annotations are not public:
    its validation split is the test split here, and a twentieth of the training pictures, chosen
    by the hashes of their names, is the validation split. Crowds are left out.

    Raises:
        InvalidInputError: an unknown task name.
        InvalidTaskDataError: a file is missing or malformed, or a task's label is unknown.
    """
    train, validation = hold_out(read_coco_pictures(folder, "train"))
    test = read_coco_pictures(folder, "val")
    return _build_data(folder, names, train, validation, test)


def load_voc(folder: Path, names: Sequence[str] | None = None) -> DetectionData:
    """Tasks and scenes of a folder in Pascal VOC's format.

    `ImageSets/Main/{train,val,test}.txt` list the pictures of `JPEGImages/`, annotated in
    `Annotations/*.xml`. Without `test.txt` the test split is `val.txt`, and the validation split
    a twentieth of the training pictures, chosen by the hashes of their names. Objects marked
    `difficult` are left out.

    Raises:
        InvalidInputError: an unknown task name.
        InvalidTaskDataError: a file is missing or malformed, or a task's label is unknown.
    """
    parts = {part: read_voc_ids(folder, part) for part in ("train", "val", "test")}
    if parts["train"] is None or (parts["val"] is None and parts["test"] is None):
        raise InvalidTaskDataError(
            f"{folder / 'ImageSets/Main'} must hold train.txt, and val.txt or test.txt"
        )
    train = read_voc_pictures(folder, parts["train"])
    validation = read_voc_pictures(folder, parts["val"] or ())
    test = read_voc_pictures(folder, parts["test"] or ())
    if parts["test"] is None:
        validation, test = [], validation
    if not validation:
        train, validation = hold_out(train)
    return _build_data(folder, names, train, validation, test)


def hold_out(
    pictures: Sequence[LabelledPicture],
) -> tuple[list[LabelledPicture], list[LabelledPicture]]:
    """The pictures left for training, and the share for validation: one at least.

    The hash of a picture's name decides, so that more pictures move none from side to side.
    """
    fractions = {picture.name: draw_fraction(picture.name) for picture in pictures}
    limit = max(VALIDATION_SHARE, min(fractions.values(), default=0.0) + 1e-12)
    kept = [picture for picture in pictures if fractions[picture.name] >= limit]
    return kept, [picture for picture in pictures if fractions[picture.name] < limit]


def _build_data(
    folder: Path,
    names: Sequence[str] | None,
    train: Sequence[LabelledPicture],
    validation: Sequence[LabelledPicture],
    test: Sequence[LabelledPicture],
) -> DetectionData:
    for part, pictures in (("training", train), ("validation", validation), ("test", test)):
        if not pictures:
            raise InvalidTaskDataError(f"{folder} has no pictures for the {part} split")
    labels = {label for part in (train, validation, test) for p in part for label in p.labels}
    wordings = _read_or_make_wordings(folder, labels)
    meanings = {identify_label(name): name for name in wordings}
    wanted = names and [meanings.get(identify_label(name), name) for name in names]
    tasks = tuple(
        build_detection_task(name, wordings[name]) for name in select_names(tuple(wordings), wanted)
    )
    return DetectionData(
        tasks, *(_open_scenes(part, meanings) for part in (train, validation, test))
    )


def _read_or_make_wordings(folder: Path, labels: set[str]) -> Mapping[str, Wordings]:
    """Wordings by task name, each of another label of the data set.

    Raises:
        InvalidTaskDataError: a task of `tasks.toml` has no label, or two have the same.
    """
    path = folder / "tasks.toml"
    if not path.exists():
        first = {identify_label(label): label for label in sorted(labels, reverse=True)}
        return {name_label(label): word_label(label) for label in sorted(first.values())}
    wordings = read_wordings(path)
    known = {identify_label(label) for label in labels}
    seen: dict[str, str] = {}
    for name in wordings:
        meaning = identify_label(name)
        if meaning not in known:
            raise InvalidTaskDataError(
                f"{path}: the data set has no label {name!r}; the nearest of its labels: "
                f"{', '.join(find_nearest(name, labels))}"
            )
        if meaning in seen:
            raise InvalidTaskDataError(f"{path}: {seen[meaning]!r} and {name!r} are one label")
        seen[meaning] = name
    return wordings


def _open_scenes(pictures: Sequence[LabelledPicture], meanings: Mapping[str, str]) -> PictureFiles:
    """Scenes whose annotations carry task names; objects of no task are not annotated."""
    objects = []
    for picture in pictures:
        found = ((meanings.get(identify_label(o.label)), o) for o in picture.objects)
        objects.append(
            tuple(Annotation(name, o.instance, o.box) for name, o in found if name is not None)
        )
    return PictureFiles(tuple(picture.path for picture in pictures), tuple(objects))
