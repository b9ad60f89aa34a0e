"""Figures 2, 4 and 5 of the paper: task vectors, and boxes by method and by rank."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.synthesis.bundle import Bundle
from service.synthesis.task_encoder import TaskEncoder
from training.checkpoint import write_text
from training.evaluation.acceptance import WORDINGS
from training.evaluation.pictures import SHOWN_SCORE, PictureRow, draw_pictures
from training.evaluation.report import describe_hardware
from training.pipeline import describe_commit
from training.recipe import Recipe
from training.reproduction import variants
from training.reproduction.tables import LABELS
from training.reproduction.variants import Row, change, with_paper_generator
from training.reproduction.workspace import Workspace
from training.tasks.text_task import read_wordings

TASKS_DIR = Path(__file__).parents[1] / "tasks"

PERPLEXITY = 8.0
"""Of t-SNE: about as many neighbours as a task has wordings."""


def project_vectors(rows: Float[Tensor, "points dim"], seed: int = 0) -> Float[Tensor, "points 2"]:
    """t-SNE (van der Maaten and Hinton 2008) of unit vectors by cosine, the same for equal rows."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, metric="cosine", init="random", random_state=seed)
    return torch.from_numpy(np.asarray(tsne.fit_transform(rows.double().numpy()), dtype=float))


def draw_shipped_task_vectors(bundles: Mapping[str, tuple[Bundle, TaskEncoder]], out: Path) -> None:
    """Figure 2 of the shipped bundles, by name; unseen are the held-out wordings of their tasks."""
    unseen: dict[str, list[tuple[int, str]]] = {}
    for name, (bundle, _) in bundles.items():
        wordings = read_wordings(TASKS_DIR / WORDINGS[name])
        unseen[name] = [
            (number, words)
            for number, task in enumerate(bundle.tasks)
            for words in wordings[task.name].heldout_descriptions
        ]
    draw_task_vectors(bundles, unseen, out)


def draw_task_vectors(
    bundles: Mapping[str, tuple[Bundle, TaskEncoder]],
    unseen: Mapping[str, Sequence[tuple[int, str]]],
    out: Path,
) -> None:
    """Figure 2: wordings of each task, trained on (dots) and unseen (crosses).

    Args:
        bundles: with their encoders, by title; a panel each.
        unseen: by title, task numbers and their unseen wordings.
        out: folder.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(bundles), figsize=(8 * len(bundles), 7), layout="constrained", squeeze=False
    )
    for axes, (title, (bundle, encoder)) in zip(panels[0], bundles.items(), strict=True):
        words = encoder.encode([text for _, text in unseen[title]])
        extra = torch.tensor([task for task, _ in unseen[title]])
        points = project_vectors(torch.cat([bundle.task_vectors, words]))
        _scatter(axes, points[: len(bundle.owner)], bundle.owner, bundle, "o")
        _scatter(axes, points[len(bundle.owner) :], extra, bundle, "x")
        axes.set_title(f"{title}: trained on (dots), unseen (crosses)", fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    out.mkdir(parents=True, exist_ok=True)
    of = ", ".join(f"`{b.name}` (`{b.digest[:12]}`)" for b, _ in bundles.values())
    caption = (
        f"Task vectors of the bundles {of}, t-SNE by cosine, perplexity {PERPLEXITY:g}, seed 0."
    )
    _write_caption(out, 2, caption)
    figure.savefig(out / "figure-2.png", dpi=90)
    pyplot.close(figure)


def draw_methods(recipe: Recipe, workspace: Workspace, out: Path) -> None:
    """Figure 4: a row of pictures per method, at the recipe's rank."""
    seed = recipe.seed
    rows = [Row({}, method, recipe, (seed,)) for method in ("soup", "cond_p_diff")]
    rows.append(Row({}, "paper", with_paper_generator(recipe), (seed,)))
    if recipe.generator.preset != "paper":
        rows.append(Row({}, recipe.generator.preset, recipe, (seed,)))
    rows.append(Row({}, "own", recipe, ()))
    bases = workspace.open_adapters(recipe).bases
    pictures = [PictureRow(LABELS["base"], bases, None)]
    pictures += [PictureRow(LABELS[r.method], bases, workspace.fit(r, seed).vectors) for r in rows]
    _draw(recipe, workspace, pictures, out, 4)


def draw_ranks(recipe: Recipe, workspace: Workspace, out: Path) -> None:
    """Figure 5: a row of pictures per rank, adapters of the recipe's generator."""
    pictures = []
    for rank in variants.RANKS:
        changed = change(recipe, adapter={"rank": rank})
        row = Row({"rank": rank}, recipe.generator.preset, changed, (recipe.seed,))
        vectors = workspace.fit(row, recipe.seed).vectors
        bases = workspace.open_adapters(changed).bases
        pictures.append(PictureRow(f"rank {rank}", bases, vectors))
    _draw(recipe, workspace, pictures, out, 5)


def _draw(
    recipe: Recipe, workspace: Workspace, pictures: Sequence[PictureRow], out: Path, number: int
) -> None:
    pipeline = workspace.open_adapters(recipe)
    assert pipeline.detection is not None, "figures 4 and 5 are of detection"
    caption = (
        f"Recipe `{recipe.bundle.name}` (`{recipe.digest[:12]}`), generator seed {recipe.seed}, "
        f"the first test scene of each category, boxes of a confidence of at least {SHOWN_SCORE:g}."
    )
    _write_caption(out, number, caption)
    draw_pictures(pipeline.base, pipeline.detection, pictures, out / f"figure-{number}.png")


def _write_caption(out: Path, number: int, caption: str) -> None:
    """Before the picture is drawn, whose file would make the checkout a modified one."""
    body: dict[str, Any] = {
        "figure": number,
        "caption": caption,
        "commit": describe_commit(),
        "hardware": describe_hardware(),
    }
    write_text(out / f"figure-{number}.json", json.dumps(body, indent=1) + "\n")


def _scatter(
    axes: Any,
    points: Float[Tensor, "points 2"],
    owner: Int[Tensor, " points"],
    bundle: Bundle,
    marker: str,
) -> None:
    from matplotlib import colormaps

    colors = colormaps["hsv"]
    for number, task in enumerate(bundle.tasks):
        own = points[owner == number]
        label = task.title if marker == "o" else None
        color = colors(number / len(bundle.tasks))
        axes.scatter(own[:, 0], own[:, 1], s=16, marker=marker, color=color, label=label)
