"""The job of tables 4, 5 and 6: rows are measured one by one, and each is kept at once."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from service.errors import InvalidRecipeError
from training.baselines import PRESETS
from training.detection_examples import encode_scenes
from training.evaluation.report import describe_hardware
from training.pipeline import describe_commit
from training.progress import show_progress
from training.recipe import Recipe
from training.reproduction.row_store import RowStore, StoredRow
from training.reproduction.scoring import score_adapters
from training.reproduction.variants import UNSEEDED, Row, list_rows
from training.reproduction.workspace import FittedAdapters, Workspace
from training.run_dir import RunDir


def measure_table(
    table: int,
    recipe: Recipe,
    work: Path,
    out: Path,
    *,
    seeds: tuple[int, ...] | None = None,
    limit: int | None = None,
) -> int:
    """Measures the rows that are missing; returns how many are still missing then.

    Args:
        table: 4, 5 or 6.
        recipe: what is varied.
        work: adapters, generators and what they generate, shared by all tables.
        out: folder of `table-N.json`.
        seeds: of the methods; the recipe's generator seeds where None.
        limit: rows to measure at most.

    Raises:
        InvalidRecipeError: another process works in the folder, or its results or runs are of
            another recipe.
    """
    with RunDir(work, recipe).claim("reproduce") as mine:
        if not mine:
            raise InvalidRecipeError(f"another process reproduces in {work}: wait for it")
        return _measure_missing(table, recipe, Workspace(work), out, seeds, limit)


def _measure_missing(
    table: int,
    recipe: Recipe,
    workspace: Workspace,
    out: Path,
    seeds: tuple[int, ...] | None,
    limit: int | None,
) -> int:
    rows = list_rows(table, recipe, seeds)
    store = RowStore(out, table, describe_head(recipe))
    done = {row["key"] for row in store.read()}
    missing = [row for row in rows if row.key not in done]
    measured = 0
    for number, row in enumerate(missing):
        stored = store.find(row.key)  # of another table
        if stored is None:
            if measured == limit:
                return len(missing) - number
            print(f"table {table}: {row.title} ({len(missing) - number} rows left)", flush=True)
            stored = measure_row(row, workspace)
            measured += 1
        store.append({**stored, "label": dict(row.label), "adapters": row.adapters})
    return 0


def describe_head(recipe: Recipe) -> dict[str, Any]:
    """What all rows of a table share."""
    return {
        "recipe": recipe.bundle.name,
        "recipe_digest": recipe.digest,
        "base": recipe.base.reference,
        "data": recipe.tasks.source,
        "finetune_seeds": list(recipe.finetune.seeds),
    }


def measure_row(row: Row, workspace: Workspace) -> StoredRow:
    """Fits the row's method where that was not done, and scores it on all test scenes."""
    fitted = [] if row.method == "base" else [workspace.fit(row, s) for s in _fit_seeds(row)]
    wall, processor = time.monotonic(), time.process_time()
    pipeline = workspace.open_adapters(row.recipe)
    data = pipeline.detection
    assert data is not None, "list_rows takes recipes of detection only"
    features = encode_scenes(pipeline.base, data.test, range(len(data.test.objects)))
    passes = len(data.tasks) * max(1, len(fitted))
    with show_progress(f"score {row.method}", passes) as report:
        scores = score_adapters(
            pipeline.base,
            pipeline.bases,
            data.tasks,
            collect_vectors(fitted) if fitted else None,
            features,
            data.test.objects,
            report,
        )
    uses_words = row.method not in UNSEEDED
    return {
        "key": row.key,
        "label": dict(row.label),
        "method": row.method,
        "recipe_digest": row.recipe.digest,
        "commit": describe_commit(),
        "hardware": describe_hardware(),
        "base_digest": pipeline.base.digest,
        "encoder": workspace.encode(row.recipe)[0].encoder_id if uses_words else None,
        "seeds": list(row.seeds),
        "num_scenes": len(features),
        "adapter_params": pipeline.bases.layout.num_params if fitted else 0,
        "generator_params": max((each.params for each in fitted), default=0),
        "generator": row.recipe.generator.model_dump() if row.method in PRESETS else None,
        "tasks": {name: asdict(score) for name, score in scores.tasks.items()},
        "ap50": asdict(scores.ap50),
        "ap75": scores.ap75,
        "seconds": {
            "fit": sum(each.seconds for each in fitted),
            "fit_cpu": sum(each.cpu_seconds for each in fitted),
            "score": round(time.monotonic() - wall, 1),
            "score_cpu": round(time.process_time() - processor, 1),
        },
    }


def collect_vectors(fitted: Sequence[FittedAdapters]) -> Mapping[str, list[Any]]:
    """Adapters of each task, one a seed."""
    return {name: [each.vectors[name] for each in fitted] for name in fitted[0].vectors}


def _fit_seeds(row: Row) -> tuple[int, ...]:
    return row.seeds or (row.recipe.seed,)
