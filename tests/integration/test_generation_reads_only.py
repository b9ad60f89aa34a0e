"""Generating for a task reads nothing of the task but its description.

Everything else of it is poisoned: documents that are no text, adapters and checkpoints of NaN. What
is generated must not change by a byte; for a seen task, whatever happens to all that training left
outside of the bundle; for an unseen one, whatever lay there from before the first stage on.
"""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from service.errors import InvalidTaskDataError
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.synthesizer import load_synthesizer
from tests.fixtures.tiny_open_clip import TinyOpenClip
from tests.fixtures.tiny_training import make_recipe
from training.checkpoint import read_tensors, write_tensors
from training.evaluation.splits import check_fold, find_fold, group_families, leave_families_out
from training.pipeline import Pipeline
from training.recipe import Recipe
from training.run_dir import RunDir
from training.tasks.text import load_text_tasks

ORIGINS = {
    "emma": {"austen"},
    "persuasion": {"austen"},
    "news": {"brown"},
    "recipes": {"cookbook"},
    "python": set[str](),
}
FAMILIES = group_families(ORIGINS)
FOLD = find_fold(leave_families_out(FAMILIES, num_validation=1), "persuasion")
UNSEEN = "A chapter of a novel of manners about persuasion."
SEEN = f"Go on with my text about {FOLD.train[0]}."
GARBAGE = b"\xff\xfe\x00 nan \xc3\x28" * 50


@pytest.fixture(scope="module", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICM_LORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def whole_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five tasks with documents to train on and held-out ones."""
    root = tmp_path_factory.mktemp("unseen") / "data"
    for number, task in enumerate(ORIGINS):
        draw = random.Random(number)
        words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(40)]
        for split in ("train", "test"):
            (root / task / split).mkdir(parents=True)
            for document in range(3):
                text = " ".join(draw.choices(words, k=120))
                (root / task / split / f"{document}.txt").write_text(text)
        (root / task / "task.toml").write_text(
            f'title = "{task}"\n'
            f'descriptions = ["Write {task}.", "Continue this {task} text."]\n'
            f'heldout_descriptions = ["Go on with my text about {task}."]\n'
        )
    return root


@pytest.fixture
def data(whole_data: Path, tmp_path: Path) -> Iterator[Path]:
    """The same folder, for a test to spoil: a recipe names it, so it may not lie elsewhere."""
    shutil.copytree(whole_data, tmp_path / "saved")
    yield whole_data
    shutil.rmtree(whole_data)
    shutil.copytree(tmp_path / "saved", whole_data)


@pytest.fixture(scope="module")
def recipe(whole_data: Path, tiny_open_clip: TinyOpenClip) -> Recipe:
    """Trains on the fold's training tasks."""
    return make_fold_recipe(whole_data, tiny_open_clip, FOLD.train)


@pytest.fixture(scope="module")
def run(
    whole_data: Path,
    tiny_open_clip: TinyOpenClip,
    recipe: Recipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished run of the fold; the left-out tasks' own adapters lie in it as well."""
    root = tmp_path_factory.mktemp("run")
    others = make_fold_recipe(whole_data, tiny_open_clip, FOLD.test)
    Pipeline(RunDir.open(root / "others", others)).fine_tune_adapters()
    shutil.copytree(root / "others" / "adapters", root / "clean" / "adapters")
    train(root / "clean", recipe)
    return root / "clean"


def make_fold_recipe(data: Path, encoder: TinyOpenClip, names: tuple[str, ...]) -> Recipe:
    return make_recipe(
        tasks={"source": f"folder:{data}", "names": names},
        encoder={
            "kind": "open_clip_text",
            "model": encoder.model,
            "pretrained": str(encoder.weights),
        },
        generator={"epochs": 10},
    )


def train(root: Path, recipe: Recipe) -> Path:
    """The folder of the finished bundle."""
    Pipeline(RunDir.open(root, recipe)).run_all()
    return root / "bundle"


def generate(bundle: Path, task: str) -> bytes:
    synthesizer = load_synthesizer(bundle)
    recipe = AdapterRecipe.build(task=task, bundle_digest=synthesizer.bundle.digest)
    vector = synthesizer.synthesize(recipe).vector
    assert torch.isfinite(vector).all()
    return vector.numpy().tobytes()


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def poison_tensors(path: Path) -> None:
    """The same names and shapes, and no number."""
    tensors, metadata = read_tensors(path)
    poisoned = {
        name: torch.full_like(value, float("nan"))
        if value.is_floating_point()
        else torch.full_like(value, -1)
        for name, value in tensors.items()
    }
    write_tensors(path, poisoned, metadata)


def poison_documents(folder: Path) -> None:
    for path in folder.rglob("*.*"):
        path.write_bytes(GARBAGE)


def test_a_seen_task_needs_nothing_outside_the_bundle(
    data: Path, run: Path, tmp_path: Path
) -> None:
    before = generate(run / "bundle", SEEN)
    poisoned = tmp_path / "run"
    shutil.copytree(run, poisoned)
    files = [path for path in poisoned.rglob("*.*") if poisoned / "bundle" not in path.parents]
    for path in files:
        if path.suffix == ".safetensors":
            poison_tensors(path)
        elif path.is_file():
            path.write_bytes(GARBAGE)
    poison_documents(data)

    names = {path.name for path in files}
    assert {f"{task}.0.safetensors" for task in FOLD.train} <= names  # weights and checkpoints
    assert {"own_adapters.safetensors", "generator.safetensors", "bases.safetensors"} <= names
    assert generate(poisoned / "bundle", SEEN) == before
    with pytest.raises(InvalidTaskDataError):  # whoever reads the poison, fails
        load_text_tasks(f"folder:{data}", FOLD.train)


def test_an_unseen_task_had_no_part_in_training_either(
    data: Path, run: Path, recipe: Recipe, tmp_path: Path
) -> None:
    tasks = load_text_tasks(f"folder:{data}")
    wordings = {task.name: (*task.descriptions, *task.heldout_descriptions) for task in tasks}
    check_fold(FOLD, FAMILIES, wordings)
    assert FOLD.test == ("emma", "persuasion")

    for task in FOLD.test:
        own = tmp_path / "run" / "adapters" / f"{task}.0.safetensors"
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "adapters" / own.name, own)
        poison_tensors(own)
        poison_documents(data / task)
    for task in FOLD.train:  # and what seen tasks are measured on
        for path in (data / task / "test").iterdir():
            path.write_text("nan " * 400)
    poisoned = train(tmp_path / "run", recipe)

    assert read_files(poisoned) == read_files(run / "bundle")
    assert generate(poisoned, UNSEEN) == generate(run / "bundle", UNSEEN)


def test_what_is_trained_on_does_change_the_bytes(
    data: Path, run: Path, recipe: Recipe, tmp_path: Path
) -> None:
    """The comparison can fail: other documents of a training task show."""
    for path in (data / FOLD.train[0] / "train").iterdir():
        path.write_text("nan " * 400)

    assert generate(train(tmp_path, recipe), UNSEEN) != generate(run / "bundle", UNSEEN)
