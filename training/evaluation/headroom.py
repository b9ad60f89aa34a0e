"""Share of the headroom that a method recovers.

    share = (generated - base) / (own - base)

of scores of which higher is better: 0 is the base, 1 the task's own adapter. Where the own adapter
is not significantly better than the base there is no headroom, and the share is undefined: a
quotient of noise would be averaged with the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from service.errors import InvalidInputError
from training.evaluation.statistics import (
    RESAMPLES,
    Interval,
    Resampled,
    resample_ratio,
    sign_flip_test,
)

ALPHA = 0.05
"""Level of the paired test between own adapter and base."""


@dataclass(frozen=True)
class HeadroomShare:
    """How much of one task's headroom a method recovers.

    Attributes:
        headroom: own - base, with its paired interval.
        p_value: of the paired test that both are alike.
        share: with its paired interval, whose ends may be infinite; None where undefined.
    """

    headroom: Interval
    p_value: float
    share: Interval | None


@dataclass(frozen=True)
class MeanShare:
    """Mean share over the tasks that have one.

    Attributes:
        mean: with an interval from draws of families.
        defined: tasks with a share.
        undefined: tasks without headroom, by name.
    """

    mean: Interval
    defined: int
    undefined: tuple[str, ...]


def measure_text_share(
    base: Float[Tensor, " documents"],
    own: Float[Tensor, " documents"],
    generated: Float[Tensor, " documents"],
    tokens: Float[Tensor, " documents"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> HeadroomShare:
    """Share in NLL per token; the test flips signs of documents.

    Args:
        base: summed NLL in nats of each document under the base.
        own: the same under the task's own adapter.
        generated: the same under the adapter to judge.
        tokens: predicted tokens of each document.
        seed: of draws and flips.
        resamples: bootstrap draws.
    """
    scores = [
        resample_ratio(-nll, tokens, seed=seed, resamples=resamples)
        for nll in (base, own, generated)
    ]
    p_value = sign_flip_test(base.double() - own.double(), seed=seed)
    return measure_share(*scores, p_value=p_value)


def measure_share(
    base: Resampled,
    own: Resampled,
    generated: Resampled,
    *,
    p_value: float,
    confidence: float = 0.95,
) -> HeadroomShare:
    """Share from scores on the same draws.

    A draw without headroom tells nothing of the share: it counts as minus infinity for the lower
    end of the interval and as infinity for the upper one.

    Args:
        base: score of the base; higher is better, as for all.
        own: score of the task's own adapter.
        generated: score of the adapter to judge.
        p_value: of the paired test of own against base.
        confidence: mass of the intervals.
    """
    headroom, gain = own - base, generated - base
    share = None
    if p_value <= ALPHA and headroom.value > 0:
        share = _divide(gain, headroom, confidence)
    return HeadroomShare(headroom.interval(confidence), p_value, share)


def average_shares(
    shares: Mapping[str, HeadroomShare], families: Mapping[str, str], *, seed: int = 0
) -> MeanShare:
    """Mean over tasks; families are drawn, because tasks of one are no independent evidence.

    Args:
        shares: by task.
        families: family of each task.
        seed: of the draws.

    Raises:
        InvalidInputError: no task has a share.
    """
    values = {task: each.share.value for task, each in shares.items() if each.share is not None}
    if not values:
        raise InvalidInputError("no task has headroom: there is no mean share")
    mean = average_by_family(values, families, seed=seed)
    return MeanShare(mean, len(values), tuple(task for task in shares if task not in values))


def average_by_family(
    values: Mapping[str, float], families: Mapping[str, str], *, seed: int = 0
) -> Interval:
    """Mean of values by task, with an interval from draws of whole families."""
    members: dict[str, list[float]] = {}
    for task, value in values.items():
        members.setdefault(families[task], []).append(value)
    sums = torch.tensor([sum(part) for part in members.values()], dtype=torch.float64)
    counts = torch.tensor([len(part) for part in members.values()], dtype=torch.float64)
    return resample_ratio(sums, counts, seed=seed).interval()


def _divide(gain: Resampled, headroom: Resampled, confidence: float) -> Interval:
    has_room = headroom.draws > 0
    shares = gain.draws / np.where(has_room, headroom.draws, 1.0)
    low = _pick(np.where(has_room, shares, -np.inf), (1 - confidence) / 2)
    high = -_pick(-np.where(has_room, shares, np.inf), (1 - confidence) / 2)
    return Interval(gain.value / headroom.value, low, high)


def _pick(values: npt.NDArray[np.float64], quantile: float) -> float:
    """Quantile by rank: between infinite values there is nothing to interpolate."""
    return float(np.sort(values)[int(quantile * (len(values) - 1))])
