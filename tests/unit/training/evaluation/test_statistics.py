import numpy as np
import pytest
import torch
from scipy import stats

from training.evaluation.statistics import bootstrap_ppl_ratio


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
