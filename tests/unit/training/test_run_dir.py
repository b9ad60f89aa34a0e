"""A run's folder: pinned to its recipe, shared by processes, never two at the same work."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from service.errors import InvalidRecipeError
from tests.fixtures.tiny_training import make_recipe, open_run
from training.run_dir import RunDir

CLAIM_AND_WAIT = """
import sys
from pathlib import Path
from training.run_dir import RunDir
with RunDir.read(Path(sys.argv[1])).claim("work") as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_run_is_opened_again_for_the_same_recipe(tmp_path: Path) -> None:
    run = open_run(tmp_path / "new" / "run")

    assert RunDir.open(run.root, make_recipe()) == run
    assert RunDir.read(run.root) == run


@pytest.mark.parametrize(
    "change",
    [
        {"base": {"dtype": "bfloat16"}},
        {"tasks": {"names": ["unicode_names"]}},
        {"adapter": {"rank": 3}},
        {"finetune": {"learning_rate": 0.2}},
    ],
)
def test_adapters_of_another_recipe_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    run = open_run(tmp_path)

    with pytest.raises(InvalidRecipeError, match="choose another --out"):
        open_run(tmp_path, **change)
    assert RunDir.read(tmp_path) == run


def test_another_seed_is_another_recipe(tmp_path: Path) -> None:
    open_run(tmp_path)

    with pytest.raises(InvalidRecipeError):
        RunDir.open(tmp_path, make_recipe().model_copy(update={"seed": 1}))


def test_the_generator_may_change_until_one_is_trained(tmp_path: Path) -> None:
    open_run(tmp_path)

    changed = open_run(tmp_path, generator={"epochs": 31})

    assert RunDir.read(tmp_path).recipe.generator.epochs == 31
    assert open_run(tmp_path, generator={"epochs": 31}) == changed


@pytest.mark.parametrize("change", [{"generator": {"epochs": 31}}, {"encoder": {"num_samples": 3}}])
@pytest.mark.parametrize("finished", [True, False])
def test_a_generator_of_another_recipe_is_neither_bundled_nor_resumed(
    tmp_path: Path, finished: bool, change: dict[str, Any]
) -> None:
    run = open_run(tmp_path)
    made = run.generator if finished else run.state("generator")
    made.parent.mkdir(exist_ok=True)
    made.touch()

    with pytest.raises(InvalidRecipeError, match=f"delete {made}"):
        open_run(tmp_path, **change)

    assert RunDir.read(tmp_path) == run
    assert open_run(tmp_path, bundle={"version": "2.0.0"}).recipe.bundle.version == "2.0.0"
    made.unlink()
    open_run(tmp_path, **change)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecipeError, match=r"recipe\.json is missing"):
        RunDir.read(tmp_path)


def test_paths_differ_by_task_and_seed(tmp_path: Path) -> None:
    run = open_run(tmp_path)

    paths = {run.adapter(task, seed) for task in ("a", "b") for seed in (0, 1)}

    assert len(paths) == 4
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_metrics_are_appended_as_json_lines(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    before = time.time()

    run.log(job="adapter recipes", step=1, loss=2.5)
    run.log(job="adapter recipes", step=2, loss=2.25)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["job"], line["step"], line["loss"]) for line in lines] == [
        ("adapter recipes", 1, 2.5),
        ("adapter recipes", 2, 2.25),
    ]
    assert all(before - 1 <= line["time"] <= time.time() + 1 for line in lines)


def test_a_claim_excludes_another_process_until_it_dies(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM_AND_WAIT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with run.claim("work") as mine, run.claim("other work") as other_mine:
            assert not mine
            assert other_mine
        other.kill()

    with run.claim("work") as mine:
        assert mine


def test_a_claim_ends_with_its_block_however_it_is_left(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.claim("work"):
        raise KeyboardInterrupt

    with run.claim("work") as mine, run.claim("work") as again:
        assert mine
        assert not again
