"""From a picture and a prompt to boxes: the decoding of Florence-2's location tokens.

The confidence of a box is `P(it begins) * mean over its four sides of the mass near the side`:
how sure the model is that there is one more object, times how sure it is where. "Near" is
within `NEAR_BINS` thousandths of the image, because a side that is off by that much is right.
`P(it begins)` is one minus the probability of the end where a box follows directly, and the
product of its label's tokens where the model writes one. Both come from the raw softmax, before
any constraint or beam, so that a threshold means the same for every way of decoding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from service.inference.base_model import BaseModel
from service.inference.embedded_detector import NUM_BINS, EmbeddedDetector

NEAR_BINS = 16
MAX_LABEL_TOKENS = 12
"""Florence-2: tokens of an object's name at most, beside its four location tokens."""


@dataclass(frozen=True)
class LocatedBox:
    """One detected object.

    Attributes:
        x1: left side, as a fraction of the image's width.
        y1: upper side, as a fraction of its height.
        x2: right side.
        y2: lower side.
        score: confidence, 0 to 1.
        label: what the model called it; empty where it wrote nothing.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    score: float
    label: str


def decode_boxes(
    base: BaseModel,
    inputs: Mapping[str, Any],
    *,
    num_beams: int = 1,
    max_boxes: int = 16,
) -> list[list[LocatedBox]]:
    """Boxes of every picture of a batch, in the order in which the model wrote them.

    Whatever adapters are attached take part: one row per picture, repeated for its beams.

    Args:
        base: a detection base.
        inputs: of the model's `generate`: what the processor made, on the model's device, or
            `encoder_outputs` with their `attention_mask`.
        num_beams: 1 is greedy.
        max_boxes: most boxes per picture.

    Returns:
        A list per picture. Where an adapter drove the model out of range it is one box of NaN.
    """
    model: Any = base.model
    tokens = BoxTokens.of(base)
    is_embedded = isinstance(model, EmbeddedDetector)
    processors = LogitsProcessorList()
    if is_embedded:
        processors.append(BoxGrammar(tokens, model.config.stop_probability))
    per_box = 4 if is_embedded else 4 + MAX_LABEL_TOKENS
    limit: int = model.config.text_config.max_position_embeddings
    with torch.inference_mode():
        output: Any = model.generate(
            **inputs,
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=min(max_boxes * per_box + 1, limit),
            logits_processor=processors,
            return_dict_in_generate=True,
            output_logits=True,
        )
        chosen, probabilities = trace_probabilities(output, num_beams)
    return [
        list(read_boxes(row.tolist(), table, tokens, base.tokenizer))[:max_boxes]
        for row, table in zip(chosen, probabilities, strict=True)
    ]


@dataclass(frozen=True)
class BoxTokens:
    """The tokens that boxes are written with: `<loc_0>` to `<loc_999>`, start, padding, end."""

    first_location: int
    bos_id: int
    pad_id: int
    eos_id: int

    @classmethod
    def of(cls, base: BaseModel) -> "BoxTokens":
        """Those of a base's tokenizer."""
        tokenizer = base.tokenizer
        first: int = tokenizer.convert_tokens_to_ids("<loc_0>")
        return cls(first, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)

    def bin_of(self, token: int) -> int | None:
        """Location bin of a token, None for any other token."""
        number = token - self.first_location
        return number if 0 <= number < NUM_BINS else None


