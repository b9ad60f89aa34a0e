"""Outcomes: better than the own adapter only outside its seed interval."""

import numpy as np
import pytest
from scipy import stats

from service.errors import InvalidInputError
from training.evaluation.outcomes import (
    Outcome,
    Outcomes,
    compare_with_own,
    count_outcomes,
    judge_difference,
    seed_interval,
)
from training.evaluation.statistics import Interval


def test_the_seed_interval_is_students_of_one_more_score() -> None:
    scores = [0.70, 0.74, 0.69, 0.73]
    interval = seed_interval(scores)
    low, high = stats.t.interval(
        0.95, 3, loc=np.mean(scores), scale=np.std(scores, ddof=1) * np.sqrt(1 + 1 / 4)
    )
    assert (interval.value, interval.low, interval.high) == pytest.approx(
        (np.mean(scores), low, high)
    )


@pytest.mark.parametrize("count", [3, 5])
def test_it_holds_one_more_score_as_often_as_it_says(count: int) -> None:
    draws = np.random.default_rng(0).normal(size=(600, count + 1))
    inside = 0
    for *scores, further in draws:
        interval = seed_interval([float(score) for score in scores])
        inside += interval.low <= further <= interval.high
    assert inside / len(draws) == pytest.approx(0.95, abs=0.03)


def test_fewer_than_three_seeds_judge_nothing() -> None:
    with pytest.raises(InvalidInputError, match="2 fine-tuning seeds"):
        seed_interval([0.1, 0.2])
    with pytest.raises(InvalidInputError, match="use 3 or more"):
        compare_with_own({"a": 1.0}, {"a": [0.1]})


def test_wins_and_losses_are_outside_the_seed_interval_only() -> None:
    own = {name: [0.50, 0.52, 0.54] for name in ("above", "inside", "edge", "below")}
    interval = seed_interval(own["above"])
    scores = {"above": 0.7, "inside": 0.55, "edge": interval.high, "below": 0.3}
    outcomes = compare_with_own(scores, own)

    assert max(own["inside"]) < scores["inside"]  # better than each seed, and yet a tie
    assert outcomes == {
        "above": Outcome.WIN,
        "inside": Outcome.TIE,
        "edge": Outcome.TIE,
        "below": Outcome.LOSS,
    }
    assert count_outcomes(outcomes.values()) == Outcomes(wins=1, ties=2, losses=1)


def test_differences_are_judged_by_their_interval() -> None:
    assert judge_difference(Interval(0.2, 0.1, 0.3)) is Outcome.WIN
    assert judge_difference(Interval(0.2, -0.1, 0.3)) is Outcome.TIE
    assert judge_difference(Interval(0.0, 0.0, 0.0)) is Outcome.TIE
    assert judge_difference(Interval(-0.2, -0.3, -0.1)) is Outcome.LOSS
