"""PCA codec and ridge against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge as ReferenceRidge

from tests.fixtures.kernel import normal
from tests.fixtures.tiny_tasks import draw_tasks
from training.baselines import TrainingTasks
from training.baselines.pca_ridge import PcaCodec, PcaRidge, Ridge
from training.baselines.soup import Soup

VECTOR = normal(12, seed=12)


def scaled_adapters(tasks: TrainingTasks) -> np.ndarray:
    rows = torch.stack([rows.double().mean(0) for rows in tasks.checkpoints])
    return (rows / tasks.normalizer.scale).numpy()


@pytest.mark.parametrize("num_components", [1, 3, 5])
def test_the_codec_reconstructs_as_scikit_learns_pca(num_components: int) -> None:
    tasks = draw_tasks()
    scaled = scaled_adapters(tasks)
    reference = PCA(num_components, svd_solver="full").fit(scaled)

    codec = PcaCodec.fit(tasks, num_components)
    codes = codec.encode(tasks.own_adapters)

    np.testing.assert_allclose(
        (codec.decode(codes) / codec.scale).numpy(),
        reference.inverse_transform(reference.transform(scaled)),
        atol=1e-9,
    )
    np.testing.assert_allclose(
        codes.square().sum(0).numpy() / 5, reference.explained_variance_, rtol=1e-9
    )


def test_the_codec_has_one_component_less_than_tasks_and_loses_nothing_then() -> None:
    tasks = draw_tasks()

    codec = PcaCodec.fit(tasks, 99)

    assert len(codec.components) == 5
    decoded = codec.decode(codec.encode(tasks.own_adapters))
    torch.testing.assert_close(decoded, tasks.own_adapters)


def test_ridge_is_scikit_learns_for_every_strength() -> None:
    x, y = normal(20, 12, seed=3).double(), normal(20, 4, seed=4).double()
    weights = torch.rand(20, generator=torch.Generator().manual_seed(5)).double() + 0.1
    strengths = (1e-3, 0.5, 100.0)

    models = Ridge.fit(x, y, weights, strengths)

    for model, strength in zip(models, strengths, strict=True):
        reference = ReferenceRidge(alpha=strength).fit(x.numpy(), y.numpy(), weights.numpy())
        np.testing.assert_allclose(model.weights.T.numpy(), reference.coef_, atol=1e-9)
        np.testing.assert_allclose(model.bias.numpy(), reference.intercept_, atol=1e-9)


def test_the_whole_is_scikit_learns_pca_and_ridge() -> None:
    tasks, baseline = draw_tasks(), PcaRidge(num_components=3, strengths=(0.1,))
    scaled = scaled_adapters(tasks)
    counts = [len(rows) for rows in tasks.task_vectors]
    pca = PCA(3, svd_solver="full").fit(scaled)
    ridge = ReferenceRidge(alpha=0.1).fit(
        torch.cat(tasks.task_vectors).double().numpy(),
        np.repeat(pca.transform(scaled), counts, axis=0),
        np.repeat([1 / count for count in counts], counts),
    )

    baseline.fit(tasks, 0)

    predicted = pca.inverse_transform(ridge.predict(VECTOR[None].double().numpy()))[0]
    expected = torch.from_numpy(predicted) * tasks.normalizer.scale
    torch.testing.assert_close(baseline.generate(VECTOR, 0).double(), expected, atol=1e-5, rtol=0)


def test_the_strength_is_the_best_on_left_out_families() -> None:
    """Against the definition, task by task and wording by wording."""
    tasks, candidates = draw_tasks(), (1e-3, 0.3, 100.0)
    scale = tasks.normalizer.scale

    def measure_error(strength: float) -> float:
        total = 0.0
        for index, family in enumerate(tasks.families):
            fixed = PcaRidge(num_components=4, strengths=(strength,))
            fixed.fit(tasks.without(family), 0)
            own = tasks.checkpoints[index].mean(0)
            errors = [
                float(((fixed.generate(vector, 0) - own) / scale).square().mean())
                for vector in tasks.task_vectors[index]
            ]
            total += sum(errors) / len(errors)
        return total

    errors = [measure_error(strength) for strength in candidates]
    baseline = PcaRidge(num_components=4, strengths=candidates)
    baseline.fit(tasks, 0)

    assert baseline.strength == candidates[errors.index(min(errors))]


def test_a_heavy_penalty_gives_the_soup() -> None:
    tasks, heavy, soup = draw_tasks(), PcaRidge(strengths=(1e9,)), Soup()
    heavy.fit(tasks, 0)
    soup.fit(tasks, 0)

    torch.testing.assert_close(heavy.generate(VECTOR, 0), soup.generate(VECTOR, 0))


def test_adapters_linear_in_the_task_vector_are_predicted_for_a_task_left_out() -> None:
    """20 tasks span the 12 dimensions, so a linear map is found, and beats the soup by far."""
    tasks = draw_tasks(tuple(f"family{i}" for i in range(20)))
    own = tasks.checkpoints[7].mean(0)
    baseline, soup = PcaRidge(), Soup()
    for each in (baseline, soup):
        each.fit(tasks.without("task7"), 0)

    vector = tasks.task_vectors[7].mean(0)
    error = (baseline.generate(vector, 0) - own).norm()

    assert error < 0.3 * (soup.generate(vector, 0) - own).norm()


def test_two_tasks_are_enough() -> None:
    baseline = PcaRidge()
    baseline.fit(draw_tasks(("prose", "code")), 0)

    assert baseline.generate(VECTOR, 0).isfinite().all()
