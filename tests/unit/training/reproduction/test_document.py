"""RESULTS.md says what the JSON says, what is missing, and where the method loses."""

import json
import shutil
from pathlib import Path

import pytest

from service.errors import InvalidRecipeError
from tests.fixtures.tiny_reproduction import HEAD, make_row
from training.reproduction.committed import PAPER_DIR, read_evaluation
from training.reproduction.document import RESULTS_FILE, render_document, render_section
from training.reproduction.row_store import RowStore
from training.reproduction.tables import compare, list_losses, list_text_losses, render_rows
from training.shipped import RESULTS_DIR, SUITES


def test_the_committed_document_is_that_of_the_committed_results() -> None:
    expected = render_document(RESULTS_DIR, PAPER_DIR, RESULTS_FILE.parent)

    assert RESULTS_FILE.read_text(encoding="utf-8") == expected


def test_tables_without_data_name_the_command_that_measures_them(tmp_path: Path) -> None:
    text = render_document(tmp_path, tmp_path, tmp_path)

    for number in (3, 4, 5, 6):
        assert f"Not measured yet: `icm-lora reproduce --table {number}` measures it." in text
    assert "Not measured yet: `icm-lora evaluate --suite text` measures it." in text
    assert "Not drawn yet: `icm-lora reproduce --figure 2` draws it." in text


def test_tables_1_and_2_are_the_committed_evaluations(tmp_path: Path) -> None:
    for suite in SUITES.values():
        source = RESULTS_DIR / suite / "evaluation.json"
        (tmp_path / suite).mkdir()
        shutil.copy(source, tmp_path / suite)
    first = "\n".join(render_section(1, tmp_path, tmp_path))
    second = "\n".join(render_section(2, tmp_path, tmp_path))

    detection, text = read_evaluation("detection"), read_evaluation("text")
    for result in detection.detection:
        assert f"| {result.title}" in first
        assert f"{result.ap50['own'].value:.3f}" in first
    for each in text.text:
        assert f"| {each.title} | {each.scores['base'].ppl:.2f}" in second
    for section, evaluation in ((first, detection), (second, text)):
        assert str(evaluation.document["provenance"]["commit"]) in section
        assert "Florence-2 with COCO" in section
        assert "Where we lose" in section
    birds = next(r for r in detection.detection if r.name == "bird")
    assert birds.ap50["base"].value > birds.ap50["generated"].value
    assert "Birds (0.437 against 0.337)" in first


def test_losses_to_every_method_on_the_same_adapters_are_listed() -> None:
    rows = [
        make_row("base", 0.9, 0.0, adapters="none", adapter_params=0),
        make_row("own", 0.5, 0.5),
        make_row("soup", 0.1, 0.2),
        make_row("token", 0.3, 0.4),
        make_row("soup", 0.9, 0.9, rank=8),
    ]

    losses = list_losses(rows, rows)

    assert len(losses) == 2
    assert "ours (preset `token`) is behind own adapter (original LoRA) by -0.150" in losses[0]
    assert "1 of 2 categories better" in losses[1]


def test_differences_are_paired_by_task() -> None:
    interval = compare(make_row("token", 0.5, 0.9, 0.1), make_row("own", 0.4, 0.8, 0.0))

    assert interval.value == pytest.approx(0.1)
    assert interval.low == pytest.approx(0.1) == pytest.approx(interval.high)


def test_rows_show_parameters_and_the_difference_to_the_own_adapter() -> None:
    own, ours = make_row("own", 0.4, 0.6), make_row("token", 0.5, 0.7)

    lines = render_rows([own, ours], {"adapters4": own}).splitlines()

    assert lines[0].startswith("| rank | method | numbers an adapter |")
    assert lines[2].endswith("| 1,234 | - | 0.500 (0.400 to 0.600) | 0.250 | - | - |")
    assert "| 1,234 | 56,789 | 0.600 (0.500 to 0.700) | 0.300 | +0.100" in lines[3]
    assert lines[3].count("|") == lines[0].count("|") == lines[1].count("|")


def test_text_losses_tell_clear_ones_from_ties() -> None:
    results = read_evaluation("text").text
    clear = [r for r in results if r.ppl_ratio.low > 1]

    (first, *_) = list_text_losses(results)

    assert f"on {len(clear)} of them" in first
    assert all(r.title in first for r in clear)


def test_rows_are_kept_at_once_and_not_mixed(tmp_path: Path) -> None:
    store = RowStore(tmp_path, 4, HEAD)
    store.append(make_row("own", 0.5))
    store.append(make_row("soup", 0.1))

    assert [row["method"] for row in store.read()] == ["own", "soup"]
    assert json.loads(store.path.read_text())["recipe"] == "tiny"
    found = RowStore(tmp_path, 6, HEAD).find("soup4")
    assert found is not None
    assert found["ap50"]["value"] == 0.1
    assert RowStore(tmp_path, 6, HEAD).find("base4") is None
    other = {**HEAD, "recipe_digest": "e" * 64}
    assert RowStore(tmp_path, 6, other).find("soup4") is None
    with pytest.raises(InvalidRecipeError, match="rows of another recipe_digest"):
        RowStore(tmp_path, 4, other).append(make_row("own", 0.5))
