"""Few-shot refinement: what is committed is of the shipped bundle, and what its table says."""

import json

import pytest

from service.synthesis.bundle import read_bundle
from tests.bench.refinement import METHODS, TaskRefinement, render_table
from training.evaluation.acceptance import list_unseen_families
from training.shipped import BUNDLES_DIR, RESULTS_DIR, SUITES


def test_committed_results_are_of_this_bundle_and_say_what_is_claimed() -> None:
    name = SUITES["text"]
    document = json.loads((RESULTS_DIR / name / "refinement.json").read_text())
    bundle = read_bundle(BUNDLES_DIR / name)
    assert document["bundle"]["digest"] == bundle.digest
    tasks = [TaskRefinement(**each) for each in document["tasks"]]
    assert {each.task for each in tasks} == {*list_unseen_families([t.name for t in bundle.tasks])}
    assert all(each.loss_after <= each.loss_before for each in tasks)
    assert (RESULTS_DIR / name / "refinement.md").read_text() == render_table(tasks) + "\n"


def test_table_has_perplexities_and_their_mean_in_nats() -> None:
    nats = dict(zip(METHODS, (3.0, 2.5, 2.0, 1.5), strict=True))
    more = {method: value + 1 for method, value in nats.items()}
    rows = [
        TaskRefinement("a", "x", nats, 3.0, 2.0, 1.0),
        TaskRefinement("b", "x", more, 3.0, 2.0, 1.0),
    ]
    lines = render_table(rows).splitlines()
    assert lines[2] == "| a | 20.09 | 12.18 | 7.39 | 4.48 |"
    means = [float(cell) for cell in lines[-1].split("|")[2:6]]
    assert means == pytest.approx([3.5, 3.0, 2.5, 2.0])
