"""Pictures of detections, side by side: a row per method or rank (paper Figures 4 and 5)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from service.inference.base_model import BaseModel
from service.inference.box_decoding import LocatedBox
from service.synthesis.attachment import Attachment
from service.synthesis.bases import AdapterBases
from service.synthesis.synthesizer import Synthesizer
from training.evaluation.boxes import find_boxes
from training.tasks.detection_task import DetectionData, DetectionTask

SHOWN_TASKS = 5
SHOWN_SCORE = 0.3
"""Boxes below this score are not drawn."""


@dataclass(frozen=True)
class PictureRow:
    """A row of pictures: one method's boxes on every shown task.

    Attributes:
        label: of the row.
        bases: of its adapters.
        vectors: adapters by task; None for the base alone.
    """

    label: str
    bases: AdapterBases
    vectors: Mapping[str, Float[Tensor, " num_params"]] | None


def draw_comparison(
    synthesizer: Synthesizer, base: BaseModel, data: DetectionData, path: Path
) -> None:
    """Draws base, soup and generated adapter of a bundle."""
    bundle = synthesizer.bundle
    generated, soup = {}, {}
    for task in choose_tasks(data):
        generated[task.name] = synthesizer.synthesize_words(task.heldout_descriptions[0]).vector
        soup[task.name] = bundle.normalizer.mean
    rows = (
        PictureRow("base model", bundle.bases, None),
        PictureRow("soup", bundle.bases, soup),
        PictureRow("generated adapter", bundle.bases, generated),
    )
    draw_pictures(base, data, rows, path)


def draw_pictures(
    base: BaseModel, data: DetectionData, rows: Sequence[PictureRow], path: Path
) -> None:
    """Draws a column per task: the first test scene with its object, under each row's adapters.

    The scene is the first one in order, not a chosen one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = choose_tasks(data)
    figure, grid = pyplot.subplots(
        len(rows),
        len(tasks),
        figsize=(3.1 * len(tasks), 3.2 * len(rows)),
        layout="constrained",
        squeeze=False,
    )
    for number, row in enumerate(rows):
        attachment = Attachment(base.model, row.bases)
        for column, task in enumerate(tasks):
            prompt = task.heldout_descriptions[0]
            pixels = data.test.read_pixels(find_scene(data, task))
            vector = None if row.vectors is None else row.vectors[task.name].float()
            features = _encode(base, pixels)
            found = find_boxes(base, attachment, vector, features, prompt)[0]
            _draw_boxes(grid[number][column], pixels, found)
            if number == 0:
                grid[number][column].set_title(prompt, fontsize=9)
            if column == 0:
                grid[number][column].set_ylabel(row.label)
        attachment.detach(base.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)  # a third of the bytes


def _encode(
    base: BaseModel, pixels: UInt8[Tensor, "3 height width"]
) -> Float[Tensor, "1 features rows columns"]:
    pictures = base.processor.image_processor([pixels], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        hidden = base.model.model.vision_tower(pictures.to(base.device, base.dtype))
    return hidden.last_hidden_state  # type: ignore[no-any-return]


def choose_tasks(data: DetectionData) -> Sequence[DetectionTask]:
    """Tasks to show: the paper's own categories where they are there, then the first others."""
    preferred = ("sofa", "car", "bird", "chair", "vegetable", "table", "fish")
    by_name = {task.name: task for task in data.tasks}
    chosen = [by_name[name] for name in preferred if name in by_name]
    chosen += [task for task in data.tasks if task not in chosen]
    return chosen[:SHOWN_TASKS]


def find_scene(data: DetectionData, task: DetectionTask) -> int:
    """The first test scene with the task's object."""
    return next(
        index
        for index, objects in enumerate(data.test.objects)
        if any(each.category == task.name for each in objects)
    )


def _draw_boxes(
    axes: object, pixels: UInt8[Tensor, "3 height width"], found: Sequence[LocatedBox]
) -> None:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

    assert isinstance(axes, Axes)
    height, width = pixels.shape[1:]
    axes.imshow(pixels.permute(1, 2, 0).numpy())
    for box in found:
        if box.score < SHOWN_SCORE:
            continue
        corner = (box.x1 * width, box.y1 * height)
        size = ((box.x2 - box.x1) * width, (box.y2 - box.y1) * height)
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="#00d084", linewidth=2))
        axes.text(*corner, f"{box.score:.2f}", fontsize=8, color="black", backgroundcolor="#00d084")
    axes.set_xticks([])
    axes.set_yticks([])
