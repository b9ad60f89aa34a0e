"""Tables 4, 5 and 6 whole, on tiny everything: rows are kept, shared and never done twice."""

import json
from pathlib import Path
from typing import Any

import pytest

import training.pipeline
from service.errors import InvalidInputError, InvalidRecipeError
from training.recipe import Recipe, read_recipe
from training.reproduction import sweep, variants
from training.reproduction.document import render_document
from training.reproduction.sweep import measure_table
from training.reproduction.variants import adapters_digest, change, list_rows
from training.reproduction.workspace import Workspace
from training.run_dir import RunDir

FOURTH = ("own", "soup", "cond_p_diff", "own", "own", "token", "paper")
"""Methods of a rank of Table 4, the last two own ones of further fine-tuning seeds."""


def read_rows(out: Path, table: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / f"table-{table}.json").read_text())["rows"]
    return rows


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("tiny_tables")
def test_all_tables_are_measured_resumed_and_share_their_work(
    tiny_detection_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, work, out = tiny_detection_recipe, tmp_path / "work", tmp_path / "out"

    left = measure_table(4, recipe, work, out, limit=2)
    first = read_rows(out, 4)
    assert [row["method"] for row in first] == ["base", "own"]
    assert left == len(list_rows(4, recipe)) - 2

    with monkeypatch.context() as patch:  # killed in the midst of a row
        score = sweep.score_adapters

        def score_and_die(*arguments: Any) -> Any:
            score(*arguments)
            raise KeyboardInterrupt

        patch.setattr(sweep, "score_adapters", score_and_die)
        with pytest.raises(KeyboardInterrupt):
            measure_table(4, recipe, work, out)
    assert read_rows(out, 4) == first

    assert measure_table(4, recipe, work, out) == 0
    rows = read_rows(out, 4)
    assert rows[:2] == first
    assert [(row["label"]["rank"], row["method"]) for row in rows] == [
        ("-", "base"),
        *((rank, method) for rank in (1, 2) for method in FOURTH),
    ]
    again = [row["adapters"] for row in rows if "fine-tuning seed" in row["label"]]
    assert len({*again}) == 4
    by_name = {
        (row["label"]["rank"], row["method"]): row for row in rows if row["adapters"] not in again
    }
    assert by_name[2, "own"]["adapter_params"] == 2 * by_name[1, "own"]["adapter_params"]
    assert by_name[2, "token"]["seeds"] == [0, 1]
    assert by_name[2, "token"]["generator_params"] > 0
    assert len(by_name[2, "token"]["tasks"]["sofa"]["seed_ap50"]) == 2
    assert by_name[2, "own"]["seeds"] == []
    assert by_name[1, "own"]["adapters"] != by_name[2, "own"]["adapters"]

    # All that tables 5 and 6 fine-tune was fine-tuned for table 4, as was most of what they score.
    monkeypatch.delattr(training.pipeline, "fine_tune")
    with monkeypatch.context() as patch:
        patch.delattr(sweep, "score_adapters")
        assert measure_table(5, recipe, work, out) == 0
        assert measure_table(4, recipe, work, out) == 0
    assert read_rows(out, 4) == rows
    assert [row["label"] for row in read_rows(out, 5)] == [
        {"rank": rank, "depth": 12} for rank in (1, 2)
    ]
    assert measure_table(6, recipe, work, out) == 0
    sixth = read_rows(out, 6)
    assert [(row["label"]["task vectors"], row["method"]) for row in sixth] == [
        *(("-", method) for method in ("base", "own", "soup")),
        *((words, method) for words in ("text", "vision") for method in ("token", "paper")),
    ]
    assert sixth[3]["encoder"].startswith("open_clip_text")
    assert sixth[5]["encoder"].startswith("conse")

    text = render_document(tmp_path, out, tmp_path)
    assert "| 2 | ours (preset `token`) |" in text
    assert "never comparable as if equal" in text
    assert f"`{first[0]['commit']}`" in text
    other = change(recipe, finetune={"learning_rate": 0.02})
    with pytest.raises(InvalidRecipeError, match="rows of another recipe"):
        measure_table(4, other, work, out)


def test_one_process_at_a_time_works_in_a_folder(
    tiny_detection_recipe: Recipe, tmp_path: Path
) -> None:
    with (
        RunDir(tmp_path, tiny_detection_recipe).claim("reproduce"),
        pytest.raises(InvalidRecipeError, match="another process"),
    ):
        measure_table(4, tiny_detection_recipe, tmp_path, tmp_path / "out")


def test_the_shipped_base_is_used_for_its_own_recipe_only(tmp_path: Path) -> None:
    recipe = read_recipe("detection-embedded")
    run = Workspace(tmp_path).open_adapters(recipe).run
    assert (run.base / "model.safetensors").exists()

    other = change(recipe, detector={"num_steps": 5})
    with pytest.raises(InvalidRecipeError, match=r"not those of the shipped base"):
        Workspace(tmp_path).open_adapters(other)


def test_variants_of_the_shipped_recipe_share_what_they_can() -> None:
    recipe = read_recipe("detection-embedded")
    paper = read_recipe(variants.PAPER_RECIPE)
    assert adapters_digest(paper) == adapters_digest(recipe)

    rows = list_rows(4, recipe)
    again = [row for row in rows if "fine-tuning seed" in row.label]
    assert [(row.label["rank"], row.label["fine-tuning seed"]) for row in again] == [
        (rank, seed) for rank in variants.RANKS for seed in (1, 2)
    ]
    assert len({row.adapters for row in rows}) == 3 * len(variants.RANKS)
    fourth = {(r.label["rank"], r.method): r for r in rows if r not in again}
    fifth = {(r.label["rank"], r.label["depth"]): r for r in list_rows(5, recipe)}
    sixth = {(r.label["task vectors"], r.method): r for r in list_rows(6, recipe)}
    assert (len(fourth), len(fifth), len(sixth)) == (21, 24, 7)
    assert fourth[4, "token"].recipe == recipe
    assert fourth[8, "paper"].key == fifth[8, 12].key
    assert fourth[4, "token"].key == sixth["text", "token"].key != sixth["vision", "token"].key
    assert len({row.adapters for row in fifth.values()}) == len(variants.RANKS)
    assert len({row.key for row in fifth.values()}) == len(fifth)
    assert fifth[1, 20].recipe.generator.depth == 20
    assert fifth[1, 12].recipe.generator == paper.generator
    assert list_rows(4, recipe, (7,))[-1].seeds == (7,)


def test_tables_that_train_need_detection() -> None:
    with pytest.raises(InvalidRecipeError, match="measured on detection"):
        list_rows(4, read_recipe("text-embedded"))
    with pytest.raises(InvalidInputError, match="no rows"):
        list_rows(3, read_recipe("detection-embedded"))
