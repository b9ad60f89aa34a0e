"""Task vectors from example images where no CLIP image tower can be had."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from service.errors import InvalidBundleError, InvalidInputError
from service.synthesis.backbone import ARCHITECTURE, IMAGE_PIXELS, build_backbone
from service.synthesis.task_encoder import OpenClipImageEncoder, TaskEncoder

if TYPE_CHECKING:
    from PIL.Image import Image

TOP_CLASSES = 10
PROMPT = "Detect the {name} in the image."


@runtime_checkable
class ImageEncoder(Protocol):
    """Turns example images into a unit task vector; `encoder_id` names model and weights."""

    encoder_id: str

    def encode_examples(self, images: Sequence["Image"]) -> Float[Tensor, " dim"]:
        """One task vector, L2-normalised, float32, on the CPU."""
        ...


def build_image_encoder(spec: Mapping[str, Any], text_encoder: TaskEncoder) -> ImageEncoder | None:
    """The image encoder of a bundle's `encoder_spec`; None for bundles that take no images.

    Raises:
        InvalidBundleError: the kind is unknown.
    """
    match spec:
        case {"kind": "open_clip_image"}:
            assert isinstance(text_encoder, OpenClipImageEncoder)
            return text_encoder
        case {"images": "conse"}:
            return ConseImageEncoder(text_encoder)
        case {"images": str(kind)} if kind:
            raise InvalidBundleError(f"image encoder {kind!r} is unknown: conse")
        case _:
            return None


class ConseImageEncoder:
    """Images as words: a stand-in for CLIP's image tower.

    ConSE (Norouzi et al. 2013): `v = sum_k p_k t_k`, the text encoder's vectors `t` of the `k`
    most probable ImageNet classes, weighted by their probabilities `p`; here `t` is of a whole
    prompt, so that the vectors lie where those of task descriptions do. Several images give the
    mean of their vectors.

    Args:
        text_encoder: the bundle's encoder of words.

    Raises:
        MissingDependencyError: the package with the classifier's weights is not installed.
    """

    def __init__(self, text_encoder: TaskEncoder) -> None:
        from timm.data.imagenet_info import ImageNetInfo

        self._text_encoder = text_encoder
        self._classifier = build_backbone()
        info = ImageNetInfo()
        self._names = [info.index_to_description(i).split(",")[0] for i in range(1000)]
        self._vectors: dict[int, Tensor] = {}
        self.encoder_id = f"conse/{ARCHITECTURE}/{text_encoder.encoder_id}"

    def encode_examples(self, images: Sequence["Image"]) -> Float[Tensor, " dim"]:
        """One task vector from example images.

        Raises:
            InvalidInputError: no images.
        """
        if not images:
            raise InvalidInputError("a task by example needs at least one image")
        total = torch.zeros(self._text_encoder.dim)
        for image in images:
            top = self._classify(image).topk(TOP_CLASSES)
            weights = top.values / top.values.sum()
            total += weights @ torch.stack([self._vector(i) for i in top.indices.tolist()])
        return functional.normalize(total, dim=0)

    def _classify(self, image: "Image") -> Float[Tensor, " classes"]:
        small = image.convert("RGB").resize((IMAGE_PIXELS, IMAGE_PIXELS))
        pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(1, IMAGE_PIXELS, IMAGE_PIXELS, 3).permute(0, 3, 1, 2)
        with torch.inference_mode():
            logits = self._classifier((pixels.float() / 255 - 0.5) / 0.5)
        return logits[0].softmax(0)  # type: ignore[no-any-return]

    def _vector(self, number: int) -> Float[Tensor, " dim"]:
        """Vector of a class's name, encoded once."""
        if number not in self._vectors:
            words = PROMPT.format(name=self._names[number])
            self._vectors[number] = self._text_encoder.encode([words])[0]
        return self._vectors[number]
