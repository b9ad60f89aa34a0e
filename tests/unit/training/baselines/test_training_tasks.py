"""The tasks that baselines learn from, and what leaving some out means."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from service.errors import InvalidInputError
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_tasks import FAMILIES, draw_tasks, poison
from tests.fixtures.tiny_training import TINY_LAYOUT, draw_checkpoints, draw_task_vectors
from training.baselines import TrainingTasks


def test_without_a_task_the_others_keep_their_order_and_tensors() -> None:
    tasks = draw_tasks()

    rest = tasks.without("task2")

    assert rest.names == ("task0", "task1", "task3", "task4", "task5")
    assert rest.families == ("prose", "prose", "letters", "news", "verse")
    assert all(a is b for a, b in zip(rest.checkpoints[2:], tasks.checkpoints[3:], strict=True))
    assert all(a is b for a, b in zip(rest.task_vectors[2:], tasks.task_vectors[3:], strict=True))


def test_without_a_family_all_its_tasks_are_gone() -> None:
    assert draw_tasks().without("prose").names == ("task2", "task3", "task4", "task5")


def test_a_label_of_a_task_and_of_a_family_takes_the_family() -> None:
    tasks = replace(draw_tasks(), families=("task3", *FAMILIES[1:]))

    assert tasks.without("task3").names == ("task1", "task2", "task4", "task5")


def test_statistics_are_those_of_the_tasks_that_are_left() -> None:
    tasks = draw_tasks()
    assert tasks.own_adapters.isfinite().all()  # what is left out was read before, and is gone

    rest = poison(tasks, "code").without("code")

    assert rest.own_adapters.isfinite().all()
    assert rest.keys.isfinite().all()
    assert torch.equal(rest.normalizer.mean, tasks.without("code").normalizer.mean)


def test_an_unknown_label_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match=r"'novels'; known: code, letters, .*task0"):
        draw_tasks().without("novels")


def test_leaving_out_all_tasks_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="no task is left"):
        draw_tasks(("prose", "prose")).without("prose")


def test_leave_one_out_goes_by_family() -> None:
    folds = [(rest.names, left.names) for rest, left in draw_tasks().leave_one_out()]

    assert [left for _, left in folds] == [
        ("task0", "task1"),
        *((f"task{i}",) for i in (2, 3, 4, 5)),
    ]
    for rest, left in folds:
        assert sorted(rest + left) == list(draw_tasks().names)


def test_leave_one_out_of_a_single_family_goes_by_task() -> None:
    folds = [left.names for _, left in draw_tasks(("prose",) * 3).leave_one_out()]

    assert folds == [("task0",), ("task1",), ("task2",)]


def test_leave_one_out_of_a_single_task_is_an_error() -> None:
    with pytest.raises(InvalidInputError, match="at least two tasks"):
        next(draw_tasks(("prose",)).leave_one_out())


def test_similarities_are_scikit_learns_to_the_mean_task_vectors() -> None:
    tasks, vectors = draw_tasks(), normal(3, 12, seed=7)
    means = torch.stack([rows.mean(0) for rows in tasks.task_vectors])

    expected = torch.from_numpy(cosine_similarity(vectors.numpy(), means.numpy())).double()

    torch.testing.assert_close(tasks.measure_similarities(vectors), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("part", ["checkpoints", "task_vectors"])
def test_values_that_are_not_finite_are_an_error(part: str) -> None:
    tasks = draw_tasks()
    spoiled = replace(tasks, **{part: getattr(poison(tasks, "task1"), part)})

    with pytest.raises(InvalidInputError, match="not finite"):
        spoiled.require_finite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": ("prose",)}, "got 6, 1, 6, 6"),
        ({"names": ("task0",) * 6}, "twice"),
        ({"task_vectors": (normal(0, 12),) * 6}, "no wordings"),
        ({"checkpoints": (normal(2, 63),) * 6}, "63 values, but the layout has 64"),
    ],
)
def test_tasks_that_do_not_fit_together_are_an_error(
    change: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        replace(draw_tasks(), **change)


def test_a_runs_stages_become_training_tasks() -> None:
    checkpoints, vectors = draw_checkpoints(), draw_task_vectors()

    tasks = TrainingTasks.from_stages(TINY_LAYOUT, checkpoints, vectors, {"task1": "prose"})

    assert tasks.names == ("task0", "task1", "task2")
    assert tasks.families == ("task0", "prose", "task2")
    assert torch.equal(tasks.checkpoints[2], checkpoints["task2"])
    assert torch.equal(tasks.task_vectors[2], vectors.of_task(2))
