"""Paired bootstrap over evaluation windows."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A point estimate with its bootstrap percentile interval."""

    value: float
    low: float
    high: float


def bootstrap_ppl_ratio(
    numerator: Float[Tensor, " windows"],
    denominator: Float[Tensor, " windows"],
    tokens_per_window: int,
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Ratio of two perplexities on the same windows, with a paired bootstrap interval.

    Args:
        numerator: summed NLL in nats of each window under one model.
        denominator: the same windows under the other model.
        tokens_per_window: predicted tokens per window, the same for all.
        seed: of the resampling.
        resamples: number of bootstrap samples.
        confidence: mass of the percentile interval.
    """
    difference = (numerator.double() - denominator.double()).numpy() / tokens_per_window
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(difference), size=(resamples, len(difference)))
    ratios = np.exp(difference[picks].mean(axis=1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Interval(float(np.exp(difference.mean())), float(low), float(high))
