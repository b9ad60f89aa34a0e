"""Recipes and synthesis: the same recipe gives the same id and the same bytes."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.errors import (
    InvalidAdapterError,
    InvalidBundleError,
    InvalidInputError,
    TaskEncoderMismatchError,
)
from service.synthesis.adapter_recipe import (
    MAX_TASK_CHARACTERS,
    AdapterRecipe,
    GenerationMode,
    normalize_description,
)
from service.synthesis.bundle import read_bundle
from service.synthesis.layout import AdapterKind
from service.synthesis.normalizer import AdapterNormalizer
from service.synthesis.synthesizer import Synthesizer, digest_vector, load_synthesizer
from tests.fixtures.kernel import PROPERTY, WordEncoder, write_word_bundle

DIGEST = "d" * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "words"
    write_word_bundle(folder)
    return folder


@pytest.fixture(scope="module")
def synthesizer(folder: Path) -> Synthesizer:
    return Synthesizer(read_bundle(folder), WordEncoder())


def build(**changes: Any) -> AdapterRecipe:
    return AdapterRecipe.build(**{"task": "Write a recipe.", "bundle_digest": DIGEST} | changes)


def make(synthesizer: Synthesizer, task: str = "write a recipe", **changes: Any) -> torch.Tensor:
    recipe = build(task=task, bundle_digest=synthesizer.bundle.digest, **changes)
    return synthesizer.synthesize(recipe).vector


# ---------------------------------------------------------------- recipes


def test_the_id_is_the_sha256_of_the_canonical_recipe() -> None:
    canonical = (
        '{"bundle_digest":"' + DIGEST + '","mode":"sample","seed":7,"strength":1.0,'
        '"task":"\\u00c9crire une recette","temperature":0.5,"tenant":"public"}'
    )

    recipe = build(task=" Écrire\tune  recette", mode="sample", seed=7, temperature=0.5)

    assert recipe.adapter_id == hashlib.sha256(canonical.encode()).hexdigest()


@pytest.mark.parametrize(
    "task",
    ["  Write a\trecipe.\n", "Ｗｒｉｔｅ a recipe.", "Write a recipe.", "Write a　recipe."],
)
def test_descriptions_that_differ_in_form_only_are_one(task: str) -> None:
    assert build(task=task).task == "Write a recipe."
    assert build(task=task).adapter_id == build().adapter_id


def test_composed_and_decomposed_letters_are_one() -> None:
    assert build(task="cafe\u0301").adapter_id == build(task="caf\u00e9").adapter_id


@PROPERTY
@given(st.text())
def test_any_text_is_normalised_for_good_or_refused(text: str) -> None:
    try:
        recipe = build(task=text)
    except InvalidInputError:
        return
    assert normalize_description(recipe.task) == recipe.task
    assert recipe.task == recipe.task.strip()
    assert AdapterRecipe.from_json(recipe.to_json()).adapter_id == recipe.adapter_id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ""}, "empty"),
        ({"task": " \n\t\u3000"}, "empty"),
        ({"task": "a" * (MAX_TASK_CHARACTERS + 1)}, "at most 1000"),
        ({"task": "\ufdfa" * 60}, "at most 1000"),  # one character is 18 under NFKC
        ({"task": "a\x00b"}, "control"),
        ({"task": "a\x1bb"}, "control"),
        ({"task": "a\ud800b"}, "surrogate"),
        ({"mode": "mean"}, "mode"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": 2.01}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"strength": 0.0}, "strength"),
        ({"strength": -1.0}, "strength"),
        ({"strength": 4.01}, "strength"),
        ({"strength": float("inf")}, "strength"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    "changes", [{"task": "a" * MAX_TASK_CHARACTERS}, {"mode": "sample", "seed": 2**63 - 1}]
)
def test_the_largest_values_are_allowed(synthesizer: Synthesizer, changes: Any) -> None:
    assert make(synthesizer, **changes).isfinite().all()


def test_whatever_determines_the_adapter_changes_its_id() -> None:
    recipes = [
        build(mode="sample", **changes)
        for changes in (
            {},
            {"tenant": "acme"},
            {"task": "Write a program."},
            {"seed": 1},
            {"temperature": 0.5},
            {"strength": 2.0},
            {"bundle_digest": "e" * 64},
        )
    ]

    assert len({recipe.adapter_id for recipe in [*recipes, build()]}) == 8
    assert build(mode="sample").adapter_id == recipes[0].adapter_id


def test_mode_ignores_seed_and_temperature() -> None:
    assert build(seed=5, temperature=0.3) == build()
    assert build(mode=GenerationMode.MODE).adapter_id == build().adapter_id


@pytest.mark.parametrize("change", [{"mode": "mean"}, {"colour": "red"}, {"mode": None}])
def test_a_malformed_recipe_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="malformed"):
        AdapterRecipe.from_json(build().to_json() | change)
    with pytest.raises(InvalidInputError, match="malformed"):
        AdapterRecipe.from_json({})


# ---------------------------------------------------------------- synthesis


@pytest.mark.parametrize("changes", [{}, {"mode": "sample", "seed": 3, "temperature": 0.7}])
def test_the_same_recipe_gives_the_same_bytes(
    synthesizer: Synthesizer, folder: Path, changes: dict[str, Any]
) -> None:
    recipe = build(bundle_digest=synthesizer.bundle.digest, **changes)
    first = synthesizer.synthesize(recipe)
    torch.manual_seed(99)  # nothing may depend on the global generator
    elsewhere = Synthesizer(read_bundle(folder), WordEncoder()).synthesize(recipe)
    with ThreadPoolExecutor(4) as pool:
        digests = {a.vector_sha256 for a in pool.map(synthesizer.synthesize, [recipe] * 8)}

    assert first.vector.dtype == torch.float16
    assert first.vector_sha256 == hashlib.sha256(first.vector.numpy().tobytes()).hexdigest()
    assert digests == {first.vector_sha256} == {digest_vector(elsewhere.vector)}
    assert first.adapter_id == recipe.adapter_id
    assert set(first.seconds) == {"encode", "decode"}


def test_other_words_seeds_and_temperatures_give_other_adapters(synthesizer: Synthesizer) -> None:
    vectors = [
        make(synthesizer),
        make(synthesizer, task="write a program"),
        make(synthesizer, mode="sample"),
        make(synthesizer, mode="sample", seed=1),
        make(synthesizer, mode="sample", seed=1, temperature=0.5),
    ]

    assert len({digest_vector(vector) for vector in vectors}) == len(vectors)


def test_mode_decodes_z_zero_and_sample_scaled_noise(synthesizer: Synthesizer) -> None:
    bundle = synthesizer.bundle
    condition = WordEncoder().encode(["write a recipe"])
    noise = torch.randn(1, 3, generator=torch.Generator().manual_seed(5))

    for z, changes in (
        (torch.zeros(1, 3), {}),
        (0.5 * noise, {"mode": "sample", "seed": 5, "temperature": 0.5}),
    ):
        expected = bundle.normalizer.denormalize(bundle.decoder(z, condition)[0]).half()
        assert torch.equal(make(synthesizer, **changes), expected)


@pytest.mark.parametrize("kind", AdapterKind)
@pytest.mark.parametrize("strength", [0.25, 0.7, 2.0, 4.0])
def test_strength_scales_the_update_linearly(
    tmp_path: Path, kind: AdapterKind, strength: float
) -> None:
    scaled_by = Synthesizer(write_word_bundle(tmp_path / "bundle", kind), WordEncoder())
    bases = scaled_by.bundle.bases

    once = bases.expand(make(scaled_by))
    scaled = bases.expand(make(scaled_by, strength=strength))

    for path, (down, up) in once.items():
        delta = up @ down
        torch.testing.assert_close(
            scaled[path][1] @ scaled[path][0],
            strength * delta,
            atol=2e-3 * strength * float(delta.abs().max()),  # float16 rounds the vectors
            rtol=0,
        )


def test_nearest_tasks_are_sorted_and_complete(synthesizer: Synthesizer) -> None:
    adapter = synthesizer.synthesize(
        build(task="Continue this program", bundle_digest=synthesizer.bundle.digest)
    )

    similarities = [task.similarity for task in adapter.nearest]
    assert adapter.nearest[0].name == "python"
    assert similarities[0] == pytest.approx(1.0, abs=1e-6)
    assert similarities == sorted(similarities, reverse=True)
    assert sorted(task.name for task in adapter.nearest) == ["news", "python", "recipes"]
    assert adapter.in_distribution == 1.0


def test_a_tasks_similarity_is_that_of_its_best_wording(synthesizer: Synthesizer) -> None:
    words = "report how to cook"
    bundle = synthesizer.bundle
    cosines = bundle.task_vectors @ WordEncoder().encode([words])[0]

    nearest = synthesizer.synthesize(build(task=words, bundle_digest=bundle.digest)).nearest

    for task in nearest:
        own = [i for i, j in enumerate(bundle.owner.tolist()) if bundle.tasks[j].name == task.name]
        assert task.similarity == pytest.approx(float(cosines[own].max()))


@PROPERTY
@given(st.text(alphabet="abcdefgh ", min_size=1, max_size=20).filter(str.strip))
def test_the_in_distribution_score_is_a_share(synthesizer: Synthesizer, task: str) -> None:
    adapter = synthesizer.synthesize(build(task=task, bundle_digest=synthesizer.bundle.digest))

    assert adapter.in_distribution == synthesizer.score(task)
    assert 6 * adapter.in_distribution == pytest.approx(round(6 * adapter.in_distribution))
    assert 0 <= adapter.in_distribution <= 1


def test_another_bundles_recipe_is_refused(synthesizer: Synthesizer) -> None:
    with pytest.raises(InvalidInputError, match="another bundle"):
        synthesizer.synthesize(build(bundle_digest="e" * 64))


def test_another_encoder_is_refused(folder: Path) -> None:
    with pytest.raises(TaskEncoderMismatchError):
        Synthesizer(read_bundle(folder), WordEncoder(dim=17))


def test_an_encoder_that_cannot_be_built_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidBundleError, match="'words'"):
        load_synthesizer(folder)


def test_an_adapter_beyond_float16_is_refused(tmp_path: Path) -> None:
    num_params = write_word_bundle(tmp_path / "first").layout.num_params
    large = AdapterNormalizer(torch.full((num_params,), 6e4), torch.ones(num_params))
    overflowing = Synthesizer(
        write_word_bundle(tmp_path / "second", normalizer=large), WordEncoder()
    )

    with pytest.raises(InvalidAdapterError, match="lower the strength"):
        make(overflowing, strength=4.0)
