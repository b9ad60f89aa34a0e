"""Pictures of detections: original, soup and generated adapter side by side (paper Figure 4)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from service.inference.base_model import BaseModel
from service.inference.box_decoding import LocatedBox
from service.synthesis.attachment import Attachment
from service.synthesis.synthesizer import AdapterRecipe, Synthesizer
from training.evaluation.boxes import find_boxes
from training.tasks.detection_task import DetectionData, DetectionTask

SHOWN_TASKS = 5
SHOWN_SCORE = 0.3
"""Boxes below this score are not drawn."""


def draw_comparison(
    synthesizer: Synthesizer, base: BaseModel, data: DetectionData, path: Path
) -> None:
    """Draws a row per task: the first test scene with its object, under each method.

    The scene is the first one in order, not a chosen one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = choose_tasks(data)
    columns = ("base model", "soup", "generated adapter")
    figure, grid = pyplot.subplots(
        len(columns), len(tasks), figsize=(3.1 * len(tasks), 9.6), layout="constrained"
    )
    attachment = Attachment(base.model, synthesizer.bundle.bases)
    for column, task in enumerate(tasks):
        prompt = task.heldout_descriptions[0]
        scene = find_scene(data, task)
        pixels = data.test.read_pixels(scene)
        pictures = base.processor.image_processor([pixels], return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            features = base.model.model.vision_tower(pictures).last_hidden_state
        recipe = AdapterRecipe.build(task=prompt, bundle_digest=synthesizer.bundle.digest)
        vectors = (
            None,
            synthesizer.bundle.normalizer.mean,
            synthesizer.synthesize(recipe).vector.float(),
        )
        for row, vector in enumerate(vectors):
            found = find_boxes(base, attachment, vector, features, prompt)[0]
            _draw_boxes(grid[row][column], pixels, found)
            if row == 0:
                grid[row][column].set_title(prompt, fontsize=9)
            if column == 0:
                grid[row][column].set_ylabel(columns[row])
    attachment.detach(base.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


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
