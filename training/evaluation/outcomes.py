"""Wins, ties and losses: against the own adapter outside seed noise only, else by intervals."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import sqrt
from statistics import mean, stdev

from service.errors import InvalidInputError
from training.evaluation.statistics import Interval

MIN_SEEDS = 3
"""Fine-tuning seeds from which there is a seed interval."""


FURTHER_SEEDS = (1, 2)
"""Beside seed 0, which bundles are made of."""


class Outcome(StrEnum):
    """How a method fares on a task."""

    WIN = "win"
    TIE = "tie"
    LOSS = "loss"


@dataclass(frozen=True)
class Outcomes:
    """Counts over tasks."""

    wins: int
    ties: int
    losses: int


def seed_interval(scores: Sequence[float], confidence: float = 0.95) -> Interval:
    """Where the score of one more fine-tuning of the same task would be.

    The prediction interval `mean +- t(confidence, n - 1) s sqrt(1 + 1/n)` of n independent
    normal scores (Hahn and Meeker 1991, section 4.7). The range of the scores would be too
    narrow to judge by: a further score is inside that of three with a probability of one half.

    Args:
        scores: of the own adapter, one a fine-tuning seed.
        confidence: probability that a further score is inside.

    Raises:
        InvalidInputError: fewer than `MIN_SEEDS` scores.
    """
    if len(scores) < MIN_SEEDS:
        raise InvalidInputError(
            f"{len(scores)} fine-tuning seeds say nothing of seed noise: use {MIN_SEEDS} or more"
        )
    from scipy.stats import t

    count, center = len(scores), mean(scores)
    reach = float(t.ppf((1 + confidence) / 2, count - 1)) * stdev(scores) * sqrt(1 + 1 / count)
    return Interval(center, center - reach, center + reach)


def judge_in_seed_noise(score: float, own: Interval) -> Outcome:
    """A score against the own adapter's seed interval; higher is better, inside is a tie."""
    if own.low <= score <= own.high:
        return Outcome.TIE
    return Outcome.WIN if score > own.high else Outcome.LOSS


def judge_difference(difference: Interval) -> Outcome:
    """A paired difference `ours - theirs` of scores; higher is better, around 0 is a tie."""
    if difference.low <= 0 <= difference.high:
        return Outcome.TIE
    return Outcome.WIN if difference.low > 0 else Outcome.LOSS


def compare_with_own(
    scores: Mapping[str, float], own_scores: Mapping[str, Sequence[float]]
) -> dict[str, Outcome]:
    """Outcome of each task's score against its own adapter's seed interval.

    Args:
        scores: by task; higher is better.
        own_scores: by task, one a fine-tuning seed.

    Raises:
        InvalidInputError: a task has fewer than `MIN_SEEDS` seeds.
    """
    return {
        task: judge_in_seed_noise(score, seed_interval(own_scores[task]))
        for task, score in scores.items()
    }


def count_outcomes(outcomes: Collection[Outcome]) -> Outcomes:
    """Counts of wins, ties and losses."""
    listed = list(outcomes)
    return Outcomes(*(listed.count(each) for each in (Outcome.WIN, Outcome.TIE, Outcome.LOSS)))
