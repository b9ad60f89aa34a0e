"""Prompted scenes that a detection adapter is fine-tuned on."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.errors import InvalidTaskDataError
from service.inference.base_model import BaseModel
from training.adapters import MeasureLoss
from training.box_objective import (
    BoxVocabulary,
    SmoothedBoxLoss,
    build_box_batch,
    run_detector,
)
from training.recipe import DetectionSection
from training.tasks.detection_task import DetectionData, DetectionTask, SceneSource

ENCODED_TOGETHER = 16
"""Pictures that the image tower encodes in one batch."""


@dataclass(frozen=True)
class PromptedScenes:
    """A task's training examples: which scene, asked for in which words.

    Attributes:
        scenes: scene of each example.
        prompts: words of each example.
    """

    scenes: Int[Tensor, " examples"]
    prompts: tuple[str, ...]


def draw_examples(
    task: DetectionTask,
    tasks: Sequence[DetectionTask],
    source: SceneSource,
    section: DetectionSection,
    num_examples: int,
    seed: int,
    unseen: Collection[str] = (),
) -> PromptedScenes:
    """Draws scenes with and without the task's object, and prompts.

    Whatever the prompt, the answer is the task's own objects: it is the adapter that says what
    to look for. So a share of the prompts are other tasks' words, and the scenes without the
    object show those of other tasks, known and unknown to the base; an adapter that boxes
    whatever is unfamiliar is wrong on them. Of unseen tasks nothing is drawn, neither their words
    nor scenes with their objects: such a scene would teach that the object is none to box.

    Raises:
        InvalidTaskDataError: no scene holds the object.
    """
    random = torch.Generator().manual_seed(seed)
    present: list[int] = []
    absent: list[int] = []
    for number, scene in enumerate(source.objects):
        names = {each.category for each in scene}
        if names.isdisjoint(unseen):
            (present if task.name in names else absent).append(number)
    if not present:
        raise InvalidTaskDataError(f"no training scene holds an object of task {task.name!r}")
    num_present = round(num_examples * (section.present_share if absent else 1.0))
    scenes = [
        *_draw(present, num_present, random),
        *_draw(absent, num_examples - num_present, random),
    ]
    known = [other for other in tasks if other is not task and other.name not in unseen]
    others = [words for other in known for words in other.descriptions]
    prompts = []
    for _ in scenes:
        is_own = not others or float(torch.rand((), generator=random)) < section.own_prompt_share
        pool: Sequence[str] = task.descriptions if is_own else others
        prompts.append(pool[int(torch.randint(len(pool), (), generator=random))])
    return PromptedScenes(torch.tensor(scenes), tuple(prompts))


def build_detection_loss(
    base: BaseModel,
    task: DetectionTask,
    data: DetectionData,
    section: DetectionSection,
    *,
    num_examples: int,
    seed: int,
    unseen: Collection[str] = (),
) -> MeasureLoss:
    """Loss of a batch of a task's examples, for `fine_tune`.

    Args:
        base: frozen detection base, wrapped by the adapters' attachment.
        task: what to find.
        data: the tasks and scenes that it is one of.
        section: how examples are drawn.
        num_examples: of an epoch.
        seed: of the drawing.
        unseen: tasks that nothing is drawn of.

    Raises:
        InvalidTaskDataError: no scene holds the object.
    """
    source = data.train
    examples = draw_examples(task, data.tasks, source, section, num_examples, seed, unseen)
    stored = _read_stored(source)
    if stored is not None:  # a copy a task would be gigabytes
        features, places = stored, examples.scenes
    else:
        drawn, places = torch.unique(examples.scenes, return_inverse=True)
        features = encode_scenes(base, source, drawn.tolist())
    # Fused attention is the slower one on a CPU: its backward pass takes half of a step.
    base.model.model.language_model.set_attn_implementation("eager")
    vocabulary = BoxVocabulary.of(base.model, base.processor)
    loss_function = SmoothedBoxLoss(vocabulary, section.smoothing_bins)
    tokenizer = base.tokenizer
    label = tokenizer(task.label, add_special_tokens=False)["input_ids"]
    prompts: list[list[int]] = tokenizer(list(examples.prompts), add_special_tokens=False)[
        "input_ids"
    ]

    def measure(numbers: Tensor) -> Tensor:
        chosen = examples.scenes[numbers]
        batch = build_box_batch(
            vocabulary,
            [prompts[i] for i in numbers.tolist()],
            [
                [each.box for each in source.objects[scene] if each.category == task.name]
                for scene in chosen.tolist()
            ],
            label,
        ).to(base.device)
        pictures = features[places[numbers]].to(base.device, base.dtype)
        with torch.autocast(base.device.type, torch.bfloat16):
            logits, _ = run_detector(base.model, pictures, batch)
        return loss_function(logits, batch.labels)

    return measure


def encode_scenes(
    base: BaseModel, source: SceneSource, numbers: Sequence[int]
) -> Float[Tensor, "scenes features rows columns"]:
    """The frozen image tower's features of some scenes, float16; read where they are stored."""
    stored = _read_stored(source)
    if stored is not None:
        return stored[torch.tensor(numbers)]
    parts = []
    for start in range(0, len(numbers), ENCODED_TOGETHER):
        pictures = [source.read_pixels(i) for i in numbers[start : start + ENCODED_TOGETHER]]
        pixels = base.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            hidden = base.model.model.vision_tower(pixels.to(base.device, base.dtype))
        parts.append(hidden.last_hidden_state.half().cpu())
    return torch.cat(parts)


def _read_stored(
    source: SceneSource,
) -> Float[Tensor, "scenes features rows columns"] | None:
    """Features of all scenes of a source that keeps them; None of one that does not."""
    stored: Any = getattr(source, "stored", None)
    return None if stored is None else stored.features


def _draw(pool: Sequence[int], count: int, random: torch.Generator) -> list[int]:
    """So many of the pool: each once before any comes twice."""
    drawn: list[int] = []
    while len(drawn) < count:
        drawn += [pool[i] for i in torch.randperm(len(pool), generator=random).tolist()]
    return drawn[:count]
