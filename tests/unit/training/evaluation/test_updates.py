"""Updates of the base from their factors: against dense products, for every kind of adapter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from service.synthesis.bases import AdapterBases
from service.synthesis.layout import AdapterKind, AdapterLayout
from tests.fixtures.kernel import PROPERTY, adapt_tiny_net, layouts, normal
from training.evaluation.updates import compare_beyond_mean, compare_updates, multiply_updates


def draw_bases(layout: AdapterLayout) -> AdapterBases:
    """Random frozen factors."""
    tensors: dict[tuple[str, str], Tensor] = {}
    for number, module in enumerate(layout.modules):
        if layout.kind is not AdapterKind.LORA:
            tensors[module.path, "A"] = normal(layout.rank, module.in_features, seed=number)
        if layout.kind is AdapterKind.CORE:
            tensors[module.path, "B"] = normal(module.out_features, layout.rank, seed=90 + number)
    return AdapterBases(layout, tensors)


def build_dense(bases: AdapterBases, vector: Tensor) -> dict[str, Tensor]:
    """`delta W` of every module, by way of plain LoRA factors."""
    scaling = bases.layout.scaling
    return {
        path: scaling * (up.double() @ down.double())
        for path, (down, up) in bases.expand(vector).items()
    }


def compare_dense(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    error = (ours - theirs).norm() / theirs.norm()
    return float(error), float((ours * theirs).sum() / (ours.norm() * theirs.norm()))


@PROPERTY
@given(layouts(), st.integers(0, 99))
def test_error_and_cosine_are_those_of_the_dense_updates(layout: AdapterLayout, seed: int) -> None:
    bases = draw_bases(layout)
    own = normal(layout.num_params, seed=seed)
    vector = own + normal(layout.num_params, seed=seed + 1, std=0.5)
    ours, theirs = build_dense(bases, vector), build_dense(bases, own)
    comparison = compare_updates(bases, vector, own)

    assert comparison.modules.keys() == {module.path for module in layout.modules}
    for path, measured in comparison.modules.items():
        expected = compare_dense(ours[path], theirs[path])
        assert (measured.relative_error, measured.cosine) == pytest.approx(expected, rel=1e-5)
    whole = [torch.cat([each[m.path].flatten() for m in layout.modules]) for each in (ours, theirs)]
    expected = compare_dense(*whole)
    assert comparison.whole.relative_error == pytest.approx(expected[0], rel=1e-5)
    assert comparison.whole.cosine == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.parametrize("kind", AdapterKind)
def test_pairs_are_multiplied_row_by_row(kind: AdapterKind) -> None:
    _, layout, bases = adapt_tiny_net(kind)
    first, second = normal(3, layout.num_params, seed=1), normal(3, layout.num_params, seed=2)
    products = multiply_updates(bases, first, second)

    for row in range(3):
        ours, theirs = build_dense(bases, first[row]), build_dense(bases, second[row])
        for column, module in enumerate(layout.modules):
            one, other = ours[module.path], theirs[module.path]
            expected = [(one * other).sum(), one.norm(), other.norm(), (one - other).norm()]
            names = ("inner", "first", "second", "distance")
            measured = [getattr(products, name)[row, column] for name in names]
            assert torch.stack(measured) == pytest.approx(torch.stack(expected), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", AdapterKind)
def test_the_mean_adapters_measures_are_taken_off(kind: AdapterKind) -> None:
    _, layout, bases = adapt_tiny_net(kind)
    vector, own, mean = (normal(layout.num_params, seed=seed) for seed in (1, 2, 3))
    beyond = compare_beyond_mean(bases, vector, own, mean)
    ours, theirs = compare_updates(bases, vector, own), compare_updates(bases, mean, own)

    assert beyond.whole.cosine == ours.whole.cosine - theirs.whole.cosine
    for path, each in beyond.modules.items():
        expected = ours.modules[path].relative_error - theirs.modules[path].relative_error
        assert each.relative_error == expected
    nothing = compare_beyond_mean(bases, mean, own, mean).whole
    assert (nothing.relative_error, nothing.cosine) == (0.0, 0.0)
    perfect = compare_beyond_mean(bases, own, own, mean).whole
    assert perfect.relative_error == pytest.approx(-theirs.whole.relative_error, rel=1e-6)
    assert perfect.cosine == pytest.approx(1 - theirs.whole.cosine)


def test_two_vectors_of_one_update_are_equal() -> None:
    _, layout, bases = adapt_tiny_net(AdapterKind.LORA)
    own = normal(layout.num_params, seed=1).double()
    turned = own.clone()
    mixing = torch.tensor([[2.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    for module in layout.modules:  # B A = (B M)(M^-1 A)
        for name, change in (
            ("lora_A", lambda a: torch.linalg.inv(mixing) @ a),
            ("lora_B", lambda b: b @ mixing),
        ):
            entry = layout.spans[module.path, name]
            turned[entry.span] = change(own[entry.span].view(entry.shape)).flatten()
    measured = compare_updates(bases, turned, own).whole

    assert float((turned - own).norm() / own.norm()) > 0.5
    assert measured.relative_error < 1e-13
    assert measured.cosine == pytest.approx(1.0)


@pytest.mark.parametrize("kind", AdapterKind)
def test_small_distances_are_not_lost_to_rounding(kind: AdapterKind) -> None:
    _, layout, bases = adapt_tiny_net(kind)
    own = normal(layout.num_params, seed=1).double()
    nearly = own * (1 + 1e-11)
    expected = 2e-11 if kind is AdapterKind.LORA else 1e-11  # both factors grew

    assert compare_updates(bases, nearly, own).whole.relative_error == pytest.approx(
        expected, rel=1e-3
    )
    assert compare_updates(bases, own, own).whole.relative_error < 1e-15


@pytest.mark.parametrize("kind", AdapterKind)
def test_updates_of_zero_have_no_direction(kind: AdapterKind) -> None:
    _, layout, bases = adapt_tiny_net(kind)
    zero, own = torch.zeros(layout.num_params), normal(layout.num_params, seed=1)

    assert compare_updates(bases, zero, own).whole.relative_error == pytest.approx(1.0)
    assert compare_updates(bases, zero, own).whole.cosine == 0.0
    assert compare_updates(bases, own, zero).whole.relative_error == math.inf
    assert compare_updates(bases, zero, zero).whole.relative_error == 0.0
