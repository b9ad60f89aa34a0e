"""The embedded detector: a Florence-2 that a CPU can train and serve.

It is transformers' Florence-2 with two parts exchanged: the DaViT image tower by a frozen
EfficientNet-Lite0, and the projector by one of a 7 x 7 grid. Prompt, BART encoder-decoder and
location tokens `<loc_0>` to `<loc_999>` are as in the original, and so is all code around it.
The tower's ImageNet weights come from a package and are not saved with the model.
"""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import Florence2Config, Florence2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from service.errors import InvalidInputError
from service.synthesis.backbone import build_backbone

MODEL_TYPE = "icm_embedded_detector"
GRID = 7
"""The image is read as `GRID x GRID` tokens."""

FEATURES = 4 * 112 + 320
"""Channels of a token: stride 16, its 2 x 2 cells side by side, and stride 32."""

NUM_BINS = 1000
"""Location tokens per axis, as in Florence-2."""


class EmbeddedDetectorConfig(Florence2Config):
    """Florence-2's configuration; its `vision_config` is of the tower that is exchanged.

    Attributes:
        stop_probability: an answer ends where the end is more probable than this.
    """

    model_type = MODEL_TYPE
    stop_probability: float = 0.5


class EfficientNetTower(nn.Module):
    """Frozen EfficientNet-Lite0 features on the grid.

    Pictures go through one at a time, in bfloat16 with channels last: what a picture gives is
    then the same whatever it is batched with, here, in training and in serving.
    """

    def __init__(self) -> None:
        super().__init__()
        network = build_backbone(features_only=True, out_indices=(3, 4))
        self.network = network.to(dtype=torch.bfloat16, memory_format=torch.channels_last)

    def forward(
        self, pixel_values: Float[Tensor, "batch 3 height width"], **_: Any
    ) -> BaseModelOutputWithPooling:
        """`last_hidden_state` is `[batch, FEATURES, GRID, GRID]`."""
        pixels = pixel_values.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            grids = [self._read_one(pixels[i : i + 1]) for i in range(len(pixels))]
        return BaseModelOutputWithPooling(last_hidden_state=torch.cat(grids))

    def _read_one(self, pixels: Float[Tensor, "1 3 height width"]) -> Tensor:
        middle, coarse = self.network(pixels)  # [1, 112, 14, 14], [1, 320, 7, 7]
        return torch.cat([functional.pixel_unshuffle(middle, 2), coarse], dim=1).float()


class GridProjector(nn.Module):
    """Standardises the tower's features, projects them to the model's width, adds positions."""

    feature_mean: Tensor
    feature_std: Tensor
    positions: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(FEATURES))
        self.register_buffer("feature_std", torch.ones(FEATURES))
        self.register_buffer("positions", encode_grid(width), persistent=False)
        self.image_projection = nn.Linear(FEATURES, width)
        self.image_proj_norm = nn.LayerNorm(width)

    def forward(
        self, features: Float[Tensor, "batch features rows columns"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Image tokens, row by row."""
        tokens = features.flatten(2).mT.to(self.image_projection.weight.dtype)
        tokens = (tokens - self.feature_mean) / self.feature_std
        projected: Tensor = self.image_proj_norm(self.image_projection(tokens) + self.positions)
        return projected


class EmbeddedDetector(Florence2ForConditionalGeneration):
    """Florence-2 with the EfficientNet tower; built by `build_embedded_detector`."""

    config_class = EmbeddedDetectorConfig

    def __init__(self, config: EmbeddedDetectorConfig) -> None:
        super().__init__(config)
        del self.model.vision_tower, self.model.multi_modal_projector
        self.model.multi_modal_projector = GridProjector(self.lm_head.in_features)
        self.model.vision_tower = EfficientNetTower()  # last: the first tensor tells the dtype


def encode_grid(width: int) -> Float[Tensor, "tokens width"]:
    """Sinusoidal positions of the grid's cells: half the channels for y, half for x."""
    centers = (torch.arange(GRID) + 0.5) / GRID
    waves = encode_positions(centers, width // 2)
    rows = waves[:, None].expand(-1, GRID, -1)
    columns = waves[None].expand(GRID, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def encode_positions(
    positions: Float[Tensor, " count"], width: int
) -> Float[Tensor, "count width"]:
    """Fourier features of positions from 0 to 1: sine and cosine at `width / 2` frequencies."""
    frequencies = torch.logspace(0, 2.0, width // 2, base=10.0) * torch.pi / 2
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def build_embedded_detector(
    tokenizer: Any, *, width: int, layers: int, heads: int, feed_forward: int
) -> EmbeddedDetector:
    """An untrained detector, its tower with ImageNet weights.

    Raises:
        MissingDependencyError: the package with the tower's weights is not installed.
    """
    text = {
        "model_type": "bart",
        "vocab_size": len(tokenizer),
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "encoder_ffn_dim": feed_forward,
        "decoder_ffn_dim": feed_forward,
        "activation_function": "relu",
        "max_position_embeddings": 256,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.eos_token_id,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
        "scale_embedding": False,
    }
    vision = {  # of the original tower, which is exchanged: as small as it can be
        "depths": (1,),
        "patch_size": (7,),
        "patch_stride": (4,),
        "patch_padding": (3,),
        "patch_prenorm": (False,),
        "embed_dim": (8,),
        "num_heads": (1,),
        "num_groups": (1,),
        "projection_dim": width,
    }
    config = EmbeddedDetectorConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    return EmbeddedDetector(config)


def save_embedded_detector(folder: Path, model: EmbeddedDetector, processor: Any) -> None:
    """Writes config, float16 weights without the tower, and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    half = {
        name: tensor.detach().half().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not _is_derived(name)
    }
    save_file(half, folder / "model.safetensors", metadata={"format": "pt"})


def load_embedded_detector(folder: Path) -> tuple[EmbeddedDetector, Any]:
    """Reads `save_embedded_detector`: the model, float32 in eval mode, and its processor.

    Raises:
        MissingDependencyError: the package with the tower's weights is not installed.
        InvalidInputError: the folder's weights are not those of its configuration.
    """
    from transformers import CLIPImageProcessor, Florence2Processor, PreTrainedTokenizerFast

    fields = json.loads((folder / "config.json").read_text())
    fields.pop("model_type")
    model = EmbeddedDetector(EmbeddedDetectorConfig(**fields))
    state = {
        name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if not _is_derived(name)]
    if missing or result.unexpected_keys:
        raise InvalidInputError(
            f"{folder} does not hold the weights of its configuration: "
            f"{sorted([*missing, *result.unexpected_keys])[:4]}"
        )
    images = CLIPImageProcessor.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model.eval()  # type: ignore[no-untyped-call]
    return model, Florence2Processor(images, tokenizer)


def _is_derived(name: str) -> bool:
    """Whether a tensor is the tower's, or tied to `model.language_model.shared.weight`."""
    tied = ("lm_head.weight", "embed_tokens.weight")
    return name.startswith("model.vision_tower.") or name.endswith(tied)
