"""The rows of tables 4, 5 and 6: recipes made from one recipe, and a method for each."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidInputError, InvalidRecipeError
from training.evaluation.outcomes import FURTHER_SEEDS
from training.image_vectors import EMBEDDED_CONSE
from training.recipe import Recipe, read_recipe

RANKS = (1, 2, 4, 8)
"""Of the paper's tables 3, 4 and 5."""

DEPTHS = (10, 11, 12, 13, 14, 20)
"""Convolutional layers each way, of the paper's Table 5."""

OURS = ("in_context", "token")
"""Presets that are no baselines."""

FINETUNE_SEED = "fine-tuning seed"
"""Label of own adapters that say how far apart two fine-tunings of one task are: Table 4."""

PAPER_RECIPE = "paper-detection"
"""Recipe whose section `[generator]` says how preset `paper` is trained."""

SWEEPS = (4, 5, 6)
"""Tables that train something."""

_DATA = ("base", "detector", "detection", "tasks")
_ADAPTERS = (*_DATA, "adapter", "finetune")
_SECTIONS: Mapping[str, tuple[str, ...]] = {
    "base": _DATA,
    "own": _ADAPTERS,
    "soup": _ADAPTERS,
    "cond_p_diff": (*_ADAPTERS, "encoder"),
}
"""What a method's adapters depend on; those of presets depend on `_GENERATOR`."""

_GENERATOR = (*_ADAPTERS, "encoder", "generator", "context")

UNSEEDED = ("base", "own", "soup")
"""Methods that draw nothing after the fine-tuning."""


@dataclass(frozen=True)
class Row:
    """What is measured for one row.

    Attributes:
        label: what tells it from other rows of its table, `{"rank": 4}`.
        method: `base`, `own`, the name of a baseline, or a generator's preset.
        recipe: of its adapters, task vectors and generator.
        seeds: of the method, each fitted and scored; empty where it draws nothing.
    """

    label: Mapping[str, int | str]
    method: str
    recipe: Recipe
    seeds: tuple[int, ...]

    @property
    def stage(self) -> str:
        """sha256 over what the method's adapters depend on, but for the method's seeds."""
        sections = _SECTIONS.get(self.method, _GENERATOR)
        return self.recipe.stage_digest(*sections)

    @property
    def adapters(self) -> str:
        """sha256 over what the fine-tuned adapters depend on."""
        return adapters_digest(self.recipe)

    @property
    def key(self) -> str:
        """sha256 over what the row's numbers depend on: rows of two tables may share one."""
        body = json.dumps([self.method, self.stage, list(self.seeds)])
        return hashlib.sha256(body.encode()).hexdigest()

    @property
    def title(self) -> str:
        """For people."""
        return ", ".join([*(f"{name} {value}" for name, value in self.label.items()), self.method])


def list_rows(table: int, recipe: Recipe, seeds: tuple[int, ...] | None = None) -> list[Row]:
    """All rows of a table, those of one rank together.

    Args:
        table: 4, 5 or 6.
        recipe: what is varied.
        seeds: of the methods; the recipe's generator seeds where None.

    Raises:
        InvalidInputError: a table that trains nothing.
        InvalidRecipeError: a recipe of text tasks, or a value that a section does not take.
    """
    if table not in SWEEPS:
        raise InvalidInputError(f"table {table} has no rows to train: {SWEEPS} have")
    if recipe.detection is None:
        raise InvalidRecipeError(f"table {table} is measured on detection: name such a recipe")
    draw = {4: _vary_rank, 5: _vary_depth, 6: _vary_encoder}[table]
    seeds = seeds or recipe.generator_seeds
    rows = []
    for label, method, changed in draw(recipe):
        rows.append(Row(label, method, changed, () if method in UNSEEDED else seeds))
    return rows


def adapters_digest(recipe: Recipe) -> str:
    """sha256 over what a recipe's fine-tuned adapters depend on."""
    return recipe.stage_digest(*_ADAPTERS)


def change(recipe: Recipe, **sections: Mapping[str, Any] | None) -> Recipe:
    """The recipe with keys of sections replaced, or a section removed by None.

    Raises:
        pydantic.ValidationError: a value that a section does not take.
    """
    body = recipe.to_json()
    for name, keys in sections.items():
        body[name] = None if keys is None else {**body.get(name, {}), **keys}
    return Recipe.model_validate(body)


def with_paper_generator(recipe: Recipe, **keys: Any) -> Recipe:
    """The recipe with preset `paper`, trained as the shipped recipe of that preset says."""
    own = recipe.generator if recipe.generator.preset == "paper" else None
    section = own or read_recipe(PAPER_RECIPE).generator
    return change(recipe, context=None, generator={**section.model_dump(), **keys})


_Drawn = Iterator[tuple[Mapping[str, int | str], str, Recipe]]


def _vary_rank(recipe: Recipe) -> _Drawn:
    yield {"rank": "-"}, "base", recipe
    for rank in RANKS:
        changed = change(recipe, adapter={"rank": rank})
        label = {"rank": rank}
        for method in ("own", "soup", "cond_p_diff"):
            yield label, method, changed
        for seed in FURTHER_SEEDS:
            again = change(changed, finetune={"seeds": (seed,)})
            yield {**label, FINETUNE_SEED: seed}, "own", again
        if recipe.generator.preset != "paper":
            yield label, recipe.generator.preset, changed
        yield label, "paper", with_paper_generator(changed)


def _vary_depth(recipe: Recipe) -> _Drawn:
    for rank in RANKS:
        changed = change(recipe, adapter={"rank": rank})
        for depth in DEPTHS:
            yield (
                {"rank": rank, "depth": depth},
                "paper",
                with_paper_generator(changed, depth=depth),
            )


def _vary_encoder(recipe: Recipe) -> _Drawn:
    for method in ("base", "own", "soup"):
        yield {"task vectors": "-"}, method, recipe
    images = {"kind": "open_clip_image", "model": EMBEDDED_CONSE, "pretrained": ""}
    for label, changed in (("text", recipe), ("vision", change(recipe, encoder=images))):
        if recipe.generator.preset != "paper":
            yield {"task vectors": label}, recipe.generator.preset, changed
        yield {"task vectors": label}, "paper", with_paper_generator(changed)
