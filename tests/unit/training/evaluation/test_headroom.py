"""Share of headroom: against scipy's bootstrap, undefined without headroom, averaged by family."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from service.errors import InvalidInputError
from tests.fixtures.kernel import normal
from training.evaluation.headroom import (
    HeadroomShare,
    average_shares,
    measure_share,
    measure_text_share,
)
from training.evaluation.statistics import Interval, Resampled


def draw_losses(gain: float, share: float, count: int = 60) -> tuple[Tensor, ...]:
    """NLL of documents under base, own and generated adapter, and their tokens."""
    tokens = torch.randint(50, 150, (count,), generator=torch.Generator().manual_seed(1)).double()
    base = tokens * (3 + normal(count, seed=2, std=0.3).double())
    own = base - tokens * (gain + normal(count, seed=3, std=0.1).double())
    generated = base - tokens * (gain * share + normal(count, seed=4, std=0.1).double())
    return base, own, generated, tokens


def test_share_and_interval_agree_with_scipy() -> None:
    base, own, generated, tokens = draw_losses(gain=0.4, share=0.6)
    measured = measure_text_share(base, own, generated, tokens, resamples=6000)

    reference = stats.bootstrap(
        (base.numpy(), own.numpy(), generated.numpy()),
        lambda b, o, g, axis: (g - b).sum(axis) / (o - b).sum(axis),
        paired=True,
        n_resamples=6000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert measured.share is not None
    assert measured.share.value == pytest.approx(
        float((generated - base).sum() / (own - base).sum())
    )
    assert measured.share.value == pytest.approx(0.6, abs=0.1)
    assert measured.share.low == pytest.approx(reference.low, abs=0.005)
    assert measured.share.high == pytest.approx(reference.high, abs=0.005)
    assert measured.headroom.value == pytest.approx(float((base - own).sum() / tokens.sum()))
    assert measured.p_value < 0.001


def test_base_and_own_adapter_are_the_ends_of_the_scale() -> None:
    base, own, _, tokens = draw_losses(gain=0.4, share=0.0)

    assert measure_text_share(base, own, own, tokens).share == Interval(1.0, 1.0, 1.0)
    zero = measure_text_share(base, own, base, tokens).share
    assert zero is not None
    assert (zero.value, zero.low, zero.high) == (0.0, 0.0, 0.0)


def test_without_significant_headroom_the_share_is_undefined() -> None:
    base, own, generated, tokens = draw_losses(gain=0.0, share=0.0)
    alike = measure_text_share(base, own, generated, tokens)
    assert alike.p_value > 0.05
    assert alike.share is None

    few = measure_text_share(*(part[:4] for part in draw_losses(gain=0.4, share=0.6)))
    assert few.p_value == 2 / 2**4  # all four documents gain, and could have by chance
    assert few.share is None

    worse = measure_text_share(*draw_losses(gain=-0.4, share=0.6))
    assert worse.p_value < 0.001
    assert worse.headroom.high < 0
    assert worse.share is None


def test_draws_without_headroom_open_the_interval() -> None:
    zero = Resampled(0.0, np.zeros(100))
    own = Resampled(1.0, np.array([-1.0] * 10 + [1.0] * 90))
    generated = Resampled(0.5, np.full(100, 0.5))
    share = measure_share(zero, own, generated, p_value=0.01).share
    assert share == Interval(0.5, -math.inf, math.inf)

    seldom = Resampled(1.0, np.array([-1.0] * 2 + [1.0] * 98))
    assert measure_share(zero, seldom, generated, p_value=0.01).share == Interval(0.5, 0.5, 0.5)


def share_of(value: float | None) -> HeadroomShare:
    nothing = Interval(0.0, 0.0, 0.0)
    return HeadroomShare(nothing, 0.0, None if value is None else Interval(value, value, value))


def test_the_mean_is_over_tasks_with_headroom_and_draws_families() -> None:
    shares = {"a": share_of(0.2), "b": share_of(0.4), "c": share_of(None), "d": share_of(0.9)}
    families = {"a": "one", "b": "one", "c": "two", "d": "three"}
    mean = average_shares(shares, families)

    assert mean.mean.value == pytest.approx(0.5)
    assert (mean.defined, mean.undefined) == (3, ("c",))
    assert (mean.mean.low, mean.mean.high) == pytest.approx((0.3, 0.9))  # a family, drawn twice
    with pytest.raises(InvalidInputError, match="no task has headroom"):
        average_shares({"c": share_of(None)}, families)
