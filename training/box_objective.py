"""Boxes as location tokens, and the loss that detectors and their adapters are trained with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from service.inference.embedded_detector import NUM_BINS, EmbeddedDetector
from training.tasks.detection_task import Box

IGNORED = -100


@dataclass(frozen=True)
class BoxVocabulary:
    """How a detector writes boxes.

    Attributes:
        first_location: token of `<loc_0>`; the others follow it.
        bos_id: begins the prompt.
        eos_id: ends the prompt and the answer, and starts the decoder.
        pad_id: fills up prompts.
        image_id: stands for an image token in the prompt.
        image_tokens: number of those.
        writes_labels: Florence-2 writes the object's name before its box, and begins its answer
            with `<s>`; the embedded detector writes boxes alone.
    """

    first_location: int
    bos_id: int
    eos_id: int
    pad_id: int
    image_id: int
    image_tokens: int
    writes_labels: bool

    @classmethod
    def of(cls, model: Any, processor: Any) -> "BoxVocabulary":
        """The vocabulary of a Florence-2 or an embedded detector."""
        tokenizer = processor.tokenizer
        first, last = tokenizer.convert_tokens_to_ids(["<loc_0>", f"<loc_{NUM_BINS - 1}>"])
        assert last == first + NUM_BINS - 1, "location tokens are not in a row"
        return cls(
            first,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            processor.image_token_id,
            processor.num_image_tokens,
            not isinstance(model, EmbeddedDetector),
        )


@dataclass(frozen=True)
class BoxBatch:
    """Inputs and targets of one training step.

    Attributes:
        input_ids: image tokens, then the prompt.
        attention_mask: 0 where `input_ids` is padding.
        labels: answer tokens, `IGNORED` where padding.
    """

    input_ids: Int[Tensor, "batch length"]
    attention_mask: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch answer"]

    def to(self, device: torch.device) -> "BoxBatch":
        """The same on a device."""
        return BoxBatch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device)
        )


def build_box_batch(
    vocabulary: BoxVocabulary,
    prompts: Sequence[Sequence[int]],
    boxes: Sequence[Sequence[Box]],
    label: Sequence[int] = (),
) -> BoxBatch:
    """Pads prompts and writes boxes, from left to right, as location tokens.

    Args:
        vocabulary: of the detector.
        prompts: tokens of each row's prompt, without special ones.
        boxes: of each row.
        label: tokens of the objects' name, for detectors that write it.
    """
    rows = [
        [*[vocabulary.image_id] * vocabulary.image_tokens, vocabulary.bos_id, *p, vocabulary.eos_id]
        for p in prompts
    ]
    input_ids = _pad(rows, vocabulary.pad_id)
    answers = []
    for row in boxes:
        answer = [vocabulary.bos_id] if vocabulary.writes_labels else []
        for box in sorted(row, key=lambda each: each[0] + each[2]):
            answer += [*(label if vocabulary.writes_labels else ())]
            answer += [vocabulary.first_location + bin_of(side) for side in box]
        answers.append([*answer, vocabulary.eos_id])
    return BoxBatch(input_ids, (input_ids != vocabulary.pad_id).long(), _pad(answers, IGNORED))


def bin_of(fraction: float) -> int:
    """Location bin of a coordinate (Florence-2's quantisation: floor)."""
    return min(max(int(fraction * NUM_BINS), 0), NUM_BINS - 1)


def run_detector(
    model: Any, features: Float[Tensor, "batch features rows columns"], batch: BoxBatch
) -> tuple[Float[Tensor, "batch answer vocabulary"], Float[Tensor, "batch length width"]]:
    """Logits of every answer token, and the encoder's output, from features of the image tower.

    Args:
        model: Florence-2 or embedded detector, perhaps with adapters attached.
        features: `last_hidden_state` of its `vision_tower`.
        batch: prompts and answers.
    """
    embeds = embed_inputs(model, features, batch)
    start = torch.full_like(batch.labels[:, :1], model.config.text_config.decoder_start_token_id)
    shifted = torch.cat([start, batch.labels[:, :-1]], dim=1)
    shifted = shifted.masked_fill(shifted == IGNORED, model.config.text_config.pad_token_id)
    output = model(
        inputs_embeds=embeds,
        attention_mask=batch.attention_mask,
        decoder_input_ids=shifted,
        use_cache=False,
    )
    return output.logits, output.encoder_last_hidden_state


def embed_inputs(
    model: Any, features: Float[Tensor, "batch features rows columns"], batch: BoxBatch
) -> Float[Tensor, "batch length width"]:
    """The encoder's input: the prompt's embeddings with the projected image tokens in them."""
    embeds: Tensor = model.model.get_input_embeddings()(batch.input_ids)
    tokens = model.model.multi_modal_projector(features).to(embeds.dtype)
    is_image = (batch.input_ids == model.config.image_token_id)[..., None].expand_as(embeds)
    return embeds.masked_scatter(is_image, tokens)


class SmoothedBoxLoss:
    """Cross-entropy whose location targets are Gaussians over neighbouring bins.

    A box that is off by a few bins is nearly right; the smoothing says so. Other tokens have
    the usual one-hot target. A row's loss is the mean over its tokens, so that rows without
    objects, whose answer is one token, weigh as much as others.

    Args:
        vocabulary: of the detector.
        std_bins: standard deviation of the Gaussian in bins; 0 is one-hot.
    """

    def __init__(self, vocabulary: BoxVocabulary, std_bins: float) -> None:
        self._first = vocabulary.first_location
        bins = torch.arange(NUM_BINS).float()
        distance = bins[:, None] - bins[None]
        weights = torch.exp(-0.5 * (distance / max(std_bins, 1e-3)).square())
        self._targets = weights / weights.sum(1, keepdim=True)  # [bins, bins]

    def __call__(
        self,
        logits: Float[Tensor, "batch answer vocabulary"],
        labels: Int[Tensor, "batch answer"],
    ) -> Float[Tensor, ""]:
        """Loss in nats per token."""
        log_probabilities = functional.log_softmax(logits.float(), dim=-1)
        is_token = labels != IGNORED
        safe = labels.clamp_min(0)
        nll = -log_probabilities.gather(-1, safe[..., None])[..., 0]
        is_location = is_token & (labels >= self._first) & (labels < self._first + NUM_BINS)
        targets = self._targets.to(logits.device)[labels[is_location] - self._first]
        located = log_probabilities[is_location][:, self._first : self._first + NUM_BINS]
        nll = nll.masked_scatter(is_location, -(targets * located).sum(-1))
        per_row = (nll * is_token).sum(1) / is_token.sum(1)
        return per_row.mean()


def _pad(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "rows length"]:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
