"""The normaliser: against numpy, and inverted as exactly as float32 allows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.errors import InvalidAdapterError, InvalidInputError
from service.synthesis.layout import AdapterLayout
from service.synthesis.normalizer import AdapterNormalizer
from tests.fixtures.kernel import PROPERTY, layouts, normal

ROUNDING = 2.0**-24
"""Largest relative error of one float32 operation."""


def draw_tasks(layout: AdapterLayout, checkpoints: int = 3, tasks: int = 4) -> dict[str, Tensor]:
    """Adapters whose tensors differ in scale by powers of ten."""
    scale = torch.empty(layout.num_params)
    for index, entry in enumerate(layout.entries):
        scale[entry.span] = 10.0 ** (index % 5 - 2)
    return {
        f"task{i}": (normal(checkpoints, layout.num_params, seed=i) + 0.3) * scale
        for i in range(tasks)
    }


@PROPERTY
@given(layouts())
def test_fit_is_numpys_mean_and_deviation_rounded_up(layout: AdapterLayout) -> None:
    tasks = draw_tasks(layout)
    rows = np.concatenate([rows.double().numpy() for rows in tasks.values()])
    mean, variance = rows.mean(axis=0), rows.var(axis=0)

    normalizer = AdapterNormalizer.fit(layout, tasks)

    np.testing.assert_allclose(normalizer.mean.numpy(), mean, rtol=1e-5, atol=1e-7)
    for entry in layout.entries:
        scales = normalizer.scale[entry.span].double().numpy()
        deviation = np.sqrt(variance[entry.span].mean())
        assert (scales == scales[0]).all()
        assert np.frexp(scales[0])[0] == 0.5  # a power of two
        assert deviation * (1 - 1e-9) <= scales[0] < 2 * deviation * (1 + 1e-9)


def test_every_task_has_equal_weight_however_many_checkpoints_it_has() -> None:
    layout = single_tensor_layout()
    few, many = normal(1, layout.num_params, seed=1), normal(50, layout.num_params, seed=2)

    normalizer = AdapterNormalizer.fit(layout, {"few": few, "many": many})

    torch.testing.assert_close(normalizer.mean, (few.mean(0) + many.mean(0)) / 2)


@PROPERTY
@given(layouts())
def test_normalised_training_set_has_zero_mean_and_at_most_unit_variance(
    layout: AdapterLayout,
) -> None:
    tasks = draw_tasks(layout)
    normalized = AdapterNormalizer.fit(layout, tasks).normalize(torch.cat(list(tasks.values())))

    assert normalized.mean(0).abs().max() < 1e-5
    for entry in layout.entries:
        assert 0.25 <= normalized[:, entry.span].square().mean() <= 1.0 + 1e-5


@PROPERTY
@given(layouts(), st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 1e3]))
def test_denormalize_inverts_normalize_within_two_roundings(
    layout: AdapterLayout, seed: int, std: float
) -> None:
    normalizer = AdapterNormalizer.fit(layout, draw_tasks(layout))
    vectors = normal(5, layout.num_params, seed=seed, std=std)

    restored = normalizer.denormalize(normalizer.normalize(vectors))

    # Scaling by powers of two is exact; the subtraction and the addition round once each.
    bound = ROUNDING * ((vectors - normalizer.mean).abs() + restored.abs()) * 1.001
    assert ((restored.double() - vectors.double()).abs() <= bound.double()).all()


@PROPERTY
@given(layouts())
def test_zero_stands_for_the_mean_adapter_exactly(layout: AdapterLayout) -> None:
    normalizer = AdapterNormalizer.fit(layout, draw_tasks(layout))

    assert torch.equal(normalizer.denormalize(torch.zeros(layout.num_params)), normalizer.mean)
    assert not normalizer.normalize(normalizer.mean).any()


@PROPERTY
@given(layouts())
def test_state_dict_round_trip(layout: AdapterLayout) -> None:
    normalizer = AdapterNormalizer.fit(layout, draw_tasks(layout))

    restored = AdapterNormalizer.from_state_dict(layout, normalizer.state_dict(layout))

    assert torch.equal(restored.mean, normalizer.mean)
    assert torch.equal(restored.scale, normalizer.scale)


def single_tensor_layout() -> AdapterLayout:
    return AdapterLayout.from_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)),
        kind="core",
        rank=2,
        alpha=2,
        target_modules=["0"],
    )


def test_a_value_that_never_varies_has_a_tiny_but_positive_scale() -> None:
    layout = single_tensor_layout()

    normalizer = AdapterNormalizer.fit(layout, {"only": torch.ones(3, layout.num_params)})

    assert (normalizer.scale == 2.0**-20).all()
    assert not normalizer.normalize(torch.ones(layout.num_params)).any()


def test_fit_refuses_nothing_and_what_is_not_finite() -> None:
    layout = single_tensor_layout()

    with pytest.raises(InvalidInputError, match="no tasks"):
        AdapterNormalizer.fit(layout, {})
    with pytest.raises(InvalidInputError, match="not finite"):
        AdapterNormalizer.fit(layout, {"bad": torch.full((1, layout.num_params), torch.nan)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(5)}, "do not match"),
        ({"scale": torch.ones(2)}, "do not match"),
        ({"extra": torch.ones(1)}, "do not match"),
        ({"mean": torch.full((4,), torch.nan)}, "not finite"),
        ({"scale": torch.tensor([torch.inf])}, "not finite"),
        ({"scale": torch.tensor([0.0])}, "not positive"),
        ({"scale": torch.tensor([-1.0])}, "not positive"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    state = {"mean": torch.zeros(4), "scale": torch.ones(1)}

    with pytest.raises(InvalidAdapterError, match=message):
        AdapterNormalizer.from_state_dict(single_tensor_layout(), state | change)
