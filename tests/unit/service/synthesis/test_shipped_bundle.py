"""The bundle in the repository is what the README says it is."""

import json
from pathlib import Path

from service.synthesis.bundle import read_bundle
from training.recipe import read_recipe

FOLDER = Path("service/bundles/text-smollm2")
RESULTS = Path("training/results/text-smollm2")
MAX_BYTES = 16_000_000

DETECTION_FOLDER = Path("service/bundles/detection-embedded")
DETECTION_RESULTS = Path("training/results/detection-embedded")
MAX_BASE_BYTES = 8_000_000
MAX_GENERATOR_BYTES = 6_000_000


def test_it_is_valid_small_and_knows_all_twelve_domains() -> None:
    bundle = read_bundle(FOLDER)
    assert len(bundle.tasks) == 12
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES
    assert bundle.encoder_spec["kind"] == "open_clip_text"


def test_the_recipe_in_the_repository_made_it() -> None:
    bundle = read_bundle(FOLDER)
    assert bundle.provenance["recipe_digest"] == read_recipe("text-embedded").digest
    assert not str(bundle.provenance["commit"]).endswith("+")


def test_the_committed_evaluation_is_of_this_bundle_and_meets_the_target() -> None:
    document = json.loads((RESULTS / "evaluation.json").read_text())
    assert document["bundle"]["digest"] == read_bundle(FOLDER).digest
    assert len(document["tasks"]) == 12
    for task in document["tasks"]:
        assert task["windows"] >= 200
        assert task["ppl_ratio"]["value"] <= 1.01, task["name"]


def test_the_detection_bundle_ships_its_base_and_is_small() -> None:
    bundle = read_bundle(DETECTION_FOLDER)
    assert bundle.modality == "detection"
    assert bundle.base_reference == "bundle:base"
    assert len(bundle.tasks) == 24
    base = [path.stat().st_size for path in (DETECTION_FOLDER / "base").iterdir()]
    assert sum(base) <= MAX_BASE_BYTES
    generator = [path.stat().st_size for path in DETECTION_FOLDER.glob("*.safetensors")]
    assert sum(generator) <= MAX_GENERATOR_BYTES


def test_the_detection_recipe_in_the_repository_made_it() -> None:
    bundle = read_bundle(DETECTION_FOLDER)
    assert bundle.provenance["recipe_digest"] == read_recipe("detection-embedded").digest
    assert not str(bundle.provenance["commit"]).endswith("+")


def test_the_committed_detection_evaluation_is_of_this_bundle() -> None:
    document = json.loads((DETECTION_RESULTS / "evaluation.json").read_text())
    assert document["bundle"]["digest"] == read_bundle(DETECTION_FOLDER).digest
    assert len(document["tasks"]) == 24
    assert document["settings"]["generator_seeds"] == [0, 1, 2]
    for task in document["tasks"]:
        assert set(task["seed_ap50"]) == {"1", "2"}
        assert task["ap50"]["own"]["low"] <= task["ap50"]["own"]["value"]
