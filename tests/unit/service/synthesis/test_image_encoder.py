"""Task vectors from example images by ConSE, with the real classifier and text encoder."""

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from service.errors import InvalidBundleError, InvalidInputError
from service.synthesis.image_encoder import (
    PROMPT,
    TOP_CLASSES,
    ConseImageEncoder,
    ImageEncoder,
    build_image_encoder,
)
from service.synthesis.task_encoder import EMBEDDED_MINILM, TaskEncoder, build_task_encoder

WORDS = {"kind": "open_clip_text", "model": EMBEDDED_MINILM}


@pytest.fixture(scope="module")
def words() -> TaskEncoder:
    return build_task_encoder(WORDS)


@pytest.fixture(scope="module")
def encoder(words: TaskEncoder) -> ConseImageEncoder:
    return ConseImageEncoder(words)


def draw_noise(seed: int, size: tuple[int, int] = (300, 200)) -> Image.Image:
    """Large blocks of random colours: pictures that the classifier takes for different things."""
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (6, 6, 3), dtype=torch.uint8, generator=random)
    return Image.fromarray(blocks.numpy(), "RGB").resize(size, Image.Resampling.NEAREST)


def draw_disc(colour: tuple[int, int, int]) -> Image.Image:
    """A shaded disc on white: a ball."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256), indexing="ij")
    light = (1 - ((x + 0.3).square() + (y + 0.3).square()) / 2).clamp(0.2, 1)
    pixels = light[..., None] * torch.tensor(colour)
    pixels[x.square() + y.square() > 0.6] = 255.0
    return Image.fromarray(pixels.to(torch.uint8).numpy(), "RGB")


def test_vectors_are_of_unit_length_and_the_same_every_time(
    encoder: ConseImageEncoder, words: TaskEncoder
) -> None:
    images = [draw_noise(0), draw_disc((250, 120, 20))]
    first, again = encoder.encode_examples(images), encoder.encode_examples(images)
    fresh = ConseImageEncoder(words).encode_examples(images)

    assert isinstance(encoder, ImageEncoder)
    assert first.shape == (words.dim,)
    assert first.dtype == torch.float32
    assert first.norm().item() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(first, again)
    assert torch.equal(first, fresh)


def test_it_is_the_weighted_mean_of_the_classes_words(
    encoder: ConseImageEncoder, words: TaskEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    probabilities = torch.zeros(1000)
    chosen = {1: 0.5, 281: 0.3, 954: 0.1}  # goldfish, tabby, banana
    for number, share in chosen.items():
        probabilities[number] = share
    monkeypatch.setattr(encoder, "_classify", lambda _image: probabilities)
    names = ("goldfish", "tabby", "banana")
    vectors = words.encode([PROMPT.format(name=name) for name in names])
    expected = functional.normalize(torch.tensor([0.5, 0.3, 0.1]) @ vectors, dim=0)

    torch.testing.assert_close(encoder.encode_examples([draw_noise(0)]), expected)


def test_several_images_give_their_mean(encoder: ConseImageEncoder) -> None:
    images = [draw_noise(1), draw_noise(2), draw_disc((30, 90, 200))]
    sums = [weigh(encoder, image) for image in images]
    together = encoder.encode_examples(images)

    torch.testing.assert_close(together, functional.normalize(torch.stack(sums).mean(0), dim=0))
    torch.testing.assert_close(encoder.encode_examples(images[::-1]), together)
    torch.testing.assert_close(
        encoder.encode_examples([images[0]] * 3), encoder.encode_examples([images[0]])
    )


def weigh(encoder: ConseImageEncoder, image: Image.Image) -> Tensor:
    """One image's vector before it is normalised."""
    top = encoder._classify(image).topk(TOP_CLASSES)
    vectors = torch.stack([encoder._vector(i) for i in top.indices.tolist()])
    return (top.values / top.values.sum()) @ vectors


def test_what_is_shown_decides(encoder: ConseImageEncoder, words: TaskEncoder) -> None:
    orange, noise = encoder.encode_examples([draw_disc((250, 120, 20))]), draw_noise(3)
    orange_again = encoder.encode_examples([draw_disc((245, 125, 25))])

    assert orange @ orange_again > orange @ encoder.encode_examples([noise])


def test_any_mode_and_size_will_do(encoder: ConseImageEncoder) -> None:
    picture = draw_noise(4)
    for image in (picture.convert("L"), picture.convert("RGBA"), picture.resize((1, 700))):
        assert encoder.encode_examples([image]).norm().item() == pytest.approx(1.0, abs=1e-6)
    same = encoder.encode_examples([picture.convert("RGBA")])
    assert torch.equal(same, encoder.encode_examples([picture]))


def test_no_images_are_refused(encoder: ConseImageEncoder) -> None:
    with pytest.raises(InvalidInputError, match="at least one image"):
        encoder.encode_examples([])


def test_a_bundle_says_which_encoder_it_has(words: TaskEncoder) -> None:
    conse = build_image_encoder({**WORDS, "images": "conse"}, words)

    assert isinstance(conse, ConseImageEncoder)
    assert conse.encoder_id == f"conse/tf_efficientnet_lite0/{words.encoder_id}"
    assert build_image_encoder(WORDS, words) is None
    assert build_image_encoder({**WORDS, "images": ""}, words) is None
    with pytest.raises(InvalidBundleError, match="'clip' is unknown"):
        build_image_encoder({**WORDS, "images": "clip"}, words)
