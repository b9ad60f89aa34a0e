"""Detections of many scenes under one adapter, from stored features of the image tower."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from service.inference.base_model import BaseModel
from service.inference.box_decoding import LocatedBox, decode_boxes
from service.synthesis.attachment import Attachment
from training.box_objective import BoxVocabulary, build_box_batch, embed_inputs

BATCH_SCENES = 50
MAX_BOXES = 6


def find_boxes(
    base: BaseModel,
    attachment: Attachment,
    vector: Float[Tensor, " num_params"] | None,
    features: Float[Tensor, "scenes features rows columns"],
    prompt: str,
) -> list[list[LocatedBox]]:
    """Boxes of every scene for one prompt, greedy, as the service finds them.

    Args:
        base: detection base, wrapped by `attachment`.
        attachment: where the adapter is put.
        vector: adapter, None for the base alone.
        features: of the image tower.
        prompt: the same for all scenes.
    """
    vocabulary = BoxVocabulary.of(base.model, base.processor)
    words: list[int] = base.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    attachment.rows.vectors = None if vector is None else vector[None].to(base.device, base.dtype)
    found: list[list[LocatedBox]] = []
    for part in torch.split(features, BATCH_SCENES):
        batch = build_box_batch(vocabulary, [words] * len(part), [[]] * len(part))
        batch = batch.to(base.device)
        with torch.inference_mode():
            embeds = embed_inputs(base.model, part.to(base.device, base.dtype), batch)
            encoded = base.model.model.language_model.encoder(
                inputs_embeds=embeds, attention_mask=batch.attention_mask
            )
        inputs: dict[str, Any] = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=encoded.last_hidden_state),
            "attention_mask": batch.attention_mask,
        }
        found += decode_boxes(base, inputs, max_boxes=MAX_BOXES)
    attachment.rows.vectors = None
    return found
