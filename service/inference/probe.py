"""What the base's adapted linears see for a short prompt: the measure of an adapter's effect."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from service.adapters.validity import Probe
from service.inference.base_model import BaseModel
from service.synthesis.layout import AdapterLayout

_TEXT = "The first thing that I would like to say about this is"
_PICTURE_PROMPT = "Locate the objects in the image."
_MAX_TOKENS = 16
"""Tokens kept of each module's input, evenly spread."""


def capture_probe(base: BaseModel, layout: AdapterLayout) -> Probe:
    """Runs the base once, without adapters.

    Args:
        base: not (yet) wrapped for adapters.
        layout: names the modules.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, float] = {}

    def keep(path: str) -> Any:
        def hook(_: object, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen = args[0].flatten(0, -2)
            stride = max(1, len(seen) // _MAX_TOKENS)
            inputs[path] = seen[::stride][:_MAX_TOKENS].float().cpu()
            said = output.flatten(0, -2)[::stride][:_MAX_TOKENS]
            outputs[path] = float(said.float().norm())

        return hook

    hooks = [
        base.model.get_submodule(module.path).register_forward_hook(keep(module.path))
        for module in layout.modules
    ]
    try:
        with torch.inference_mode():
            base.model(**_build_inputs(base), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Probe(inputs, outputs)


def _build_inputs(base: BaseModel) -> dict[str, Tensor]:
    if base.modality == "text":
        ids = base.tokenizer(_TEXT)["input_ids"]
        return {"input_ids": torch.tensor([ids], device=base.device)}
    picture = Image.linear_gradient("L").convert("RGB")
    inputs = base.processor(images=[picture], text=[_PICTURE_PROMPT], return_tensors="pt")
    start = base.model.config.text_config.decoder_start_token_id
    return {
        "input_ids": inputs["input_ids"].to(base.device),
        "attention_mask": inputs["attention_mask"].to(base.device),
        "pixel_values": inputs["pixel_values"].to(base.device, base.dtype),
        "decoder_input_ids": torch.tensor([[start]], device=base.device),
    }
