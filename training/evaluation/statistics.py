"""Paired bootstrap over units of evaluation, a paired test, and the area under the ROC curve.

A unit is what is drawn with replacement: a document, an object's instance, a task. Methods are
compared on the same draws of the same units. To draw larger units (documents instead of windows,
families instead of tasks), sum over them first: `sum_by_unit`.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.errors import InvalidInputError

RESAMPLES = 2000
"""Bootstrap draws, where nothing else is said."""

FLIPS = 10_000
"""Sign flips of the paired test; fewer units than log2 of it are flipped in every way."""

_ROUNDING = 1e-12
"""Relative difference up to which two sums of the same terms are equal."""


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Resampled:
    """A statistic of all units, and of each bootstrap draw of them.

    Attributes:
        value: of all units.
        draws: of each draw; statistics of the same units and seed were drawn alike.
    """

    value: float
    draws: npt.NDArray[np.float64]

    def __sub__(self, other: "Resampled") -> "Resampled":
        """Paired difference: draw by draw."""
        assert self.draws.shape == other.draws.shape, "statistics of different draws"
        return Resampled(self.value - other.value, self.draws - other.draws)

    def interval(self, confidence: float = 0.95) -> Interval:
        """Percentile interval (Efron and Tibshirani 1993, section 13.3)."""
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.draws, [tail, 1 - tail])
        return Interval(self.value, float(low), float(high))

    def p_value(self) -> float:
        """Two-sided: `2 min(#{draws <= 0}, #{draws >= 0}) + 2` over `draws + 1`, at most 1.

        The percentile interval of confidence 1 - p ends at 0. It says little of few units;
        where the statistic is a sum over units, `sign_flip_test` is exact.
        """
        fewest = min((self.draws <= 0).sum(), (self.draws >= 0).sum())
        return float(min(1.0, 2 * (1 + fewest) / (1 + len(self.draws))))


def draw_units(count: int, seed: int, resamples: int) -> npt.NDArray[np.float64]:
    """How often each unit was drawn, one row a draw."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(float)


def resample_ratio(
    numerator: Float[Tensor, " units"],
    denominator: Float[Tensor, " units"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Resampled:
    """`sum(numerator) / sum(denominator)` of all units and of draws of them.

    With NLL over tokens it is the NLL per token of a text; with ones below it is a mean.

    Args:
        numerator: sum of each unit.
        denominator: size of each unit, positive.
        seed: of the draws: the same for all methods that are compared.
        resamples: number of draws.

    Raises:
        InvalidInputError: no units, or a size that is not positive.
    """
    if not len(numerator) or not bool((denominator > 0).all()):
        raise InvalidInputError("a mean needs at least one unit, and units of positive size")
    top, bottom = numerator.double().numpy(), denominator.double().numpy()
    counts = draw_units(len(top), seed, resamples)
    return Resampled(float(top.sum() / bottom.sum()), (counts @ top) / (counts @ bottom))


def sum_by_unit(
    values: Float[Tensor, " parts"], owner: Int[Tensor, " parts"]
) -> Float[Tensor, " units"]:
    """Sums of the parts of each unit.

    Args:
        values: of each part.
        owner: unit of each part, 0 to the number of units - 1.
    """
    sums = values.new_zeros(int(owner.max()) + 1, dtype=torch.float64)
    return sums.index_add_(0, owner.long(), values.double())


def sign_flip_test(
    differences: Float[Tensor, " units"], *, seed: int = 0, flips: int = FLIPS
) -> float:
    """Two-sided p-value of "both methods are alike" from paired differences.

    Alike methods could be exchanged in each unit: each difference could have the other sign. The
    p-value is the share of sign flips whose `|sum|` is at least the observed one (Fisher 1935,
    The Design of Experiments, section 21). All `2^units` flips where these are few, else random
    ones, the observed one among them.

    Raises:
        InvalidInputError: no units.
    """
    values = differences.double().numpy()
    if not len(values):
        raise InvalidInputError("a paired test needs at least one unit")
    least = abs(values.sum()) - _ROUNDING * np.abs(values).sum()
    if 2 ** len(values) <= flips:
        numbers = np.arange(2 ** len(values))[:, None] >> np.arange(len(values))
        sums = (1 - 2 * (numbers & 1)) @ values
        return float((np.abs(sums) >= least).mean())
    rng = np.random.default_rng(seed)
    hits = 1
    for start in range(0, flips, 500):  # few at a time: a row has as many values as units
        size = (min(500, flips - start), len(values))
        sums = (1 - 2 * rng.integers(0, 2, size=size, dtype=np.int8)) @ values
        hits += int((np.abs(sums) >= least).sum())
    return hits / (flips + 1)


def bootstrap_ppl_ratio(
    numerator: Float[Tensor, " windows"],
    denominator: Float[Tensor, " windows"],
    tokens_per_window: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
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
    return Resampled(float(np.exp(difference.mean())), ratios).interval(confidence)


def measure_auroc(positive: Float[Tensor, " p"], negative: Float[Tensor, " n"]) -> float:
    """Area under the ROC curve: P(a positive scores above a negative), ties counted half.

    Mann and Whitney's U over the number of pairs (Hanley and McNeil 1982).

    Raises:
        InvalidInputError: one side is empty, or a score is not a number.
    """
    if not len(positive) or not len(negative):
        raise InvalidInputError("an AUROC needs scores of both kinds")
    if bool(positive.isnan().any() | negative.isnan().any()):
        raise InvalidInputError("a score is not a number")
    ordered = negative.double().sort().values
    below = torch.searchsorted(ordered, positive.double())
    not_above = torch.searchsorted(ordered, positive.double(), right=True)
    wins = int(below.sum() + not_above.sum()) / 2
    return wins / (len(positive) * len(negative))
