"""Task vectors of example pictures instead of words, for the comparison of the two."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from service.errors import InvalidRecipeError, InvalidTaskDataError
from service.synthesis.image_encoder import ConseImageEncoder, ImageEncoder
from service.synthesis.task_encoder import (
    EMBEDDED_MINILM,
    OpenClipImageEncoder,
    build_task_encoder,
)
from training.recipe import EncoderSection
from training.task_vectors import TaskVectors
from training.tasks.detection_task import Box, DetectionData, DetectionTask, SceneSource

EMBEDDED_CONSE = "embedded:conse"
"""Model of `open_clip_image` where no image tower of CLIP can be had: ConSE over MiniLM."""

MARGIN = 0.15
"""Of an example picture around its object, as a share of the object's longer side."""


def build_image_encoder(section: EncoderSection) -> ImageEncoder:
    """The recipe's encoder of pictures.

    Raises:
        InvalidRecipeError: the recipe's encoder reads no pictures.
        MissingDependencyError: the encoder's weights are not installed.
    """
    if section.kind != "open_clip_image":
        raise InvalidRecipeError(f"encoder.kind {section.kind} reads no pictures")
    if section.model == EMBEDDED_CONSE:
        words = build_task_encoder({"kind": "open_clip_text", "model": EMBEDDED_MINILM})
        return ConseImageEncoder(words)
    return OpenClipImageEncoder(section.model, section.pretrained)


def encode_pictures(
    section: EncoderSection, encoder: ImageEncoder, data: DetectionData
) -> tuple[TaskVectors, Float[Tensor, "tasks dim"]]:
    """Task vectors of training pictures, and one a task of validation pictures.

    A picture is one object with a margin, because a scene holds objects of other tasks too. A
    training vector is the mean over `section.num_samples` pictures; there are as many of them as
    the task has training wordings. The last one is what an adapter is generated from in the
    evaluation, whose own scenes are in neither.

    Raises:
        InvalidTaskDataError: too few scenes hold an object of a task.
    """
    rows: list[Tensor] = []
    owner: list[int] = []
    unseen: list[Tensor] = []
    for index, task in enumerate(data.tasks):
        groups = len(task.descriptions)
        shown = _find_objects(data.train, task, groups)
        for group in range(groups):
            chosen = shown[group::groups][: section.num_samples]
            rows.append(encoder.encode_examples(_cut_out(data.train, chosen)))
            owner.append(index)
        chosen = _find_objects(data.validation, task, 1)[: section.num_samples]
        unseen.append(encoder.encode_examples(_cut_out(data.validation, chosen)))
    vectors = TaskVectors(encoder.encoder_id, torch.stack(rows), torch.tensor(owner))
    return vectors, torch.stack(unseen)


def _find_objects(source: SceneSource, task: DetectionTask, at_least: int) -> list[tuple[int, Box]]:
    """The first object of a task in each scene that holds one."""
    found = []
    for scene, objects in enumerate(source.objects):
        boxes = [each.box for each in objects if each.category == task.name]
        if boxes:
            found.append((scene, boxes[0]))
    if len(found) < at_least:
        raise InvalidTaskDataError(
            f"{len(found)} scenes hold an object of task {task.name!r}: its task vectors need "
            f"{at_least}"
        )
    return found


def _cut_out(source: SceneSource, chosen: Sequence[tuple[int, Box]]) -> list[Image.Image]:
    pictures = []
    for scene, (x1, y1, x2, y2) in chosen:
        pixels = source.read_pixels(scene)
        height, width = pixels.shape[1:]
        margin = MARGIN * max((x2 - x1) * width, (y2 - y1) * height)
        left, right = max(0, int(x1 * width - margin)), min(width, int(x2 * width + margin) + 1)
        top, bottom = max(0, int(y1 * height - margin)), min(height, int(y2 * height + margin) + 1)
        part = pixels[:, top:bottom, left:right].permute(1, 2, 0).contiguous()
        pictures.append(Image.fromarray(part.numpy()))
    return pictures
