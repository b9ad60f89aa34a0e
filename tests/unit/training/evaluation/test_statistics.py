import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from service.errors import InvalidInputError
from tests.fixtures.kernel import PROPERTY, normal
from training.evaluation.statistics import (
    bootstrap_ppl_ratio,
    draw_units,
    measure_auroc,
    resample_ratio,
    sign_flip_test,
    sum_by_unit,
)


def test_interval_agrees_with_scipy_and_contains_the_point() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(200, generator=generator).double() * 100
    generated = own + torch.randn(200, generator=generator).double()
    interval = bootstrap_ppl_ratio(generated, own, 64, resamples=4000)

    difference = ((generated - own) / 64).numpy()
    reference = stats.bootstrap(
        (difference,),
        lambda d, axis: np.exp(d.mean(axis=axis)),
        n_resamples=4000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert interval.value == pytest.approx(np.exp(difference.mean()))
    assert interval.low < interval.value < interval.high
    assert interval.low == pytest.approx(reference.low, abs=3e-4)
    assert interval.high == pytest.approx(reference.high, abs=3e-4)


def test_equal_losses_give_a_ratio_of_exactly_one() -> None:
    loss = torch.arange(10.0)
    interval = bootstrap_ppl_ratio(loss, loss, 64)
    assert (interval.low, interval.value, interval.high) == (1.0, 1.0, 1.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    loss = torch.arange(50.0)
    noisy = loss + torch.sin(loss)
    assert bootstrap_ppl_ratio(noisy, loss, 64, seed=3) == bootstrap_ppl_ratio(
        noisy, loss, 64, seed=3
    )


def draw_documents(count: int = 120) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """NLL of documents of different lengths under two methods, and the lengths."""
    tokens = torch.randint(20, 200, (count,), generator=torch.Generator().manual_seed(1)).double()
    first = tokens * (2.0 + normal(count, seed=2, std=0.3).double())
    return first, first - tokens * (0.1 + normal(count, seed=3, std=0.2).double()), tokens


def test_a_paired_difference_agrees_with_scipy() -> None:
    first, second, tokens = draw_documents()
    ours = resample_ratio(first, tokens, resamples=6000) - resample_ratio(
        second, tokens, resamples=6000
    )
    interval = ours.interval()

    reference = stats.bootstrap(
        (first.numpy(), second.numpy(), tokens.numpy()),
        lambda a, b, n, axis: (a.sum(axis) - b.sum(axis)) / n.sum(axis),
        paired=True,
        n_resamples=6000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert interval.value == pytest.approx(float((first - second).sum() / tokens.sum()))
    assert interval.low == pytest.approx(reference.low, abs=3e-3)
    assert interval.high == pytest.approx(reference.high, abs=3e-3)
    # unpaired, the documents' own differences would drown the methods'
    alone = resample_ratio(first, tokens, resamples=6000).interval()
    assert interval.high - interval.low < 0.8 * (alone.high - alone.low)


def test_draws_follow_from_the_seed_and_count_every_unit() -> None:
    first, second, tokens = draw_documents()

    again = resample_ratio(first, tokens, seed=4).draws
    assert (resample_ratio(first, tokens, seed=4).draws == again).all()
    assert (resample_ratio(second, tokens, seed=5).draws != again).any()
    assert (draw_units(7, seed=0, resamples=50).sum(1) == 7).all()


def test_a_draw_is_the_ratio_of_the_drawn_units() -> None:
    first, _, tokens = draw_documents(9)
    resampled = resample_ratio(first, tokens, seed=2, resamples=20)

    for counts, value in zip(draw_units(9, 2, 20), resampled.draws, strict=True):
        picked = [i for i, count in enumerate(counts) for _ in range(int(count))]
        assert value == pytest.approx(float(first[picked].sum() / tokens[picked].sum()))


def test_a_p_value_meets_the_interval_that_ends_at_zero() -> None:
    first, second, tokens = draw_documents(40)
    gain = (first - second) / tokens
    difference = resample_ratio(gain - gain.mean() + 0.02, torch.ones(40))  # near the null
    p_value = difference.p_value()

    assert 0.01 < p_value < 0.99
    interval = difference.interval(confidence=1 - p_value)
    assert min(abs(interval.low), abs(interval.high)) < 2e-3
    assert resample_ratio(first - first, tokens).p_value() == 1.0
    assert resample_ratio(first, tokens, resamples=999).p_value() == 2 / 1000


def test_parts_are_summed_by_unit() -> None:
    sums = sum_by_unit(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 1]))
    assert sums.tolist() == [2.0, 8.0, 5.0]


def test_a_mean_needs_units_of_positive_size() -> None:
    with pytest.raises(InvalidInputError, match="at least one unit"):
        resample_ratio(torch.zeros(0), torch.zeros(0))
    with pytest.raises(InvalidInputError, match="positive size"):
        resample_ratio(torch.ones(2), torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_few_units_are_flipped_in_every_way_like_scipy(shift: float) -> None:
    values = normal(9, seed=6) + shift
    reference = stats.permutation_test(
        (values.double().numpy(),),
        lambda x, axis: x.sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip_test(values) == pytest.approx(reference.pvalue)


def test_many_units_are_flipped_at_random_near_the_t_test() -> None:
    values = normal(80, seed=7) + 0.35
    reference = stats.ttest_1samp(values.numpy(), 0.0).pvalue

    assert 0.02 < reference < 0.5
    assert sign_flip_test(values) == pytest.approx(reference, rel=0.15)
    assert sign_flip_test(values, seed=1) == sign_flip_test(values, seed=1)
    assert sign_flip_test(values + 3, flips=999) == 1 / 1000


def test_the_smallest_p_value_of_few_units_is_that_of_one_sign() -> None:
    assert sign_flip_test(torch.tensor([1.0, 2.0, 0.5])) == 2 / 8
    assert sign_flip_test(torch.zeros(5)) == 1.0
    assert sign_flip_test(torch.full((3,), 0.1)) == 2 / 8  # whatever the sums round to
    with pytest.raises(InvalidInputError, match="at least one unit"):
        sign_flip_test(torch.zeros(0))


GRID = st.lists(st.integers(0, 6).map(lambda i: i / 6), min_size=1, max_size=30)
"""Few values, so that there are ties."""


@PROPERTY
@given(GRID, GRID)
def test_auroc_is_that_of_scikit_learn(positive: list[float], negative: list[float]) -> None:
    labels = [1] * len(positive) + [0] * len(negative)
    ours = measure_auroc(torch.tensor(positive), torch.tensor(negative))
    assert ours == pytest.approx(roc_auc_score(labels, positive + negative))


def test_auroc_by_hand() -> None:
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.9])

    assert measure_auroc(high, low) == 1.0
    assert measure_auroc(low, high) == 0.0
    assert measure_auroc(low, low) == 0.5
    assert measure_auroc(torch.tensor([0.5]), torch.tensor([0.5, 0.4])) == 0.75
    with pytest.raises(InvalidInputError, match="both kinds"):
        measure_auroc(high, torch.zeros(0))
    with pytest.raises(InvalidInputError, match="not a number"):
        measure_auroc(high, torch.tensor([float("nan")]))
