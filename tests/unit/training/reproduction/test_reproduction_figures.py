"""Figures 2, 4 and 5 are drawn with what they are of."""

import json
from pathlib import Path

import pytest
import torch

from tests.fixtures.kernel import normal
from tests.fixtures.tiny_bundle import TinyBundle
from training.recipe import Recipe
from training.reproduction.document import render_document
from training.reproduction.figures import (
    draw_methods,
    draw_ranks,
    draw_task_vectors,
    project_vectors,
)
from training.reproduction.workspace import Workspace


def test_projections_are_the_same_again_and_keep_clusters() -> None:
    centers = torch.nn.functional.normalize(normal(3, 16, seed=0), dim=1)
    rows = (centers[:, None] + normal(3, 6, 16, seed=1, std=0.02)).flatten(0, 1)
    rows = torch.nn.functional.normalize(rows, dim=1)

    points = project_vectors(rows)

    assert torch.equal(points, project_vectors(rows))
    clusters = points.view(3, 6, 2)
    spread = (clusters - clusters.mean(1, keepdim=True)).norm(dim=2).max()
    assert torch.cdist(clusters.mean(1), clusters.mean(1))[0, 1:].min() > spread


def test_task_vectors_are_drawn(tiny_bundle: TinyBundle, tmp_path: Path) -> None:
    synthesizer = tiny_bundle.synthesizer
    unseen = {"text": [(0, "Continue like a recipe."), (1, "Write some code.")]}

    draw_task_vectors({"text": (synthesizer.bundle, synthesizer.encoder)}, unseen, tmp_path)

    assert (tmp_path / "figure-2.png").stat().st_size > 1000
    body = json.loads((tmp_path / "figure-2.json").read_text())
    assert synthesizer.bundle.digest[:12] in body["caption"]
    text = render_document(tmp_path, tmp_path, tmp_path)
    assert "![t-SNE of task vectors](figure-2.png)" in text
    assert body["commit"] in text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("tiny_tables")
def test_boxes_are_drawn_by_method_and_by_rank(
    tiny_detection_recipe: Recipe, tmp_path: Path
) -> None:
    draw_methods(tiny_detection_recipe, Workspace(tmp_path / "work"), tmp_path)
    draw_ranks(tiny_detection_recipe, Workspace(tmp_path / "work"), tmp_path)

    for number in (4, 5):
        assert (tmp_path / f"figure-{number}.png").stat().st_size > 1000
