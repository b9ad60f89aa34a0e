"""Soups, retrieval and the Gaussian, each against its closed form."""

import math

import pytest
import torch

from service.synthesis.normalizer import AdapterNormalizer
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_tasks import draw_tasks
from tests.fixtures.tiny_training import TINY_LAYOUT
from training.baselines.gaussian import Gaussian
from training.baselines.greedy_soup import GreedySoup
from training.baselines.nearest import Nearest
from training.baselines.soup import Soup
from training.baselines.top_k import TopK

VECTOR = normal(12, seed=12)
"""Near the task vectors of task2."""


def test_the_soup_is_the_mean_of_the_bundles_normaliser() -> None:
    tasks = draw_tasks()
    reference = AdapterNormalizer.fit(
        TINY_LAYOUT, dict(zip(tasks.names, tasks.checkpoints, strict=True))
    )
    soup = Soup()

    soup.fit(tasks, 0)

    assert torch.equal(soup.generate(VECTOR, 0), reference.mean)


def test_the_greedy_soup_keeps_what_does_not_hurt() -> None:
    """The score is the distance to an average of three tasks, so these are what it must keep."""
    tasks = draw_tasks()
    goal = tasks.own_adapters[[1, 3, 4]].mean(0).float()
    greedy = GreedySoup(lambda vector, _task: -float((vector - goal).square().sum()))

    greedy.fit(tasks, 0)

    own = tasks.own_adapters.float()
    ranked = sorted(range(6), key=lambda i: float((own[i] - goal).square().sum()))
    kept = [ranked[0]]
    for index in ranked[1:]:  # the recipe, word by word
        mean = torch.stack([own[i] for i in [*kept, index]]).mean(0)
        before = torch.stack([own[i] for i in kept]).mean(0)
        if (mean - goal).square().sum() <= (before - goal).square().sum():
            kept.append(index)
    assert greedy.kept == tuple(f"task{i}" for i in kept)
    assert len(kept) > 1
    torch.testing.assert_close(greedy.generate(VECTOR, 0), own[kept].mean(0))


def test_a_greedy_soup_of_useless_tasks_is_the_best_one() -> None:
    tasks = draw_tasks()
    own = tasks.own_adapters.float()
    greedy = GreedySoup(lambda vector, _task: float(torch.equal(vector, own[4])))

    greedy.fit(tasks, 0)

    assert greedy.kept == ("task4",)
    assert torch.equal(greedy.generate(VECTOR, 0), own[4])


@pytest.mark.parametrize(("number", "scored"), [(None, 5), (2, 2)])
def test_the_greedy_soup_scores_on_training_tasks_only(number: int | None, scored: int) -> None:
    seen = set()

    def score(_vector: torch.Tensor, task: str) -> float:
        seen.add(task)
        return 0.0

    GreedySoup(score, number).fit(draw_tasks().without("task2"), 0)

    assert len(seen) == scored
    assert seen < set(draw_tasks().names) - {"task2"} or number is None
    assert "task2" not in seen


def test_the_nearest_adapter_is_that_of_the_task_that_the_words_are_about() -> None:
    tasks, nearest = draw_tasks(), Nearest()
    nearest.fit(tasks, 0)

    for index, vectors in enumerate(tasks.task_vectors):
        found = nearest.generate(vectors[0] * 3, 0)  # only the direction counts
        torch.testing.assert_close(found, tasks.checkpoints[index].mean(0))


@pytest.mark.parametrize("k", [1, 3, None])
def test_top_k_is_a_softmax_over_the_k_most_similar(k: int | None) -> None:
    tasks, top = draw_tasks(), TopK(k, temperatures=(0.2,))
    top.fit(tasks, 0)

    cosine = [
        float(VECTOR @ rows.mean(0) / VECTOR.norm() / rows.mean(0).norm())
        for rows in tasks.task_vectors
    ]
    chosen = sorted(range(6), key=lambda i: -cosine[i])[: k or 6]
    weights = [math.exp(cosine[i] / 0.2) for i in chosen]
    expected = sum(
        w / sum(weights) * tasks.checkpoints[i].mean(0)
        for w, i in zip(weights, chosen, strict=True)
    )
    torch.testing.assert_close(top.generate(VECTOR, 0), expected)


def test_top_k_goes_from_the_nearest_adapter_to_the_soup_with_temperature() -> None:
    tasks, nearest, soup = draw_tasks(), Nearest(), Soup()
    cold, hot = TopK(None, temperatures=(1e-6,)), TopK(None, temperatures=(math.inf,))
    for baseline in (nearest, soup, cold, hot):
        baseline.fit(tasks, 0)

    torch.testing.assert_close(cold.generate(VECTOR, 0), nearest.generate(VECTOR, 0))
    torch.testing.assert_close(hot.generate(VECTOR, 0), soup.generate(VECTOR, 0))


def test_the_temperature_is_the_best_on_left_out_families() -> None:
    """Against the definition, task by task and wording by wording."""
    tasks, candidates = draw_tasks(), (0.05, 0.3, 1.0, math.inf)
    scale = tasks.normalizer.scale

    def measure_error(temperature: float) -> float:
        total = 0.0
        for name, family in zip(tasks.names, tasks.families, strict=True):
            fixed, index = TopK(3, temperatures=(temperature,)), tasks.names.index(name)
            fixed.fit(tasks.without(family), 0)
            own = tasks.checkpoints[index].mean(0)
            errors = [
                float(((fixed.generate(vector, 0) - own) / scale).square().mean())
                for vector in tasks.task_vectors[index]
            ]
            total += sum(errors) / len(errors)
        return total

    errors = [measure_error(temperature) for temperature in candidates]
    assert min(errors) < min(errors[0], errors[-1])  # neither end: there is something to choose

    top = TopK(3, temperatures=candidates)
    top.fit(tasks, 0)

    assert top.temperature == candidates[errors.index(min(errors))]


def test_the_gaussian_has_the_mean_and_spread_of_the_nearest_tasks_checkpoints() -> None:
    tasks, gaussian = draw_tasks(checkpoints=4), Gaussian()
    gaussian.fit(tasks, 0)

    draws = torch.stack([gaussian.generate(VECTOR, seed) for seed in range(2000)])

    mean, std = tasks.checkpoints[2].mean(0), tasks.checkpoints[2].std(0)
    assert ((draws.mean(0) - mean).abs() < 5 * std / 2000**0.5).all()
    assert ((draws.std(0) / std - 1).abs() < 5 / 4000**0.5).all()
    correlation = torch.corrcoef(draws.T[:8]) - torch.eye(8)
    assert correlation.abs().max() < 5 / 2000**0.5  # each value on its own


def test_the_gaussian_of_a_single_checkpoint_is_that_checkpoint() -> None:
    tasks, gaussian = draw_tasks(checkpoints=1), Gaussian()
    gaussian.fit(tasks, 0)

    assert torch.equal(gaussian.generate(VECTOR, 0), tasks.checkpoints[2][0])
