"""Table 3: bytes by method and rank, of files that are written for it and of real layouts."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from service.synthesis.bases import AdapterBases
from service.synthesis.bundle import Bundle, write_bundle
from service.synthesis.cvae import ConditionalVAE
from service.synthesis.layout import AdapterKind, AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from service.synthesis.task_encoder import TaskEncoder
from training.checkpoint import write_text
from training.estimate import build_meta_model
from training.evaluation.accounting import Storage, measure_storage
from training.generator import configure_generator
from training.pipeline import describe_commit
from training.recipe import Recipe
from training.reproduction.row_store import table_path
from training.reproduction.variants import RANKS, change, with_paper_generator


def measure_storage_table(bundles: dict[str, tuple[Bundle, TaskEncoder]]) -> dict[str, Any]:
    """Rows of all bundles, at the paper's ranks and at the shipped one, of both presets.

    Args:
        bundles: shipped ones, each with its encoder, by what the table calls them.
    """
    rows = [
        {"bundle": name, **row}
        for name, (bundle, encoder) in bundles.items()
        for row in list_storage(bundle, encoder)
    ]
    return {"table": 3, "commit": describe_commit(), "rows": rows}


def list_storage(bundle: Bundle, encoder: TaskEncoder) -> Iterator[dict[str, Any]]:
    """A row a rank and preset; that of the shipped rank and preset is of the shipped files."""
    shipped = Recipe.model_validate(bundle.provenance["recipe"])
    ranks = [
        change(shipped, adapter={"rank": rank}) for rank in sorted({*RANKS, shipped.adapter.rank})
    ]
    for recipe in [*ranks, *(with_paper_generator(recipe) for recipe in ranks)]:
        if recipe == shipped:
            layout, storage = bundle.layout, measure_storage(bundle, encoder)
        else:
            layout, storage = measure_recipe(bundle, recipe, encoder)
        yield {
            "preset": recipe.generator.preset,
            "rank": recipe.adapter.rank,
            "shipped": recipe == shipped,
            "recipe_digest": recipe.digest,
            "bundle_digest": bundle.digest,
            "kind": layout.kind.value,
            "adapter_params": layout.num_params,
            "tasks": len(bundle.tasks),
            **asdict(storage),
            "break_even": {
                name: {
                    "alone": storage.break_even(size, with_encoder=False),
                    "with_encoder": storage.break_even(size),
                }
                for name, size in (
                    ("fp16", storage.fp16_adapter),
                    ("int8", storage.int8_adapter),
                )
            },
        }


def measure_recipe(
    bundle: Bundle, recipe: Recipe, encoder: TaskEncoder
) -> tuple[AdapterLayout, Storage]:
    """Bytes of the bundle as the recipe would make it: the files of an untrained one."""
    layout = AdapterLayout.from_model(build_meta_model(recipe), **recipe.adapter.model_dump())
    config = configure_generator(recipe, bundle.task_vectors.shape[1], len(bundle.tasks))
    with torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        written = write_bundle(
            Path(folder),
            name=bundle.name,
            version=bundle.version,
            modality=bundle.modality,
            base_reference=bundle.base_reference,
            base_digest=bundle.base_digest,
            encoder_id=bundle.encoder_id,
            encoder_spec=bundle.encoder_spec,
            bases=AdapterBases(layout, _draw_bases(layout)),
            normalizer=AdapterNormalizer(
                torch.zeros(layout.num_params), torch.ones(layout.num_params)
            ),
            generator=config,
            decoder=ConditionalVAE(layout, config).decoder,
            tasks=bundle.tasks,
            task_vectors=bundle.task_vectors,
            owner=bundle.owner,
            similarity_quantiles=bundle.similarity_quantiles,
            provenance=bundle.provenance,
        )
        return layout, measure_storage(written, encoder)


def _draw_bases(layout: AdapterLayout) -> dict[tuple[str, str], torch.Tensor]:
    """Bases of the layout's shapes; their values do not matter for bytes."""
    bases: dict[tuple[str, str], torch.Tensor] = {}
    for module in layout.modules:
        if layout.kind is not AdapterKind.LORA:
            bases[module.path, "A"] = torch.zeros(layout.rank, module.in_features)
        if layout.kind is AdapterKind.CORE:
            bases[module.path, "B"] = torch.zeros(module.out_features, layout.rank)
    return bases


def write_storage_table(document: dict[str, Any], out: Path) -> None:
    """Writes `table-3.json`."""
    write_text(table_path(out, 3), json.dumps(document, indent=1) + "\n")
