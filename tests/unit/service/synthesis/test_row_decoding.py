"""An adapter's bytes do not depend on what is decoded with it: tiny networks, shipped bundles."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from service.errors import InvalidAdapterError, InvalidInputError
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.bundle import Bundle, read_bundle
from service.synthesis.layout import AdapterKind
from service.synthesis.row_decoding import RowDecoder
from service.synthesis.synthesizer import SynthesizedAdapter, Synthesizer
from tests.fixtures.kernel import (
    WordEncoder,
    adapt_tiny_net,
    normal,
    random_decoder,
    write_word_bundle,
)

BUNDLES = ("text-smollm2", "detection-embedded")
BATCHES = 20


class StoredEncoder:
    """Gives a training wording the task vector that the bundle has: no encoder to load."""

    def __init__(self, bundle: Bundle) -> None:
        self.encoder_id = bundle.encoder_id
        self.dim = bundle.generator.condition_dim
        texts = [text for task in bundle.tasks for text in task.descriptions]
        self._vectors = dict(zip(texts, bundle.task_vectors, strict=True))

    def encode(self, descriptions: Sequence[str]) -> torch.Tensor:
        none = torch.zeros(self.dim)
        return torch.stack([self._vectors.get(text, none) for text in descriptions])


@pytest.mark.parametrize("name", BUNDLES)
def test_shipped_bundles_give_equal_bytes_alone_and_in_any_batch(name: str) -> None:
    bundle = read_bundle(Path("service/bundles") / name)
    synthesizer = Synthesizer(bundle, StoredEncoder(bundle))
    choose = random.Random(0)
    recipes = [
        AdapterRecipe.build(
            task=text,
            bundle_digest=bundle.digest,
            mode=choose.choice(["mode", "sample"]),
            seed=choose.randrange(100),
            strength=choose.choice([0.5, 1.0, 1.7]),
        )
        for task in bundle.tasks
        for text in task.descriptions[:2]
    ]
    alone = {each.adapter_id: synthesizer.synthesize(each).vector_sha256 for each in recipes}
    for _ in range(BATCHES):
        batch = choose.sample(recipes, choose.randint(2, 16))
        for result in synthesizer.synthesize_batch([(recipe, None) for recipe in batch]):
            assert isinstance(result, SynthesizedAdapter)
            assert result.vector_sha256 == alone[result.adapter_id]


@pytest.mark.parametrize("name", BUNDLES)
def test_shipped_bundles_give_what_the_training_forward_gives(name: str) -> None:
    bundle = read_bundle(Path("service/bundles") / name)
    vectors = bundle.task_vectors[:: len(bundle.task_vectors) // 6]
    z = normal(len(vectors), bundle.generator.latent_dim)
    with torch.inference_mode():
        rows = RowDecoder(bundle.decoder)(z, vectors)
        torch.testing.assert_close(rows, bundle.decoder(z, vectors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["paper", "token", "in_context"])
def test_every_preset_decodes_row_by_row(preset: str) -> None:
    _, layout, _ = adapt_tiny_net(AdapterKind.LORA)
    decoder = random_decoder(preset, layout, num_prototypes=2, std=0.2)
    z, condition = normal(5, 3), normal(5, 16, seed=1)
    with torch.inference_mode():
        decode = RowDecoder(decoder)
        rows = decode(z, condition)
        assert rows.shape == (5, layout.num_params)
        for index in range(5):
            one = slice(index, index + 1)
            assert torch.equal(rows[one], decode(z[one], condition[one]))
            torch.testing.assert_close(rows[one], decoder(z[one], condition[one]))


def test_an_order_that_fails_takes_nothing_from_the_others(tmp_path: Path) -> None:
    bundle = write_word_bundle(tmp_path / "bundle")
    synthesizer = Synthesizer(bundle, WordEncoder())
    good, other = (
        AdapterRecipe.build(task="write news", bundle_digest=digest)
        for digest in (bundle.digest, "d" * 64)
    )

    first, second, third = synthesizer.synthesize_batch([(good, None), (other, None), (good, None)])

    assert isinstance(first, SynthesizedAdapter)
    assert isinstance(second, InvalidInputError)
    assert isinstance(third, SynthesizedAdapter)
    assert first.vector_sha256 == synthesizer.synthesize(good).vector_sha256
    assert first.vector.untyped_storage().nbytes() == first.vector.nbytes  # not the batch's
    assert synthesizer.synthesize_batch([]) == []
    bundle.normalizer.mean[0] = torch.inf
    (failed,) = synthesizer.synthesize_batch([(good, None)])
    assert isinstance(failed, InvalidAdapterError)
