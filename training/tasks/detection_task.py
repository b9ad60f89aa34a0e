"""Detection tasks: what an object is called, and the scenes to learn it from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import UInt8
from torch import Tensor

from training.tasks.text_task import Wordings, check_wordings

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 as fractions of the image."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object of a scene.

    Attributes:
        category: its category; distractors have none and are not annotated.
        instance: what tells one object from another, for statistics over instances.
        box: where it is.
    """

    category: str
    instance: str
    box: Box


@dataclass(frozen=True, slots=True)
class DetectionTask:
    """One category to detect: people's words for it.

    Attributes:
        name: identifier, and the category of its annotations.
        title: what tables and figures call it.
        descriptions: wordings that the generator is trained on; also the prompts of fine-tuning.
        heldout_descriptions: wordings that it is never trained on; evaluation uses the first.
    """

    name: str
    title: str
    descriptions: tuple[str, ...]
    heldout_descriptions: tuple[str, ...]

    @property
    def label(self) -> str:
        """What a detector that writes labels calls the object."""
        return self.name.replace("_", " ")

    def __post_init__(self) -> None:
        check_wordings(
            f"detection task {self.name!r}", self.descriptions, self.heldout_descriptions
        )


def build_detection_task(name: str, wordings: Wordings) -> DetectionTask:
    """Join a category with its wordings.

    Raises:
        InvalidTaskDataError: a held-out wording is a training wording.
    """
    return DetectionTask(name, wordings.title, wordings.descriptions, wordings.heldout_descriptions)


@runtime_checkable
class SceneSource(Protocol):
    """Pictures with annotations, of any origin."""

    @property
    def objects(self) -> Sequence[tuple[Annotation, ...]]:
        """Annotations of each scene."""
        ...

    def read_pixels(self, index: int) -> UInt8[Tensor, "3 height width"]:
        """Picture of one scene, at its own size."""
        ...


@dataclass(frozen=True)
class DetectionData:
    """Tasks and the scenes that they share.

    Attributes:
        tasks: the categories.
        train: scenes for fine-tuning.
        validation: scenes for choices; never for results.
        test: scenes for results.
    """

    tasks: tuple[DetectionTask, ...]
    train: SceneSource
    validation: SceneSource
    test: SceneSource
