"""What a detection is asked for by, what it is, and how its boxes become pixels."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidAdapterError, InvalidInputError
from service.inference.box_decoding import LocatedBox

MAX_BEAMS = 5
MAX_BOXES = 64
LOCATIONS_PER_BOX = 4
MAX_LABEL_CHARACTERS = 80
MAX_TARGET_CHARACTERS = 400
"""A longer description is its own label."""

DIGITS = 2
"""Decimals of a pixel; further ones depend on what else was in the batch."""

_TARGET = re.compile(
    r"(?:please\s+)?(?:detect|find|locate|spot|mark|box|show|identify|highlight)\s+"
    r"(?:me\s+)?(?:(?:all|every|each|any)\s+)?(?:of\s+)?(?:(?:the|an?|this|that|these|those)\s+)?"
    r"(?P<target>\S.*?)"
    r"(?:\s+(?:in|on|from)\s+(?:the|this|that|my)\s+(?:image|picture|photo|photograph|scene))?"
    r"\s*[.!?]*",
    re.IGNORECASE,
)


@dataclass(frozen=True, eq=False)
class PreparedPicture:
    """An image as the model takes it.

    Attributes:
        pixel_values: resized and normalised.
        width: of the given image, in pixels.
        height: of the given image, in pixels.
    """

    pixel_values: Float[Tensor, "channels rows columns"]
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class DetectionRequest:
    """An image to find objects in, with an adapter or (no `adapter_id`) with the base model.

    Attributes:
        picture: what `DetectionEngine.prepare` made of the image.
        prompt: words that the model reads beside the image.
        label: what a box is called where the model itself writes no name.
        adapter_id: the adapter, None for the base model.
        vector: its values; not needed where it is sure to be in a slot.
        vector_sha256: where given, the slot's bytes are checked against it before and after.
        tenant: whose request this is; tenants take turns.
        num_beams: width of the beam search; 1 is greedy decoding.
        max_boxes: most boxes to find; the model's context may allow fewer.
        score_threshold: boxes that score less are left out.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    picture: PreparedPicture
    prompt: str
    label: str = ""
    adapter_id: str | None = None
    vector: Float[Tensor, " num_params"] | None = None
    vector_sha256: str | None = None
    tenant: str = "public"
    num_beams: int = 1
    max_boxes: int = 16
    score_threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_beams <= MAX_BEAMS:
            raise InvalidInputError(f"num_beams is {self.num_beams}: choose 1 to {MAX_BEAMS}")
        if not 1 <= self.max_boxes <= MAX_BOXES:
            raise InvalidInputError(f"max_boxes is {self.max_boxes}: choose 1 to {MAX_BOXES}")
        if not 0 <= self.score_threshold <= 1:
            raise InvalidInputError(f"score_threshold is {self.score_threshold}: choose 0 to 1")

    @property
    def work(self) -> int:
        """Steps that this takes: all boxes of a batch are found in one."""
        return 1


@dataclass(frozen=True)
class DetectedBox:
    """An object: `box` is `(x1, y1, x2, y2)` in pixels of the given image, within it."""

    box: tuple[float, float, float, float]
    label: str
    score: float


@dataclass(frozen=True)
class Detections:
    """What was found in an image.

    Attributes:
        boxes: by falling score; of equal scores by label, then by place.
        slot: slot of the bank that the adapter was taken from, 0 for the base.
        generation: number of the load that had filled the slot.
        seconds: `detect` is the duration of the batch; the scheduler adds `queue`.
    """

    boxes: tuple[DetectedBox, ...]
    slot: int
    generation: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def completion_tokens(self) -> int:
        """Location tokens of the boxes."""
        return LOCATIONS_PER_BOX * len(self.boxes)


def select_boxes(located: Sequence[LocatedBox], request: DetectionRequest) -> Iterator[DetectedBox]:
    """Boxes in pixels by falling score, clipped to the image; empty ones are dropped.

    Raises:
        InvalidAdapterError: a box or score is not finite.
    """
    width, height = request.picture.width, request.picture.height
    boxes = []
    for each in located:
        if not math.isfinite(each.x1 + each.y1 + each.x2 + each.y2 + each.score):
            raise InvalidAdapterError(
                "this adapter drives the base model's output out of range: "
                "generate it with a lower strength or temperature"
            )
        x1, x2 = (min(max(side * width, 0.0), float(width)) for side in (each.x1, each.x2))
        y1, y2 = (min(max(side * height, 0.0), float(height)) for side in (each.y1, each.y2))
        box = (round(x1, DIGITS), round(y1, DIGITS), round(x2, DIGITS), round(y2, DIGITS))
        score = round(each.score, 4)
        if box[0] < box[2] and box[1] < box[3] and score >= request.score_threshold:
            boxes.append(DetectedBox(box, each.label or request.label, score))
    yield from sorted(boxes, key=lambda box: (-box.score, box.label, box.box))


def label_of(description: str) -> str:
    """What a description asks for: "Detect the sofa in the image." is about "sofa".

    A description of another form is returned as it is, on one line and cut to 80 characters.
    """
    words = " ".join(description.split())
    is_short = len(words) <= MAX_TARGET_CHARACTERS  # matching takes time with the square of it
    match = _TARGET.fullmatch(words) if is_short else None
    return (words if match is None else match["target"])[:MAX_LABEL_CHARACTERS]
