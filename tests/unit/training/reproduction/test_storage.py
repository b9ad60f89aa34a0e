"""Table 3: the files of an untrained bundle have the bytes of the shipped one."""

from pathlib import Path

import pytest

from service.synthesis.bundle import Bundle, read_bundle
from service.synthesis.task_encoder import TaskEncoder
from tests.fixtures.kernel import WordEncoder
from training.evaluation.accounting import measure_storage
from training.recipe import Recipe
from training.reproduction import storage
from training.reproduction.storage import list_storage, measure_recipe, write_storage_table
from training.reproduction.tables import render_storage
from training.shipped import BUNDLES_DIR


@pytest.fixture(scope="module")
def shipped() -> tuple[Bundle, TaskEncoder]:
    return read_bundle(BUNDLES_DIR / "detection-embedded"), WordEncoder()


def test_an_untrained_bundle_takes_the_bytes_of_a_trained_one(
    shipped: tuple[Bundle, TaskEncoder],
) -> None:
    bundle, encoder = shipped
    recipe = Recipe.model_validate(bundle.provenance["recipe"])

    layout, measured = measure_recipe(bundle, recipe, encoder)

    real = measure_storage(bundle, encoder)
    listing = 1000  # the manifest of the shipped one also names the files of its base
    assert layout.digest == bundle.layout.digest
    assert measured.fp16_adapter == real.fp16_adapter
    assert measured.bases == real.bases
    assert real.generator - listing <= measured.generator <= real.generator


def test_rows_of_every_rank_and_preset_break_even_later_with_smaller_adapters(
    shipped: tuple[Bundle, TaskEncoder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(storage, "RANKS", (1, 4))

    rows = [{"bundle": "detection", **row} for row in list_storage(*shipped)]

    assert [(row["preset"], row["rank"], row["shipped"]) for row in rows] == [
        ("token", 1, False),
        ("token", 4, True),
        ("paper", 1, False),
        ("paper", 4, False),
    ]
    assert rows[1]["adapter_params"] == 4 * rows[0]["adapter_params"]
    for row in rows:
        even = row["break_even"]["fp16"]["alone"]
        assert (even - 1) * row["fp16_adapter"] < row["generator"] <= even * row["fp16_adapter"]
    assert rows[0]["break_even"]["int8"]["alone"] > rows[1]["break_even"]["int8"]["alone"]
    lines = render_storage(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| `token`, shipped | 4 |" in lines[3]
    write_storage_table({"table": 3, "commit": "abc", "rows": rows}, tmp_path)
    assert (tmp_path / "table-3.json").exists()
