"""Every baseline: its name, its determinism, and that it reads no task that was left out."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.errors import InvalidInputError
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_tasks import draw_tasks, poison
from tests.fixtures.tiny_training import make_recipe
from training.baselines import BASELINES, Baseline, TrainingTasks, build_baseline

TARGET = normal(12, seed=12)
"""A task vector near those of task2, the only one of the family `code`."""

TINY_PRESET = {"epochs": 2, "batch_size": 8}
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "soup": {},
    "greedy_soup": {"score": lambda vector, _task: -float(vector.norm())},
    "multi_task": {
        "task_loss": lambda vector, task, _draws: (vector - float(task[-1])).square().mean(),
        "num_steps": 8,
    },
    "nearest": {},
    "top_k": {"k": 3},
    "gaussian": {},
    "pca_ridge": {},
    "hypernet": {
        "width": 8,
        "depth": 1,
        "num_steps": 8,
        "task_loss": lambda vector, _task, _draws: vector.square().mean(),
        "num_task_steps": 4,
    },
    "cond_p_diff": {
        "latent_dim": 4,
        "depth": 2,
        "width": 8,
        "autoencoder_steps": 4,
        "denoiser_width": 8,
        "denoiser_depth": 1,
        "denoiser_steps": 4,
        "num_inference_steps": 5,
    },
    "paper": {"recipe": make_recipe(generator={**TINY_PRESET, "preset": "paper"}), "sample": True},
    "token": {"recipe": make_recipe(generator={**TINY_PRESET, "preset": "token"})},
    "in_context": {"recipe": make_recipe(generator={**TINY_PRESET, "preset": "in_context"})},
    "own_checkpoints_mean": {"target": "task2"},
}

EVERY = pytest.mark.parametrize("name", list(OPTIONS))
HONEST = pytest.mark.parametrize(
    "name", [name for name in OPTIONS if name != "own_checkpoints_mean"]
)
DRAWING = {"gaussian", "cond_p_diff", "paper"}
TRAINED = {"multi_task", "hypernet", "cond_p_diff", "paper", "token", "in_context"}


def make(name: str) -> Baseline:
    return build_baseline(name, **OPTIONS[name])


def run(name: str, tasks: TrainingTasks, fit_seed: int = 0, seed: int = 0) -> Tensor:
    baseline = make(name)
    baseline.fit(tasks, fit_seed)
    return baseline.generate(TARGET, seed)


def test_every_known_baseline_is_tested_here() -> None:
    assert set(OPTIONS) == set(BASELINES)


@EVERY
def test_a_baseline_has_the_interface_and_its_registered_name(name: str) -> None:
    baseline = make(name)

    assert isinstance(baseline, Baseline)
    assert baseline.name == name
    assert baseline.uses_target == (name == "own_checkpoints_mean")


@EVERY
def test_what_comes_back_is_a_finite_float32_adapter_vector(name: str) -> None:
    vector = run(name, draw_tasks())

    assert vector.shape == (64,)
    assert vector.dtype == torch.float32
    assert not vector.requires_grad
    assert vector.isfinite().all()


@EVERY
def test_seeds_determine_the_bytes_and_the_global_random_state_is_left_alone(name: str) -> None:
    state = torch.random.get_rng_state()

    first, again = run(name, draw_tasks(), 3, 4), run(name, draw_tasks(), 3, 4)

    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, run(name, draw_tasks(), 3, 5)) == (name not in DRAWING)
    assert torch.equal(first, run(name, draw_tasks(), 4, 4)) == (name not in TRAINED)


@EVERY
def test_neither_the_tasks_nor_what_is_fitted_changes_with_what_is_generated(name: str) -> None:
    tasks, baseline = draw_tasks(), make(name)
    baseline.fit(tasks, 0)

    first = baseline.generate(TARGET, 0)
    kept = first.clone()
    first.zero_()

    assert torch.equal(baseline.generate(TARGET, 0), kept)
    for rows, drawn in zip(tasks.checkpoints, draw_tasks().checkpoints, strict=True):
        assert torch.equal(rows, drawn)


@pytest.mark.parametrize("label", ["task2", "prose"])
@HONEST
def test_a_task_that_is_left_out_is_not_read(name: str, label: str) -> None:
    """Poison it: the same bytes come out."""
    clean, poisoned = draw_tasks(), poison(draw_tasks(), label)

    assert torch.equal(run(name, poisoned.without(label)), run(name, clean.without(label)))


@EVERY
@pytest.mark.parametrize("part", ["checkpoints", "task_vectors"])
def test_a_poisoned_task_that_is_not_left_out_is_an_error(name: str, part: str) -> None:
    poisoned = poison(draw_tasks(), "task2")
    tasks = replace(draw_tasks(), **{part: getattr(poisoned, part)})

    with pytest.raises(InvalidInputError, match="not finite"):
        make(name).fit(tasks, 0)


def test_the_oracle_reads_the_target_and_refuses_to_go_without() -> None:
    tasks = draw_tasks()

    oracle = run("own_checkpoints_mean", tasks)

    torch.testing.assert_close(oracle, tasks.checkpoints[2].mean(0))
    with pytest.raises(InvalidInputError, match="'task2' among the tasks"):
        run("own_checkpoints_mean", tasks.without("task2"))


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match="'stew'; known: soup, greedy_soup, multi_task"):
        build_baseline("stew")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_baseline("soup", k=3), "'soup': .*'k'"),
        (lambda: build_baseline("greedy_soup"), "'greedy_soup': .*'score'"),
        (lambda: build_baseline("greedy_soup", score=len, num_validation_tasks=0), "at least one"),
        (lambda: build_baseline("top_k", k=0), "k of at least 1"),
        (lambda: build_baseline("top_k", temperatures=(0.0,)), "above 0"),
        (lambda: build_baseline("pca_ridge", num_components=0), "at least one component"),
        (lambda: build_baseline("pca_ridge", strengths=()), "above 0"),
        (lambda: build_baseline("paper", recipe=make_recipe()), "not 'token'"),
    ],
)
def test_options_that_do_not_fit_are_an_error(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build()
