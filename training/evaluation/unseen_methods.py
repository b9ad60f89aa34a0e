"""Methods of the evaluation of unseen tasks, by name."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidInputError
from training.baselines import PRESETS, Baseline, build_baseline
from training.evaluation.unseen import Method
from training.recipe import FunctionalSection, Recipe
from training.through_base import ThroughBase

METHODS_OF_WEIGHTS = (
    "soup",
    "nearest",
    "top_k",
    "gaussian",
    "pca_ridge",
    "hypernet",
    "cond_p_diff",
)
"""Baselines that need adapters and task vectors alone, with their default options."""

UNSEEDED = ("soup", "nearest", "top_k", "pca_ridge")
"""Those that draw nothing."""

DEFAULT_CONTEXT = {"num_neighbours": 8, "episode_share": 0.75, "dropout": 0.1}
"""Section `[context]` of preset `in_context` where the recipe is of another preset."""

WITH_PROMPT = MappingProxyType({"+description": "description", "+examples": "examples"})
"""Suffixes of a method whose adapters are used behind a prompt: what to do, or how it is done."""

TRAININGS = ("functional", "contrastive")
"""Suffixes of presets that are trained through the base as well."""

MULTI_TASK_RATE = 0.25
"""Of the learning rate of a fine-tuning: every step is of another task."""

SCORED_TASKS = 8
SCORED_EXAMPLES = 8
"""Training tasks, and windows of each, that the greedy soup is chosen on, by nats per token."""


def build_method(name: str, recipe: Recipe) -> Method:
    """A method; generators train as the recipe says, some through the base as well.

    `PRESET_functional` is trained through the base without contrast, `PRESET_contrastive` with it.
    `NAME+description` is NAME with the description before every window, `NAME+examples` with
    training texts of the task, which the adapter is not made from. The recipe's section
    `[functional]` also says how long what learns through the base does.

    Raises:
        InvalidInputError: an unknown name, or one that learns through the base while the recipe
            has no section `[functional]`, or with contrast while it has none.
    """
    for suffix, prompt in WITH_PROMPT.items():
        if name.endswith(suffix):
            return replace(build_method(name.removesuffix(suffix), recipe), prompt=prompt)
    if name in METHODS_OF_WEIGHTS:
        return Method(lambda _: build_baseline(name), seeded=name not in UNSEEDED)
    preset, _, training = name.rpartition("_")
    if training not in TRAININGS:
        preset, training = name, ""
    through_base = _METHODS_THROUGH_BASE.get(name)
    if preset not in PRESETS and through_base is None:
        known = [*METHODS_OF_WEIGHTS, *PRESETS, *_METHODS_THROUGH_BASE]
        known += [f"{preset}_{training}" for preset in PRESETS for training in TRAININGS]
        known.append(f"each with {' or '.join(WITH_PROMPT)}")
        raise InvalidInputError(f"unknown method {name!r}; known: {', '.join(known)}")
    if preset == name and through_base is None:
        return _build_preset(preset, recipe, None)
    if recipe.functional is None:
        raise InvalidInputError(f"method {name!r} needs a recipe with a section [functional]")
    plain = recipe.functional.model_copy(update={"contrast_weight": 0.0})
    if through_base is not None:
        return Method(partial(through_base, recipe), plain.model_dump())
    if training == "functional":
        return _build_preset(preset, recipe, plain)
    if not recipe.functional.contrast_weight:
        raise InvalidInputError(f"method {name!r} needs a functional.contrast_weight above 0")
    return _build_preset(preset, recipe, recipe.functional)


def _build_preset(preset: str, recipe: Recipe, functional: FunctionalSection | None) -> Method:
    body = recipe.to_json()
    body["generator"]["preset"] = preset
    context = body.pop("context", DEFAULT_CONTEXT)
    if preset == "in_context":
        body["context"] = context
    body["functional"] = None if functional is None else functional.model_dump()
    made_of = Recipe.model_validate(body)

    def build(through_base: ThroughBase) -> Baseline:
        passed = through_base if functional is not None else None
        return build_baseline(preset, recipe=made_of, through_base=passed)

    sections = ("seed", "generator", "context", "functional")
    return Method(build, {section: body.get(section) for section in sections})


def _build_multi_task(recipe: Recipe, through_base: ThroughBase) -> Baseline:
    return build_baseline(
        "multi_task",
        task_loss=through_base.measure_batch,
        num_steps=_count_steps(recipe),
        learning_rate=recipe.finetune.learning_rate * MULTI_TASK_RATE,
    )


def _build_end_to_end(recipe: Recipe, through_base: ThroughBase) -> Baseline:
    return build_baseline(
        "hypernet", task_loss=through_base.measure_batch, num_task_steps=_count_steps(recipe)
    )


def _count_steps(recipe: Recipe) -> int:
    assert recipe.functional is not None
    return recipe.functional.num_steps


def _build_greedy_soup(_: Recipe, through_base: ThroughBase) -> Baseline:
    def score(vector: Float[Tensor, " num_params"], task: str) -> float:
        with torch.inference_mode():
            return -float(through_base.measure(vector, task, torch.arange(SCORED_EXAMPLES)))

    return build_baseline("greedy_soup", score=score, num_validation_tasks=SCORED_TASKS)


_METHODS_THROUGH_BASE: Mapping[str, Callable[[Recipe, ThroughBase], Baseline]]
_METHODS_THROUGH_BASE = MappingProxyType(
    {
        "multi_task": _build_multi_task,
        "hypernet_end_to_end": _build_end_to_end,
        "greedy_soup": _build_greedy_soup,
    }
)