class BoxGrammar(LogitsProcessor):
    """Answers of the embedded detector: four location tokens a box, an end between boxes.

    Its training smooths location targets over many bins, which flattens their peaks: the end
    would win by argmax long before it is likely. So it ends where `P(end)` exceeds a threshold,
    and only there.
    """

    def __init__(self, tokens: BoxTokens, stop_probability: float) -> None:
        self._tokens = tokens
        self._stop_probability = stop_probability

    def __call__(
        self, input_ids: Int[Tensor, "rows length"], scores: Float[Tensor, "rows vocabulary"]
    ) -> Float[Tensor, "rows vocabulary"]:
        """Leaves only what may come next."""
        first, eos = self._tokens.first_location, self._tokens.eos_id
        allowed = torch.full_like(scores, -torch.inf)
        locations = slice(first, first + NUM_BINS)
        allowed[:, locations] = scores[:, locations]
        if (input_ids.shape[1] - 1) % 4 == 0:  # behind the start token or a whole box
            # Beam search hands over log-probabilities, greedy search logits: both normalise.
            ends = scores.softmax(-1)[:, eos] > self._stop_probability
            allowed[ends] = -torch.inf
            allowed[ends, eos] = 0.0
        return allowed


def trace_probabilities(
    output: Any, num_beams: int
) -> tuple[Int[Tensor, "rows length"], Float[Tensor, "rows length vocabulary"]]:
    """Generated tokens, and the model's own distribution at each of them.

    With beams the winner's history lies in other rows of the earlier steps: `beam_indices`
    names them.
    """
    logits = torch.stack(output.logits, dim=1)  # [rows * beams, length, vocabulary]
    length = logits.shape[1]
    chosen = output.sequences[:, 1 : 1 + length]  # behind the decoder's start token
    if num_beams > 1:
        beams = output.beam_indices[:, : chosen.shape[1]].clamp_min(0)
        steps = torch.arange(beams.shape[1], device=beams.device)
        logits = logits[beams, steps]
    return chosen, logits[:, : chosen.shape[1]].float().softmax(-1)


def read_boxes(
    tokens: Sequence[int],
    probabilities: Float[Tensor, "length vocabulary"],
    vocabulary: BoxTokens,
    tokenizer: Any,
) -> Iterator[LocatedBox]:
    """Yields the boxes of one answer with their confidences.

    Florence-2 writes `name <loc_x1> <loc_y1> <loc_x2> <loc_y2>`; several boxes may follow one
    name. What is not a name with four location tokens is skipped, as in its own processor.
    """
    if not torch.isfinite(probabilities).all():
        yield LocatedBox(math.nan, math.nan, math.nan, math.nan, score=math.nan, label="")
        return
    name: list[int] = []
    presence, label = 1.0, ""
    sides: list[tuple[int, int]] = []  # (bin, position)
    for position, token in enumerate(tokens):
        if token in (vocabulary.eos_id, vocabulary.pad_id):
            break
        if token == vocabulary.bos_id:
            continue
        number = vocabulary.bin_of(token)
        if number is None:
            if not name:
                presence = 1.0
            name.append(token)
            presence *= float(probabilities[position, token])
            sides = []
            continue
        if not sides:
            if name:
                label = tokenizer.decode(name).strip()
                name = []
            else:
                presence = 1.0 - float(probabilities[position, vocabulary.eos_id])
        sides.append((number, position))
        if len(sides) == 4:
            yield _build_box(sides, presence, label, probabilities, vocabulary)
            sides = []


def _build_box(
    sides: Sequence[tuple[int, int]],
    presence: float,
    label: str,
    probabilities: Float[Tensor, "length vocabulary"],
    vocabulary: BoxTokens,
) -> LocatedBox:
    """Each side is the mean of the bins near its token, weighted by their probabilities."""
    first = vocabulary.first_location
    values, masses = [], []
    for number, position in sides:
        low, high = max(0, number - NEAR_BINS), min(NUM_BINS, number + NEAR_BINS + 1)
        near = probabilities[position, first + low : first + high]
        mass = float(near.sum())
        centers = torch.arange(low, high, device=near.device) + 0.5
        values.append(float((near * centers).sum()) / max(mass, 1e-9) / NUM_BINS)
        masses.append(mass)
    x1, y1, x2, y2 = values
    score = min(1.0, presence * sum(masses) / 4)
    return LocatedBox(x1, y1, x2, y2, score=score, label=label)
