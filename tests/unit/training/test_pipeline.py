"""All stages in one process: finished work is kept, and kills change no byte of the bundle."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import training.generator
import training.pipeline
from service.errors import InvalidBundleError, InvalidInputError, InvalidRecipeError
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.bundle import read_bundle
from service.synthesis.synthesizer import load_synthesizer
from tests.fixtures.tiny_open_clip import TinyOpenClip
from tests.fixtures.tiny_training import make_recipe
from training.add_examples import add_examples
from training.checkpoint import read_tensors
from training.pipeline import Pipeline
from training.recipe import Recipe
from training.run_dir import RunDir


@pytest.fixture(scope="module")
def recipe(tiny_open_clip: TinyOpenClip) -> Recipe:
    return make_recipe(encoder=tiny_open_clip.section, generator={"epochs": 20})


@pytest.fixture(scope="module", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICM_LORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    root = tmp_path_factory.mktemp("finished")
    open_pipeline(root, recipe).run_all()
    return root


def open_pipeline(root: Path, recipe: Recipe) -> Pipeline:
    return Pipeline(RunDir.open(root, recipe))


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bundle_answers_with_an_adapter(finished: Path, recipe: Recipe) -> None:
    synthesizer = load_synthesizer(finished / "bundle")
    bundle = synthesizer.bundle
    words = bundle.tasks[1].descriptions[0]

    adapter = synthesizer.synthesize(AdapterRecipe.build(task=words, bundle_digest=bundle.digest))

    assert [task.name for task in bundle.tasks] == ["unicode_names", "html_entities"]
    assert adapter.nearest[0].name == "html_entities"
    assert adapter.vector.shape == (bundle.layout.num_params,)
    assert bundle.base_reference == "embedded:tiny-random"
    assert bundle.provenance["recipe_digest"] == recipe.digest
    assert Recipe.model_validate(bundle.provenance["recipe"]) == recipe


def test_own_adapters_are_beside_the_bundle_and_not_in_it(finished: Path) -> None:
    own, _ = read_tensors(finished / "own_adapters.safetensors")

    assert own.keys() == {"unicode_names", "html_entities"}
    kept, _ = read_tensors(finished / "adapters" / "unicode_names.0.safetensors")
    assert (own["unicode_names"] == kept["checkpoints"].float().mean(0).half()).all()
    everything = b"".join(read_files(finished / "bundle").values())
    assert own["unicode_names"].numpy().tobytes() not in everything


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the code may catch it."""


def kill(patch: pytest.MonkeyPatch, job: str, step: int) -> None:
    """Ends the process' work when a job reports a step."""
    log = RunDir.log

    def log_or_die(run: RunDir, **fields: Any) -> None:
        log(run, **fields)
        if (fields["job"], fields["step"]) == (job, step):
            raise Killed

    patch.setattr(RunDir, "log", log_or_die)


def test_kills_in_every_stage_change_no_byte(
    finished: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.generator, "SAVE_EVERY_STEPS", 7)
    for job, step in (
        ("adapter unicode_names", 1),
        ("adapter unicode_names", 7),
        ("adapter html_entities", 12),
        ("generator", 20),
    ):
        with monkeypatch.context() as patch:
            kill(patch, job, step)
            with pytest.raises(Killed):
                open_pipeline(tmp_path, recipe).run_all()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, body: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            open_pipeline(tmp_path, recipe).run_all()

    open_pipeline(tmp_path, recipe).run_all()

    assert read_files(tmp_path / "bundle") == read_files(finished / "bundle")
    own = "own_adapters.safetensors"
    assert (tmp_path / own).read_bytes() == (finished / own).read_bytes()
    assert not [path for path in (tmp_path / "state").iterdir() if path.suffix != ".lock"]


def test_finished_stages_are_not_redone(
    finished: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_files(finished / "bundle")
    for stage in ("fine_tune", "train_generator", "encode_tasks"):
        monkeypatch.delattr(training.pipeline, stage)

    open_pipeline(finished, recipe).run_all()

    assert read_files(finished / "bundle") == before


def test_work_that_another_process_has_claimed_is_left_to_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(training.pipeline, "fine_tune")
    pipeline = open_pipeline(tmp_path, recipe)

    with pipeline.run.claim("unicode_names.0"), pipeline.run.claim("html_entities.0"):
        pipeline.fine_tune_adapters()

    assert not (tmp_path / "adapters").exists()


def test_a_stage_says_which_one_must_come_before_it(recipe: Recipe, tmp_path: Path) -> None:
    pipeline = open_pipeline(tmp_path, recipe)

    with pytest.raises(InvalidRecipeError, match="run `icm-lora adapters` first"):
        pipeline.train_generator()
    with pytest.raises(InvalidRecipeError, match="run `icm-lora generator` first"):
        pipeline.make_bundle()


def test_a_bundle_takes_tasks_by_example_from_its_run_or_afterwards(
    finished: Path, recipe: Recipe, tmp_path: Path
) -> None:
    asked = Recipe.model_validate({**recipe.to_json(), "examples": {"num_samples": 4}})
    made = open_pipeline(Path(shutil.copytree(finished, tmp_path / "run")), asked).make_bundle()
    folder = Path(shutil.copytree(finished / "bundle", tmp_path / "bundle"))
    before = read_bundle(folder)
    assert before.examples is None

    after = add_examples(folder, num_samples=4)

    assert made.examples is not None
    assert after.examples is not None
    assert len(made.examples.vectors) == 2
    assert torch.equal(after.examples.vectors, made.examples.vectors)
    assert after.examples.temperature == made.examples.temperature
    assert (before.version, after.version) == ("0.0.1", "0.1.0")
    assert after.digest != before.digest
    provenance = after.provenance["examples"]
    assert (provenance["added_to"], provenance["num_samples"]) == (before.digest, 4)
    with pytest.raises(InvalidInputError, match="has example vectors already"):
        add_examples(folder, num_samples=4)
    with pytest.raises(InvalidInputError, match="two or more documents"):
        add_examples(folder, num_samples=1)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"version": "first"}, InvalidInputError, "'first' is not of the form"),
        ({"modality": "detection"}, InvalidInputError, "is not for text"),
        ({"provenance": {}}, InvalidBundleError, "does not say which texts"),
    ],
)
def test_a_bundle_that_cannot_take_them_is_left_as_it_is(
    finished: Path, tmp_path: Path, edit: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = Path(shutil.copytree(finished / "bundle", tmp_path / "bundle"))
    manifest = folder / "bundle.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **edit}))
    before = read_files(folder)
    with pytest.raises(error, match=message):
        add_examples(folder, num_samples=4)
    assert read_files(folder) == before
